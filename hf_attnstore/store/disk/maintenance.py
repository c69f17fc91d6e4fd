"""Looking after what is on disk: checking all of it, setting it right, removing what nobody needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import AttentionStoreError, LoadError, SessionNotFoundError, StoreIOError
from ..blocks.keys import Key
from ..eviction.victims import Order
from ..index.counts import Accounts
from ..index.database import DamagedDatabaseError
from ..index.rows import BlockRow
from ..processes.locks import SessionLocks, StoreLock
from ..processes.parts import whole_name
from ..records.files import make_private_directory
from .disk_store import DAMAGED, DiskStore
from .folder import Folder
from .rebuild import (
    Progress,
    adopt_block,
    fresh_index,
    grown,
    no_progress,
    read_block,
    read_records,
    rebuild,
    set_index_aside,
)

ProblemKind = Literal[
    "index", "accounts", "missing block", "damaged block", "unknown file", "damaged session", "unreadable", "unfinished"
]


_LOST = ("damaged block", "missing block")


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    kind: ProblemKind
    where: str
    detail: str


@dataclass(frozen=True)
class Affected:
    """A session some of whose KV is damaged or gone; its messages and token ids are not in blocks."""

    namespace: str
    name: str
    whole: int
    """Tokens, from the beginning, whose KV is whole; those after them are computed again by the next turn."""
    tokens: int


@dataclass
class Report:
    """What a check found."""

    blocks: int = 0
    bytes: int = 0
    sessions: int = 0
    problems: list[Problem] = field(default_factory=list)
    affected: list[Affected] = field(default_factory=list)
    """The sessions that the damaged and missing blocks belong to."""
    repaired: bool = False
    """Whether the problems are no more."""

    def add(self, kind: ProblemKind, where: object, detail: object) -> None:
        self.problems.append(Problem(kind, str(where), str(detail)))


def verify(disk: DiskStore, progress: Progress = no_progress) -> Report:
    """Reads everything and changes nothing. Others may use the store meanwhile."""
    report = Report()
    for problem in disk.index.problems():
        report.add("index", disk.index_path, problem)
    if report.problems:
        return report  # what a damaged index says of the rest means nothing
    usage = disk.index.usage()
    bad: set[Key] = set()
    for row in disk.index.blocks():
        progress("blocks", report.blocks, usage.blocks)
        found = _check_block(disk, row)
        if found is not None and disk.index.block(row.key) is not None:  # and not just evicted by another process
            report.problems.append(found)
            if found.kind in _LOST:
                bad.add(row.key)
        report.blocks += 1
        report.bytes += row.bytes
    progress("blocks", usage.blocks, usage.blocks)
    for path in unknown_files(disk):
        with disk.writing():
            unknown = _still_unknown(disk, path)
        if unknown:
            about = "no block or session of the index; `gc` deletes it, `repair` brings it back"
            report.add("unknown file", path, about)
    for namespace, name in disk.index.sessions.all_names():
        found = _check_session(disk, namespace, name)
        if found is not None:
            with disk.writing():  # it may have been in the middle of a change
                found = _check_session(disk, namespace, name)
        if found is not None:
            report.problems.append(found)
        report.sessions += 1
    report.affected = _affected(disk, bad) if bad else []
    if disk.index.wrong_accounts():
        report.add("accounts", disk.index_path, "the sums of bytes or the numbers of followers are wrong")
    return report


def _affected(disk: DiskStore, bad: set[Key]) -> list[Affected]:
    """Sessions with blocks that can't be used, and what comes before the first of those."""
    found = []
    for namespace, name in disk.index.sessions.all_names():
        with suppress(SessionNotFoundError):  # deleted meanwhile
            spans = disk.index.sessions.manifest(namespace, name).spans
            lengths = [span.stop - span.start if span.block else 0 for span in spans]
            first = next((number for number, span in enumerate(spans) if span.block in bad), None)
            if first is not None:
                found.append(Affected(namespace, whole_name(name), sum(lengths[:first]), sum(lengths)))
    return found


