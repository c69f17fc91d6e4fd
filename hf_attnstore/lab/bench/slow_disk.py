"""A disk that is slower than the one at hand: what pays off on a slow disk can be made to happen there, and what
overlap hides stands out of a busy machine's noise.

It is a queue: everything that is read or written comes one after the other at a fixed rate. Asking the kernel to read
ahead puts bytes into the queue, and who reads them later waits only for what has not come yet. That is what a kernel
does that has room for all that it was asked for.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hf_attnstore.store.blocks.block import Bytes
from hf_attnstore.store.disk.surroundings import Disk, OpenFile


class SlowDisk(Disk):
    """To be given to a store.

    Args:
        bytes_per_second: None is as fast as the disk at hand.
        now, sleep: a clock, in seconds.
    """

    def __init__(
        self,
        bytes_per_second: float | None = None,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.bytes_per_second = bytes_per_second
        self._now, self._sleep = now, sleep
        self._free = 0.0
        self._asking = threading.Lock()

    @contextmanager
    def at(self, bytes_per_second: float | None) -> Iterator[None]:
        """For the length of a `with` another speed. Not for two at a time."""
        before, self.bytes_per_second = self.bytes_per_second, bytes_per_second
        try:
            yield
        finally:
            self.bytes_per_second = before

    def open(self, path: str | Path) -> OpenFile:
        return _SlowFile(path, self)

    def write(self, path: Path, chunks: Sequence[memoryview | bytes], folder: Path, *, sync: bool) -> int:
        self.wait_for(self.ask(sum(memoryview(chunk).nbytes for chunk in chunks)))
        return super().write(path, chunks, folder, sync=sync)

    def ask(self, nbytes: int) -> float:
        """Asks for bytes; returns when they will be there."""
        with self._asking:
            if self.bytes_per_second is not None:
                self._free = max(self._free, self._now()) + nbytes / self.bytes_per_second
                return self._free
            return 0.0

    def wait_for(self, then: float) -> None:
        """Returns at that time, or at once where it is past."""
        left = then - self._now()
        if left > 0:
            self._sleep(left)


class _SlowFile(OpenFile):
    def __init__(self, path: str | Path, disk: SlowDisk) -> None:
        super().__init__(path)
        self._disk = disk
        self._coming: dict[int, tuple[int, float]] = {}
        """Bytes and time of ranges that were asked for ahead, by where they begin."""

    def at_hand(self, size: int) -> bool:
        return self._disk.bytes_per_second is None and super().at_hand(size)

    def will_need(self, offset: int, nbytes: int) -> None:
        if self._disk.bytes_per_second is None:
            super().will_need(offset, nbytes)
        elif offset not in self._coming:
            self._coming[offset] = nbytes, self._disk.ask(nbytes)

    def read(self, buffers: Sequence[Bytes], offset: int) -> int:
        if self._disk.bytes_per_second is not None:
            nbytes = sum(buffer.nbytes for buffer in buffers)
            coming = [self._coming.pop(start) for start in list(self._coming) if offset <= start < offset + nbytes]
            late = nbytes - sum(size for size, _ in coming)
            times = [then for _, then in coming] + ([self._disk.ask(late)] if late > 0 else [])
            self._disk.wait_for(max(times))
        return super().read(buffers, offset)
