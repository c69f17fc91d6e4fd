"""Block files, written whole or not at all.

Files are private to the user (0600 in 0700 folders): they contain conversations.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import LoadError
from ..blocks.block import Block
from ..blocks.format import encode_block
from ..blocks.keys import Key
from ..blocks.stored import StoredBlock, failed
from ..blocks.vault import Vault
from ..records.files import make_private_directory
from .surroundings import Disk

SUFFIX = ".safetensors"


class BlockFiles:
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

    def open(self, fingerprint: str, key: Key) -> StoredBlock:
        """Opens a block for reading; checks that the file is the block it should be.

        Raises:
            LoadError: the file is missing, damaged, or another block's.
        """
        file = self.open_path(self._path(fingerprint, key), key)
        if file.layout.meta.fingerprint != fingerprint:
            file.close()
            raise LoadError(f"{file.path}: this is a block of another model")
        return file

    def open_path(self, path: str | Path, key: Key | None = None) -> StoredBlock:
        """Opens the block `key`, or whatever block a file says it is.

        Raises:
            LoadError: the file is missing or damaged.
        """
        try:
            ranges = self._disk.open(path)
        except OSError as error:
            raise failed(path, error) from error
        return StoredBlock(path, ranges, self._vault, key)

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