def _check_block(disk: DiskStore, row: BlockRow) -> Problem | None:
    path = disk.files.path(row.fingerprint, row.key)
    try:
        with disk.files.open(row.fingerprint, row.key) as file:
            file.verify()
            if file.layout.file_bytes != row.bytes:
                return Problem("accounts", str(path), f"{file.layout.file_bytes} bytes, the index says {row.bytes}")
    except LoadError as error:
        if error.transient:
            return Problem("unreadable", str(path), str(error))
        return Problem("damaged block" if path.exists() else "missing block", str(path), str(error))
    return None


def _check_session(disk: DiskStore, namespace: str, name: str) -> Problem | None:
    path = disk.records.path(namespace, name)
    try:
        disk.index.sessions.record(namespace, name)
        disk.records.read(path)
    except SessionNotFoundError:
        return None
    except (LoadError, StoreIOError) as error:
        return Problem("damaged session", str(path), str(error))
    return None


def unknown_files(disk: DiskStore) -> Iterator[Path]:
    """Files in the places of blocks and sessions that the index does not know. Others may be about to write them, or
    to delete them: who acts on it looks again, `writing`."""
    some: list[tuple[Key, Path]] = []
    for _, key, path in disk.files.found():
        some.append((key, path))
        if len(some) == 500:
            yield from _unknown(disk, some)
            some = []
    yield from _unknown(disk, some)
    known = {disk.records.path(*names) for names in disk.index.sessions.all_names()}
    yield from (path for path in disk.records.paths() if path not in known)


def _unknown(disk: DiskStore, some: list[tuple[Key, Path]]) -> Iterator[Path]:
    known = disk.index.has([key for key, _ in some]) | {key for key, _, _ in disk.index.pending()}
    yield from (path for key, path in some if key not in known)


@contextmanager
def alone_with(folder: Folder) -> Iterator[tuple[DiskStore, bool]]:
    """Opens a store that nobody else has open, whatever state its index is in.

    Yields:
        The store, and whether its index was damaged: then that is in quarantine, and the store has an empty one.

    Raises:
        AttentionStoreError: somebody else has the store open.
    """
    make_private_directory(folder.path / "locks")
    lock = StoreLock(folder.path / "locks" / "open.lock")
    try:
        with lock.exclusive() as alone:
            if not alone:
                raise AttentionStoreError(
                    f"the store {folder.path} is in use; close the other processes that use it first"
                )
            damaged = (folder.path / DAMAGED).exists()
            try:
                disk = DiskStore(folder, 1 << 62, Accounts(), Order())
                damaged = damaged or bool(disk.index.problems())
            except DamagedDatabaseError:
                set_index_aside(folder.path)
                disk = DiskStore(folder, 1 << 62, Accounts(), Order())
                damaged = True
            try:
                if damaged:
                    fresh_index(disk)
                yield disk, damaged
            finally:
                disk.close()
    finally:
        lock.release()


def repair(folder: Folder, progress: Progress = no_progress, *, dry_run: bool = False) -> Report:
    """Sets everything right that `verify` finds wrong: blocks that are damaged go into quarantine, files that the
    index does not know are brought back if they are whole, from quarantine too, and a damaged index is made anew.

    Raises:
        AttentionStoreError: somebody else has the store open.
    """
    if dry_run:
        with _opened(folder) as disk:
            return verify(disk, progress)
    with alone_with(folder) as (disk, damaged):
        report = Report()
        if not damaged:
            try:
                report = verify(disk, progress)
                _remove_bad(disk, report)
                _put_back(disk)
                _reconcile(disk)
            except (DamagedDatabaseError, TypeError, ValueError):  # it is worse than it looked
                fresh_index(disk)
                report, damaged = Report(), True
        if damaged:
            report.add("index", disk.index_path, "damaged: made anew from the files, the old one is in quarantine")
            _put_back(disk)
            _rebuild(disk, report, progress)
        (disk.root / DAMAGED).unlink(missing_ok=True)
        report.repaired = True
    return report


def _rebuild(disk: DiskStore, report: Report, progress: Progress) -> None:
    found = rebuild(disk, progress, verify=True)
    report.blocks, report.sessions = found.blocks, found.sessions
    report.bytes = disk.index.usage().bytes
    for number, what in ((found.damaged_blocks, "blocks"), (found.damaged_sessions, "session records")):
        if number:
            report.add("damaged block", disk.root / "quarantine", f"{number} {what} are damaged")


@contextmanager
def _opened(folder: Folder) -> Iterator[DiskStore]:
    disk = DiskStore(folder, 1 << 62, Accounts(), Order())
    try:
        yield disk
    finally:
        disk.close()


