"""What a store takes from the machine it runs on: the time, and files. Simulations and benches give it others."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..blocks.block import Bytes
from ..blocks.stored import Ranges
from ..records.files import MAX_IOVECS, write_file


class Clock:
    """The time that policies and deadlines go by, in seconds."""

    def time(self) -> float:
        """The date, since 1970."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds since some moment, which nobody sets back."""
        return time.monotonic()


class OpenFile(Ranges):
    """A file open for reading. Stays readable when it is deleted meanwhile."""

    def __init__(self, path: str | Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def head(self, nbytes: int, offset: int = 0) -> bytes:
        return os.pread(self._fd, nbytes, offset)

    def read(self, buffers: Sequence[Bytes], offset: int) -> int:
        return os.preadv(self._fd, buffers[:MAX_IOVECS], offset)  # type: ignore[arg-type]

    def will_need(self, offset: int, nbytes: int) -> None:
        """Makes the kernel read a range into its page cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def at_hand(self, size: int) -> bool:
        """Whether the kernel has the middle and the end of the file in its page cache."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        place = bytearray(1)
        try:
            return all(os.preadv(self._fd, [place], at, os.RWF_NOWAIT) == 1 for at in (size // 2, size - 1))
        except OSError:  # EAGAIN: it would have to be read; others: the file system can't tell
            return False

    def close(self) -> None:
        os.close(self._fd)


class Disk:
    """The file system that blocks are on."""

    def open(self, path: str | Path) -> OpenFile:
        """Raises OSError: from the file system."""
        return OpenFile(path)

    def write(self, path: Path, chunks: Sequence[memoryview | bytes], folder: Path, *, sync: bool) -> int:
        """Writes a file whole or not at all, by way of `folder`: see `write_file`."""
        return write_file(path, chunks, folder, sync=sync)


@dataclass(frozen=True)
class Surroundings:
    """A store's clock and disk."""

    clock: Clock = field(default_factory=Clock)
    disk: Disk = field(default_factory=Disk)
