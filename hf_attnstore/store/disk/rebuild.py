"""Making an index from the files alone, and opening a store whose index needs that."""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ...errors import LoadError, StoreFormatError, StoreIOError
from ..blocks.block import BlockMeta
from ..blocks.keys import Key, block_key
from ..eviction.victims import Order
from ..index.counts import Accounts
from ..index.database import DamagedDatabaseError
from ..index.rows import BlockRow
from ..processes.locks import StoreLock
from ..records.files import make_private_directory
from ..records.session_record import SessionRecord
from .disk_store import DAMAGED, DiskStore
from .folder import Folder
from .surroundings import Surroundings

logger = logging.getLogger("hf_attnstore")

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it, and of how much."""


def no_progress(what: str, done: int, total: int) -> None:
    """For who does not want to know."""


@dataclass
class Rebuilt:
    """What a rebuild found."""

    blocks: int = 0
    sessions: int = 0
    damaged_blocks: int = 0
    """Put into quarantine."""
    damaged_sessions: int = 0


def open_disk_store(
    folder: Folder, capacity: int, accounts: Accounts, order: Order, surroundings: Surroundings, *, sync: bool
) -> tuple[DiskStore, StoreLock]:
    """Opens what is on disk; an index that is damaged is rebuilt first, if nobody else has the store open.

    Raises:
        StoreFormatError: it is damaged and others have it open, or another machine has.
        StoreIOError: the disk would not.
    """
    opened = partial(_open, folder, capacity, accounts, order, surroundings, sync=sync)
    make_private_directory(folder.path / "locks")
    lock = StoreLock(folder.path / "locks" / "open.lock")
    try:
        marker = folder.path / DAMAGED
        with lock.exclusive() as alone:
            reason = "it was found damaged before" if marker.exists() else ""
            if not (folder.path / "index.sqlite").exists() and _has_files(folder.path):
                reason = "it is missing"
            if not (alone and reason):
                try:
                    disk = opened()
                    if alone:
                        with suppress(StoreIOError), disk.writing():  # whoever was killed may have left something
                            if _is_small(disk) and disk.index.wrong_accounts():
                                disk.index.recount()
                    return disk, lock
                except DamagedDatabaseError as error:
                    reason = str(error)
                    if not alone:
                        raise StoreFormatError(
                            f"{error}; close the other processes that use the store, then open it again: that "
                            "rebuilds the index"
                        ) from error
            logger.warning("the index of %s is rebuilt from its files: %s", folder.path, reason)
            set_index_aside(folder.path)
            disk = opened()
            found = rebuild(disk)
            logger.warning("rebuilt: %d blocks, %d sessions", found.blocks, found.sessions)
            return disk, lock
    except BaseException:
        lock.release()
        raise


def _has_files(root: Path) -> bool:
    """Whether there is something that an index should know of."""
    return any(True for name in ("blocks", "sessions") for _ in (root / name).glob("*"))


def _open(
    folder: Folder, capacity: int, accounts: Accounts, order: Order, surroundings: Surroundings, *, sync: bool
) -> DiskStore:
    disk = DiskStore(folder, capacity, accounts, order, surroundings, sync=sync)
    try:
        disk.index.usage()
        disk.index.leaves(0, 1)
        disk.index.sessions.listing("", 1)
        if _is_small(disk) and (found := disk.index.database.problems()):
            raise disk.index.database.damaged(found[0])
    except BaseException:
        disk.close()
        raise
    return disk


_SMALL_BYTES = 8 << 20


def _is_small(disk: DiskStore) -> bool:
    """Whether an index is checked whole whenever it is opened: it takes milliseconds."""
    return disk.index.database.file_bytes() < _SMALL_BYTES


def set_index_aside(root: Path) -> None:
    """Moves a damaged index into quarantine, for a person to look at."""
    make_private_directory(root / "quarantine")
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.replace(root / f"index.sqlite{suffix}", root / "quarantine" / f"index.sqlite{suffix}")


def rebuild(disk: DiskStore, progress: Progress = no_progress, *, verify: bool = False) -> Rebuilt:
    """Fills an empty index from block files and session records; only for who is alone with the store.

    Args:
        verify: read the whole of every block, instead of header and ids only. What is damaged beyond these is
            noticed when it is loaded.
    """
    found = Rebuilt()
    with disk.writing():
        readable: list[BlockMeta] = []
        files = list(disk.files.found())
        for number, (fingerprint, key, path) in enumerate(files):
            progress("blocks", number, len(files))
            meta = adopt_block(disk, fingerprint, key, path, verify=verify)
            if meta is None:
                found.damaged_blocks += 1
            else:
                readable.append(meta)
        progress("blocks", len(files), len(files))
        found.blocks = len(readable)
        records, found.damaged_sessions = read_records(disk)
        for record in grown(records, readable, disk.vault.secret):
            disk.restore(record)
        found.sessions = len(records)
        disk.index.recount()
        (disk.root / DAMAGED).unlink(missing_ok=True)
    return found


def adopt_block(disk: DiskStore, fingerprint: str, key: Key, path: Path, *, verify: bool) -> BlockMeta | None:
    """Brings a file that is on disk into the index.

    Returns:
        None if it is damaged; it is in quarantine then.

    Raises:
        StoreIOError: the disk would not; the file is as it was.
    """
    try:
        return disk.adopt(fingerprint, key, verify=verify)
    except LoadError as error:
        if error.transient:
            raise StoreIOError(str(error)) from error
        logger.warning("%s; the file is now in quarantine", error)
        disk.files.quarantine(path)
        return None


def read_block(disk: DiskStore, row: BlockRow) -> BlockMeta | None:
    """What a block is, with its ids; None if it can't be read."""
    try:
        with disk.files.open(row.fingerprint, row.key) as file:
            return file.read_meta()
    except LoadError:
        return None


def read_records(disk: DiskStore) -> tuple[list[SessionRecord], int]:
    """All session records, and the number of those that are damaged, which go into quarantine."""
    records = []
    damaged = 0
    for path in disk.records.paths():
        try:
            records.append(disk.records.read(path))
        except LoadError as error:
            if error.transient:
                raise StoreIOError(str(error)) from error
            logger.warning("%s; the file is now in quarantine", error)
            disk.files.quarantine(path)
            damaged += 1
    return records, damaged


def grown(records: Iterable[SessionRecord], blocks: Iterable[BlockMeta], secret: bytes) -> list[SessionRecord]:
    """Records whose spans name blocks that there are: a short block may have been superseded by a longer one since,
    which begins with the same tokens."""
    records = list(records)
    blocks = list(blocks)
    there = {block.key for block in blocks}
    missing = {
        (span.block, count)
        for record in records
        for span, count in zip(record.manifest.spans, record.counts, strict=True)
        if span.block and span.block not in there
    }
    counts = {count for _, count in missing}
    longer: dict[Key, BlockMeta] = {}
    for block in blocks:
        for count in counts:
            if count < block.token_count:
                longer[block_key(block.parent, block.tokens[: 4 * count], secret)] = block
    found = []
    for record in records:
        spans = record.manifest.spans
        moved = tuple(replace(s, block=longer[s.block].key) if s.block in longer else s for s in spans)
        found.append(replace(record, manifest=replace(record.manifest, spans=moved)))
    return found


def fresh_index(disk: DiskStore) -> None:
    """Sets the index aside and gives the store an empty one; only for who is alone with it."""
    disk.index.close()
    set_index_aside(disk.root)
    disk.reopen_index()
