"""The disk tier: block files, written whole or not at all, read straight into their destination.

Files are private to the user (0600 in 0700 folders): they contain conversations.
"""

import os
import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import LoadError
from .blocks import (
    MAX_HEADER_BYTES,
    TOKEN_IDS,
    Block,
    BlockMeta,
    Key,
    Layout,
    StoredTensor,
    block_key,
    checksum,
    encode_block,
    encode_tokens,
    parse_header,
)

_MAX_IOVECS = min(os.sysconf("SC_IOV_MAX"), 1024) if hasattr(os, "sysconf") else 1024
_TEMPORARY = ".partial"


def make_private_directory(path: Path) -> None:
    """Creates a folder that only the user can enter, and missing ones above it likewise."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


class BlockFile:
    """A block file open for reading. Stays readable when the file is deleted meanwhile; close it after use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise LoadError(f"{path}: {error.strerror}") from error
        try:
            self.layout = self._read_layout()
        except BaseException:
            self.close()
            raise

    def _read_layout(self) -> Layout:
        try:
            size = os.fstat(self._fd).st_size
            head = os.pread(self._fd, 16384, 0)
            if len(head) < 8:
                raise LoadError(f"{self.path}: the file is too short to be a block")
            (header_bytes,) = struct.unpack_from("<Q", head)
            if header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise LoadError(f"{self.path}: the header declares {header_bytes} bytes")
            end = 8 + header_bytes
            while len(head) < end:
                more = os.pread(self._fd, end - len(head), len(head))
                if not more:
                    raise LoadError(f"{self.path}: the file ends within its header")
                head += more
        except OSError as error:
            raise LoadError(f"{self.path}: {error.strerror}") from error
        self._in_page_cache = self._seems_cached(size)
        try:
            return parse_header(head[:end], size)
        except LoadError as error:
            raise LoadError(f"{self.path}: {error}") from error

    def _seems_cached(self, size: int) -> bool:
        """Whether the kernel has a few places, spread over the file, in its page cache: then asking it to read
        ahead costs more than it brings."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        place = bytearray(1)
        try:
            return all(os.preadv(self._fd, [place], size * n // 4 - 1, os.RWF_NOWAIT) == 1 for n in range(1, 5))
        except OSError:  # EAGAIN: it would have to be read; others: the file system can't tell
            return False

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> "BlockFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, wanted: Sequence[tuple[StoredTensor, Sequence[np.ndarray]]]) -> int:
        """Reads whole tensors that lie one after the other into buffers, and checks them.

        Args:
            wanted: in file order, each tensor with the contiguous uint8 buffers that together take its bytes.

        Returns:
            The bytes read.

        Raises:
            LoadError: an I/O error, the end of the file, or a checksum that is not right.
        """
        buffers = [buffer for _, parts in wanted for buffer in parts]
        offset = wanted[0][0].offset
        total = 0
        for first in range(0, len(buffers), _MAX_IOVECS):
            total += self._read_into(buffers[first : first + _MAX_IOVECS], offset + total)
        for tensor, parts in wanted:
            if checksum(parts) != tensor.checksum:
                raise LoadError(f"{self.path}: the checksum of {tensor.spec.name} is wrong")
        return total

    def _read_into(self, buffers: list[np.ndarray], offset: int) -> int:
        expected = sum(buffer.nbytes for buffer in buffers)
        done = 0
        while done < expected:
            try:
                count = os.preadv(self._fd, buffers, offset + done)  # type: ignore[arg-type]
            except OSError as error:
                raise LoadError(f"{self.path}: {error.strerror}") from error
            if count == 0:
                raise LoadError(f"{self.path}: the file ends {expected - done} bytes early")
            done += count
            if done < expected:  # seldom: a read comes in parts
                while count >= buffers[0].nbytes:
                    count -= buffers.pop(0).nbytes
                buffers[0] = buffers[0][count:]
        return done

    def tensor(self, name: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            LoadError: there is none of that name.
        """
        try:
            return self.layout.tensors[name]
        except KeyError:
            raise LoadError(f"{self.path}: there is no tensor {name}") from None

    def will_need(self, names: Iterable[str]) -> None:
        """Makes the kernel read tensors into its page cache, in the background; returns at once."""
        if self._in_page_cache or not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            stored = self.layout.tensors.get(name)
            if stored is not None:
                os.posix_fadvise(self._fd, stored.offset, stored.spec.nbytes, os.POSIX_FADV_WILLNEED)

    def read_meta(self) -> BlockMeta:
        """The block's identity with its token ids, checked against its key."""
        stored = self.layout.tensors[TOKEN_IDS]
        ids = np.empty(stored.spec.nbytes, dtype=np.uint8)
        self.read([(stored, [ids])])
        meta = replace(self.layout.meta, tokens=encode_tokens(ids.view(np.int64)))
        if block_key(meta.parent, meta.tokens) != meta.key:
            raise LoadError(f"{self.path}: the token ids are not those of the key")
        return meta


class DiskTier:
    """Block files below a store's folder. Which of them count is the index's business."""

    def __init__(self, root: Path) -> None:
        self._blocks = root / "blocks"
        self._quarantine = root / "quarantine"
        make_private_directory(self._blocks)
        make_private_directory(self._quarantine)

    def path(self, fingerprint: str, key: Key) -> Path:
        name = key.hex()
        return Path(f"{self._blocks}/{fingerprint}/{name[:2]}/{name}.safetensors")

    def open(self, fingerprint: str, key: Key) -> BlockFile:
        """Opens a block for reading; checks that the file is the block it should be.

        Raises:
            LoadError: the file is missing, damaged, or another block's.
        """
        file = BlockFile(self.path(fingerprint, key))
        meta = file.layout.meta
        if meta.key != key or meta.fingerprint != fingerprint:
            file.close()
            raise LoadError(f"{file.path}: the file holds another block ({meta.key.hex()})")
        return file

    def write(self, block: Block) -> int:
        """Writes a block's file: under a temporary name, then renamed. Returns its bytes.

        Raises:
            OSError: from the file system; nothing is left behind.
        """
        path = self.path(block.meta.fingerprint, block.meta.key)
        make_private_directory(path.parent)
        header, chunks = encode_block(block)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                total = self._write_all(fd, [memoryview(header), *(chunk.data for chunk in chunks)])
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return total

    @staticmethod
    def _write_all(fd: int, views: list[memoryview]) -> int:
        total = 0
        while views:
            count = os.writev(fd, views[:_MAX_IOVECS])
            total += count
            while views and count >= views[0].nbytes:
                count -= views.pop(0).nbytes
            if count:
                views[0] = views[0][count:]
        return total

    def delete(self, fingerprint: str, key: Key) -> None:
        self.path(fingerprint, key).unlink(missing_ok=True)

    def quarantine(self, fingerprint: str, key: Key) -> Path | None:
        """Moves a file that failed a check aside, for a person to look at. None if there is none."""
        path = self.path(fingerprint, key)
        target = self._quarantine / path.name
        try:
            os.replace(path, target)
        except OSError:
            return None
        return target

    def quarantine_bytes(self) -> int:
        return sum(entry.stat().st_size for entry in os.scandir(self._quarantine) if entry.is_file())

    def drop_quarantine(self) -> None:
        """Deletes what is in quarantine, when its room is needed."""
        for entry in os.scandir(self._quarantine):
            if entry.is_file():
                os.unlink(entry.path)

    def remove_partial(self) -> int:
        """Deletes temporary files that a killed process left behind. Returns their number."""
        found = list(self._blocks.glob(f"*/*/*{_TEMPORARY}"))
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)