def _remove_bad(disk: DiskStore, report: Report) -> None:
    """Takes the rows of bad blocks away, and puts their files aside; corrects sizes."""
    bad = {problem.where for problem in report.problems if problem.kind in _LOST}
    miscounted = {problem.where for problem in report.problems if problem.kind == "accounts"}
    with disk.writing():
        for row in list(disk.index.blocks()) if bad or miscounted else []:
            path = disk.files.path(row.fingerprint, row.key)
            if str(path) in miscounted:
                disk.index.correct(row.key, path.stat().st_size)
            if str(path) in bad:
                disk.index.remove_blocks([row])
                disk.files.quarantine(path)
                disk.index.settle([row.key])


def _put_back(disk: DiskStore) -> None:
    """Files in quarantine that are whole after all (a disk may fail and come back) go where they belong."""
    for path in disk.files.quarantined():
        if path.suffix != ".safetensors":
            continue
        try:
            with disk.files.open_path(path) as file:
                meta = file.verify()
        except LoadError:
            continue
        target = disk.files.path(meta.fingerprint, meta.key)
        if not target.exists():
            make_private_directory(target.parent)
            path.rename(target)


def _reconcile(disk: DiskStore) -> None:
    """Files that the index does not know are brought in; sessions get records again; sums are made right."""
    with disk.writing():
        known = {row.key for row in disk.index.blocks()}
        for fingerprint, key, path in disk.files.found():
            if key not in known:
                adopt_block(disk, fingerprint, key, path, verify=True)
        there = {names: disk.index.sessions.record(*names) for names in disk.index.sessions.all_names()}
        newer = dict(there)
        for record in read_records(disk)[0]:
            found = there.get((record.namespace, record.name))
            # an index that lost its log is behind; one that lost a block has dropped what comes after
            if found is None or record.last_used >= found.last_used:
                newer[record.namespace, record.name] = record
        blocks = [meta for row in disk.index.blocks() if (meta := read_block(disk, row)) is not None]
        for record in grown(newer.values(), blocks, disk.vault.secret):
            disk.restore(record)
        disk.index.recount()


@dataclass
class Garbage:
    """What `collect` removed, or would."""

    sessions: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    unowned_blocks: int = 0
    bytes: int = 0
    notes: int = 0
    """On models of which nothing is in the store."""


def collect(
    disk: DiskStore,
    locks: SessionLocks,
    open_lock: StoreLock,
    *,
    unowned: bool = False,
    dry_run: bool = False,
    forget: Callable[[Key], None] = lambda key: None,
    progress: Progress = no_progress,
) -> Garbage:
    """Removes what nobody needs: files that the index does not know, the quarantine, lock files, and the index's free
    room.

    Args:
        unowned: also blocks that belong to no session.
        dry_run: only say what would go.
    """
    found = Garbage()
    with disk.writing():
        found.files += disk.files.quarantined()
    unknown = list(unknown_files(disk))
    for number, path in enumerate(unknown):
        progress("files", number, len(unknown))
        with disk.writing():
            if _still_unknown(disk, path):
                found.files.append(path)
                found.bytes += path.stat().st_size
                if not dry_run:
                    path.unlink()
    found.bytes += sum(path.stat().st_size for path in disk.files.quarantined())
    if unowned:
        with disk.writing():
            rows = disk.index.unowned()
            found.unowned_blocks = len(rows)
            found.bytes += sum(row.bytes for row in rows)
            if not dry_run:
                disk.remove(rows, forget)
    found.notes = len(unused := disk.index.unused_notes())
    if not dry_run:
        with disk.writing():
            disk.index.drop_notes(unused)
            disk.files.drop_quarantine()
            disk.index.recount()
            disk.index.database.compact()
            disk.index.database.truncate_log()
        with open_lock.exclusive() as alone:
            if alone:
                locks.remove_unused()
    return found


def _still_unknown(disk: DiskStore, path: Path) -> bool:
    if not path.exists():
        return False
    if path.suffix != disk.records.suffix:
        return bool(list(_unknown(disk, [(bytes.fromhex(path.stem), path)])))
    try:
        record = disk.records.read(path)
    except LoadError:
        return True
    return not disk.index.sessions.exists(record.namespace, record.name)
