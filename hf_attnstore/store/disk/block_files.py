"""The disk tier: block files, written whole or not at all, read straight into their destination.

Files are private to the user (0600 in 0700 folders): they contain conversations.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import LoadError, NotFiniteError
from ..blocks.block import TOKEN_IDS, Block, BlockMeta, Bytes, is_finite
from ..blocks.format import MAX_HEADER_BYTES, Layout, StoredTensor, encode_block, parse_header
from ..blocks.keys import Key, block_key, encode_tokens
from ..blocks.vault import Vault
from ..records.files import make_private_directory
from .surroundings import Disk

SUFFIX = ".safetensors"


def _failed(path: str | Path, error: OSError) -> LoadError:
    """A file that is gone is gone; whatever else the system says may be otherwise the next time."""
    return LoadError(f"{path}: {error.strerror}", transient=not isinstance(error, FileNotFoundError))


class BlockFile:
    """A block file open for reading. Stays readable when the file is deleted meanwhile; close it after use."""

    def __init__(self, path: str | Path, vault: Vault, disk: Disk) -> None:
        self.path = path
        self._secret = vault.secret
        try:
            self._file = disk.open(path)
        except OSError as error:
            raise _failed(path, error) from error
        try:
            self.layout = self._read_layout()
            self._guard = vault.guard(self.layout.salt)
        except BaseException:
            self.close()
            raise

    def _read_layout(self) -> Layout:
        try:
            size = self._file.size
            head = self._file.head(16384)
            if len(head) < 8:
                raise LoadError(f"{self.path}: the file is too short to be a block")
            (header_bytes,) = struct.unpack_from("<Q", head)
            if header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise LoadError(f"{self.path}: the header declares {header_bytes} bytes")
            end = 8 + header_bytes
            while len(head) < end:
                more = self._file.head(end - len(head), len(head))
                if not more:
                    raise LoadError(f"{self.path}: the file ends within its header")
                head += more
        except OSError as error:
            raise _failed(self.path, error) from error
        self._at_hand = self._file.at_hand(size)
        try:
            return parse_header(head[:end], size)
        except LoadError as error:
            raise LoadError(f"{self.path}: {error}") from error

    @property
    def in_page_cache(self) -> bool:
        """Whether the kernel had the file in its page cache when it was opened, as far as can be told from a few
        places: then asking for it ahead of use brings nothing."""
        return self._at_hand

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "BlockFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, wanted: Sequence[tuple[StoredTensor, Sequence[Bytes]]]) -> int:
        """Reads whole tensors that lie one after the other into buffers, decrypts and checks them.

        Args:
            wanted: in file order, each tensor with the contiguous buffers that together take its bytes.

        Returns:
            The bytes read.

        Raises:
            LoadError: an I/O error, the end of the file, or a checksum that is not right. The buffers then hold
                anything.
        """
        buffers = [buffer for _, parts in wanted for buffer in parts]
        layout = self.layout
        total = self._read_into(buffers, layout.begin + wanted[0][0].offset)
        for tensor, parts in wanted:
            name = tensor.spec.name
            if not self._guard.open(layout.meta, tensor.number, tensor.spec, parts, layout.proofs[name]):
                raise LoadError(f"{self.path}: the checksum of {name} is wrong")
        return total

    def _read_into(self, buffers: list[Bytes], offset: int) -> int:
        expected = sum(buffer.nbytes for buffer in buffers)
        done = 0
        while done < expected:
            try:
                count = self._file.read(buffers, offset + done)
            except OSError as error:
                raise _failed(self.path, error) from error
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
        if self.in_page_cache:
            return
        for name in names:
            stored = self.layout.tensors.get(name)
            if stored is not None:
                self._file.will_need(self.layout.begin + stored.offset, stored.spec.nbytes)

    def read_meta(self) -> BlockMeta:
        """The block's identity with its token ids, checked against its key."""
        stored = self.layout.tensors[TOKEN_IDS]
        ids = np.empty(stored.spec.nbytes, dtype=np.uint8)
        self.read([(stored, [ids])])
        meta = replace(self.layout.meta, tokens=encode_tokens(ids.view(np.int64)))
        if block_key(meta.parent, meta.tokens, self._secret) != meta.key:
            raise LoadError(f"{self.path}: the token ids are not those of the key")
        return meta

    def verify(self) -> BlockMeta:
        """Reads all of the file and checks it. Returns the block's identity, with its token ids.

        Raises:
            LoadError: something is not as it was written.
            NotFiniteError: it is, but should not have been: there is NaN or infinity in it.
        """
        import torch

        for name, stored in self.layout.tensors.items():
            buffer = np.empty(stored.spec.nbytes, dtype=np.uint8)
            self.read([(stored, [buffer])])
            if not is_finite(torch.from_numpy(buffer).view(stored.spec.dtype)):
                raise NotFiniteError(f"{self.path}: {name} has NaN or infinity in it")
        return self.read_meta()


class DiskTier:
    """Block files below a store's folder. Which of them count is the index's business."""

    def __init__(self, root: Path, vault: Vault, disk: Disk | None = None, *, sync: bool = False) -> None:
        self._vault = vault
        self._disk = disk or Disk()
        self._sync = sync
        self.blocks = root / "blocks"
        self._partial = root / "partial"
        self._quarantine = root / "quarantine"

    def make_folders(self) -> None:
        for folder in (self.blocks, self._partial, self._quarantine):
            make_private_directory(folder)

    def path(self, fingerprint: str, key: Key) -> Path:
        return Path(self._path(fingerprint, key))

    def _path(self, fingerprint: str, key: Key) -> str:
        """As text: to make a `Path` takes as long as opening the file."""
        name = key.hex()
        return f"{self.blocks}/{fingerprint}/{name[:2]}/{name}{SUFFIX}"

    def open(self, fingerprint: str, key: Key) -> BlockFile:
        """Opens a block for reading; checks that the file is the block it should be.

        Raises:
            LoadError: the file is missing, damaged, or another block's.
        """
        file = self.open_path(self._path(fingerprint, key))
        meta = file.layout.meta
        if meta.key != key or meta.fingerprint != fingerprint:
            file.close()
            raise LoadError(f"{file.path}: the file holds another block ({meta.key.hex()})")
        return file

    def open_path(self, path: str | Path) -> BlockFile:
        """Opens whatever block a file says it is.

        Raises:
            LoadError: the file is missing or damaged.
        """
        return BlockFile(path, self._vault, self._disk)

    def write(self, block: Block) -> int:
        """Writes a block's file: under a temporary name, then renamed. Returns its bytes.

        Raises:
            OSError: from the file system; nothing is left behind.
        """
        header, chunks = encode_block(block, self._vault)
        path = self.path(block.meta.fingerprint, block.meta.key)
        return self._disk.write(path, [header, *(chunk.data for chunk in chunks)], self._partial, sync=self._sync)

    def delete(self, fingerprint: str, key: Key) -> None:
        self.path(fingerprint, key).unlink(missing_ok=True)

    def found(self) -> Iterator[tuple[str, Key, Path]]:
        """Fingerprint, key and path of every file that is named like a block."""
        for model in _subfolders(self.blocks):
            for folder in _subfolders(model):
                for path in sorted(folder.glob(f"*{SUFFIX}")):
                    try:
                        key = bytes.fromhex(path.stem)
                    except ValueError:
                        continue
                    yield model.name, key, path

    # files that failed a check

    def quarantine(self, path: Path) -> Path | None:
        """Moves a file that failed a check aside, for a person to look at. None if there is none."""
        target = self._quarantine / path.name
        try:
            os.replace(path, target)
        except OSError:
            return None
        return target

    def quarantined(self) -> list[Path]:
        try:
            return [Path(entry.path) for entry in os.scandir(self._quarantine) if entry.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def quarantine_bytes(self) -> int:
        return sum(path.lstat().st_size for path in self.quarantined())

    def drop_quarantine(self) -> None:
        """Deletes what is in quarantine, when its room is needed."""
        for path in self.quarantined():
            path.unlink(missing_ok=True)

    # files that a killed process left half written

    def partial_files(self) -> list[Path]:
        try:
            return [Path(entry.path) for entry in os.scandir(self._partial)]
        except FileNotFoundError:
            return []


def _subfolders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
