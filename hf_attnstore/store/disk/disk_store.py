"""What is on disk: block files, session records and the index of both, under one cap.

Every change is made by somebody who holds the write lock, so that the accounts are exact when room is made, whichever
processes share the folder. What a change was about to do stands in the index before: whoever takes the lock after a
process was killed finishes what that left.
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ...errors import AttentionStoreError, LoadError, SessionNotFoundError, StoreIOError
from ...sizes import format_bytes
from ..blocks.block import Block, BlockMeta, Match
from ..blocks.format import encoded_size
from ..blocks.keys import Key, block_key, common_codes, common_prefix, prefix_codes
from ..blocks.stored import StoredBlock
from ..blocks.tier import Tier
from ..eviction.policies import Place
from ..eviction.victims import Order, VictimSearch
from ..index.blocks import Index
from ..index.counts import Accounts
from ..index.rows import BlockRow
from ..index.sessions import Keep
from ..processes.locks import WriteLock
from ..records.files import make_private_directory
from ..records.manifest import Manifest
from ..records.session_record import RecordFiles, SessionRecord
from .block_files import BlockFiles
from .folder import FILE, Folder
from .surroundings import Surroundings

logger = logging.getLogger("hf_attnstore")

DAMAGED = "index.damaged"
"""A file of that name tells the next who opens the store alone to rebuild the index."""

_UNREADABLE_SECONDS = 30.0
_SECURE_SECONDS = 15.0
_RECORD_SLACK = 4096
_LONG_LOG = 192 << 10
"""Bytes of log beyond which it was not emptied in its time."""
_LOG_ATTEMPTS = 20
_LOG_HELD_SECONDS = 1.0
_BATCH = 64
"""Blocks evicted in one transaction at most."""


class _NotAdmittedError(Exception):
    """A new block is worth less than those that would have to go for it."""


class DiskStore(Tier):
    """The part of a store that outlives the process. Safe to use from several threads and processes.

    Looking things up never raises for want of a disk: what can't be read is not there, with one warning and a count.
    """

    name = "disk"

    def __init__(
        self,
        folder: Folder,
        capacity: int,
        accounts: Accounts,
        order: Order,
        surroundings: Surroundings | None = None,
        *,
        sync: bool = False,
    ) -> None:
        surroundings = surroundings or Surroundings()
        self.root = folder.path
        self._capacity = capacity
        self.vault = folder.vault
        self.sync = sync
        self._folder = folder
        self._too_large = 0
        """Bytes of the last block for which there was no room."""
        self._accounts = accounts
        self._order = order
        self._clock = surroundings.clock
        self._log_held_until = 0.0
        self.files = BlockFiles(self.root, self.vault, surroundings.disk, sync=sync)
        self.records = RecordFiles(self.root, self.vault, sync=sync)
        self.locks_folder = self.root / "locks"
        self._make_folders()
        self._lock = WriteLock(self.locks_folder / "write.lock")
        self._depth = 0
        self._unreadable: dict[Key, float] = {}
        self.reopen_index()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def index_path(self) -> Path:
        return self.root / "index.sqlite"

    def _make_folders(self) -> None:
        make_private_directory(self.locks_folder)
        make_private_directory(self.records.folder)
        self.files.make_folders()

    def close(self) -> None:
        self.index.close()

    # the lock, and what a killed process left

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Nobody else changes what is on disk, and nothing is left half done.

        Raises:
            StoreIOError: the disk would not, then or for what is done meanwhile; or another process does not let go of
                the lock.
        """
        try:
            self._revive()
            with self._lock():
                self._depth += 1
                try:
                    if self._depth == 1:
                        self._recover()
                    yield
                finally:
                    self._depth -= 1
        except OSError as error:
            raise StoreIOError(f"{error.filename or self.root}: {error.strerror or error}") from error

    def _recover(self) -> None:
        """Finishes what was begun and not ended: nobody is in the middle of anything while this runs."""
        for path in self.files.partial_files():
            self.records.finish(path, self.index.sessions.last_used)
        pending = self.index.pending()
        if not pending:
            return
        for key, fingerprint, goes in pending:
            if self.index.block(key) is not None:
                continue  # an index that lost its log may be of two moments
            if goes or not self._finish(fingerprint, key):
                self.files.delete(fingerprint, key)
        self.index.settle([key for key, _, _ in pending])
        logger.info("finished %d files that were left half done", len(pending))

    def _finish(self, fingerprint: str, key: Key) -> bool:
        """Makes a file visible that was on its way and is whole. False if it is not, or of no use."""
        try:
            meta = self.adopt(fingerprint, key, verify=True, after=True)
        except LoadError:
            return False
        return meta is not None

    def adopt(self, fingerprint: str, key: Key, *, verify: bool, after: bool = False) -> BlockMeta | None:
        """Brings a file into the index; only for who is `writing`.

        Args:
            verify: read the whole file, instead of header and ids only.
            after: only if what it follows is in the index.

        Returns:
            None where what it follows is not there, though it should be.

        Raises:
            LoadError: it is not there, can't be read, or is damaged.
        """
        path = self.files.path(fingerprint, key)
        with self.files.open(fingerprint, key) as file:
            meta = file.verify() if verify else file.read_meta()
            size = file.layout.file_bytes
        if after and meta.start > 0 and self.index.block(meta.predecessor) is None:
            return None
        codes = prefix_codes(meta.tokens, self.vault.secret)
        self.index.add_block(meta, codes, size, Place(self._order.policy.newcomers, path.stat().st_mtime))
        return meta

    def _file_identity(self) -> tuple[int, ...]:
        settings, index = os.stat(self.root / FILE), os.stat(self.index_path)
        return settings.st_dev, settings.st_ino, settings.st_mtime_ns, index.st_ino

    def _revive(self) -> None:
        """Somebody deleted or replaced the folder, or its index: goes on with what is there now, or begins anew."""
        with suppress(FileNotFoundError):
            if self._file_identity() == self._identity:
                return
        logger.warning("the store %s was deleted or replaced: going on with what is there now", self.root)
        self._folder.make_again()
        self._make_folders()
        self.reopen_index()
        self._unreadable.clear()

    def reopen_index(self) -> None:
        """Goes on with the index that is there now. The old one is not closed: others may still read from it."""
        self.index = Index(
            self.index_path, self.vault, self._folder.identity, sync=self.sync, on_damage=self._note_damage
        )
        self._identity = self._file_identity()

    # looking up

    def _attempt(self, look: Callable[[], object], otherwise: object) -> object:
        """What `look` finds; `otherwise` where the disk would not say."""
        try:
            found = look()
        except (StoreIOError, LoadError) as error:
            self._accounts.count("read_errors")
            self._accounts.warn_once("read", f"the store {self.root} can't be read, KV is recomputed for now: {error}")
            return otherwise
        self._accounts.over("read")
        return found

    def _note_damage(self) -> None:
        """An index that proved damaged is rebuilt by the next who opens the store alone."""
        with suppress(OSError):
            (self.root / DAMAGED).touch(mode=0o600)

    def find(self, keys: Sequence[Key]) -> set[Key]:
        if not keys:  # that this succeeds says nothing of whether the index can be read
            return set()
        found = self._attempt(lambda: self.index.has(keys), set())
        assert isinstance(found, set)
        if self._unreadable:
            found -= {key for key in keys if self._is_unreadable(key)}
        return found

    def _is_unreadable(self, key: Key) -> bool:
        until = self._unreadable.get(key)
        if until is None:
            return False
        if self._clock.monotonic() > until:
            self._unreadable.pop(key, None)
            return False
        return True

    def row(self, key: Key) -> BlockRow | None:
        """A block's row; None if it is not there."""
        found = self._attempt(lambda: self.index.block(key), None)
        return found if isinstance(found, BlockRow) else None

    def rows(self, keys: Sequence[Key]) -> dict[Key, BlockRow]:
        """The rows of those of these blocks that are there."""
        if not keys:  # as in `find`
            return {}
        found = self._attempt(lambda: self.index.rows(keys), [])
        assert isinstance(found, list)
        return {row.key: row for row in found}

    def sizes(self, keys: Sequence[Key]) -> dict[Key, int]:
        """Bytes of the files of those of these blocks that are there."""
        return {key: row.bytes for key, row in self.rows(keys).items()}

    def nearest(self, parent: Key, tokens: bytes, beyond: int) -> Match | None:
        codes = prefix_codes(tokens, self.vault.secret)
        found = self._attempt(lambda: self.index.neighbours(parent, codes), [])
        assert isinstance(found, list)
        best = None
        for row, theirs in sorted(found, key=lambda item: -common_codes(item[1], codes)):
            if common_codes(theirs, codes) <= beyond or self._is_unreadable(row.key):
                continue
            described = self._describe(row.key, row.fingerprint)
            if described is not None:
                common = common_prefix(described[1], tokens)
                if common > beyond:
                    best, beyond = Match(row.key, common, row.count), common
        return best

    def follower(self, parent: Key, block_size: int) -> Key | None:
        found = self._attempt(partial(self.index.before, parent, b"\xff" * (block_size + 1)), (None, b""))
        assert isinstance(found, tuple)
        return found[0].key if found[0] is not None else None

    def followed(self, parents: Sequence[Key]) -> set[Key]:
        found = self._attempt(lambda: self.index.followed(parents), set())
        assert isinstance(found, set)
        return found

    def longest_beginning(self, parent: Key, tokens: bytes) -> tuple[Key, int] | None:
        codes = prefix_codes(tokens, self.vault.secret)
        limit = codes
        while limit:
            found = self._attempt(partial(self.index.before, parent, limit), (None, b""))
            assert isinstance(found, tuple)
            row, theirs = found
            if row is None:
                return None
            common = common_codes(theirs, codes)
            name = block_key(parent, tokens[: 4 * row.count], self.vault.secret)
            if row.key == name and not self._is_unreadable(row.key):  # the name says that the ids are the same
                return row.key, row.count
            limit = theirs[: min(common, len(theirs) - 1)]
        return None

    def describe(self, key: Key, fingerprint: str = "") -> tuple[int, bytes] | None:
        row = self.row(key)
        if row is None or fingerprint not in ("", row.fingerprint):
            return None
        return self._describe(key, row.fingerprint)

    def _describe(self, key: Key, fingerprint: str) -> tuple[int, bytes] | None:
        try:
            with self.files.open(fingerprint, key) as file:
                meta = file.read_meta()
        except LoadError as error:
            self.failed(key, error)
            return None
        except Exception as error:
            self.failed(key, LoadError(f"reading block {key.hex()} failed: {error!r}", transient=True))
            return None
        return meta.start, meta.tokens

    def sources(self, keys: Sequence[Key]) -> Mapping[Key, Callable[[], StoredBlock]]:
        return {key: partial(self.files.open, row.fingerprint, key) for key, row in self.rows(keys).items()}

    def failed(self, key: Key, error: LoadError) -> None:
        """A block could not be read. One that failed a check is put aside, so that it is recomputed and never read
        again; where the disk failed it is left alone for a while."""
        if error.transient:
            self._unreadable[key] = self._clock.monotonic() + _UNREADABLE_SECONDS
            self._accounts.count("read_errors")
            self._accounts.warn_once("unreadable", f"a stored block can't be read now, it is recomputed: {error}")
            return
        row = self.row(key)
        if row is None:
            return
        self._accounts.count("rejected")
        where = ""
        try:
            with self.writing():
                self.index.remove_blocks([row])
                aside = self.files.quarantine(self.files.path(row.fingerprint, key))
                self.index.settle([key])
            where = f"; the file is now {aside}" if aside else ""
        except (AttentionStoreError, OSError) as problem:
            self._unreadable[key] = float("inf")
            where = f"; it could not be put aside ({problem})"
        logger.warning("a stored block can't be used and will be recomputed: %s%s", error, where)

    # blocks

    def put(self, block: Block, supersedes: Key | None = None, *, wanted: bool = False) -> bool:
        """Writes a block, unless it is there. False where the cap, the policy, or a missing beginning keeps it out.

        Args:
            wanted: somebody asked for this very block, and the policy has no say.

        Raises:
            StoreIOError: the disk would not; nothing is left behind that does not get removed.
        """
        meta = block.meta
        with self.writing():
            if self.index.block(meta.key) is not None:
                return True
            if meta.start > 0 and self.index.block(meta.predecessor) is None:
                return False  # its beginning did not make it to disk: alone it is worth nothing
            expected = encoded_size(block)
            place = self._order.policy.place(None, self._order.policy.newcomers, self._clock.time())
            try:
                found_room = self.make_room(expected, {meta.predecessor}, None if wanted else place)
            except _NotAdmittedError:
                self._accounts.count("not_admitted_blocks")
                return False
            if not found_room:
                if self.capacity:
                    self._too_large = expected
                    cap = format_bytes(self.capacity)
                    self._accounts.warn_once(
                        "full", f"the store {self.root} is full, new KV is not kept on disk (cap {cap})"
                    )
                return False
            began = time.perf_counter()
            codes = prefix_codes(meta.tokens, self.vault.secret)
            self.index.begin_write(meta.key, meta.fingerprint, expected)
            try:
                written = self.files.write(block)
                old = self.index.add_block(meta, codes, written, place, supersedes)
            except BaseException:
                with suppress(OSError):
                    self.files.delete(meta.fingerprint, meta.key)
                    self.index.settle([meta.key])
                raise
            self._unreadable.pop(meta.key, None)
            self._accounts.count("written_bytes", written)
            self._accounts.count("write_microseconds", round((time.perf_counter() - began) * 1e6))
            if old is not None:
                self._remove_files([old])
            return True

    def _remove_files(self, rows: Sequence[BlockRow]) -> None:
        for row in rows:
            self.files.delete(row.fingerprint, row.key)
        self.index.settle([row.key for row in rows])

    def remove(self, rows: Sequence[BlockRow], forget: Callable[[Key], None]) -> None:
        """Removes blocks; only for who is `writing`. `forget` is called with their keys."""
        self.index.remove_blocks(rows)
        for row in rows:
            forget(row.key)
        self._remove_files(rows)

    def delete(self, keys: Sequence[Key]) -> None:
        if not keys:
            return
        with self.writing():
            rows = list(self.rows(keys).values())
            self.index.remove_blocks(rows)
            self._remove_files(rows)

    def let_go(self, namespace: str, session: str | None, keys: Sequence[Key]) -> set[Key]:
        """A session, if it is one, needs these blocks no more: deletes those that no other has, and that nothing comes
        after. Returns the others.

        Raises:
            StoreIOError: the disk would not.
        """
        there = self.find(keys)
        if not there:
            return set()
        with self.writing():
            gone = self.index.let_go(namespace, session, sorted(there))
            self._remove_files(gone)
        return there - {row.key for row in gone}

    @property
    def used(self) -> int:
        """Bytes of everything in the folder."""
        return self.index.usage().total + self.index.database.file_bytes() + self.files.quarantine_bytes()

    def make_room(self, nbytes: int, keep: Collection[Key] = (), newcomer: Place | None = None) -> bool:
        """Evicts until `nbytes` more fit under the cap; only for who is `writing`.

        Args:
            keep: keys of blocks that stay.
            newcomer: where the block will stand for which this is, if that may be refused (`Policy.admits`).

        Raises:
            _NotAdmittedError: it is.
        """
        # what the index may grow by before this is asked again: by a commit, mostly in its log
        margin = min(max(self.capacity // 64, 192 << 10), 16 << 20)
        if nbytes + margin > self.capacity:
            return False

        def excess() -> int:
            return self.used + nbytes + margin - self.capacity

        if excess() > 0:
            self._empty_log()
            self.files.drop_quarantine()
        while (over := excess()) > 0:
            # evicting makes the log longer: where another process keeps it from being emptied, that would go on until
            # nothing is left, and for nothing
            if self.index.database.log_bytes() > _LONG_LOG and not self._empty_log():
                return False
            now = self._clock.time()
            search = VictimSearch(self.index, self._order, now, keep, newcomer)
            chosen: list[BlockRow] = []
            while over > 0 and len(chosen) < _BATCH and (row := search.next()) is not None:
                chosen.append(row)
                over -= row.bytes
            if not chosen:
                if search.refused:
                    raise _NotAdmittedError
                return False
            self.index.remove_blocks(chosen, self._order.policy)
            self._remove_files(chosen)
            self._accounts.count("evicted_blocks", len(chosen))
        if nbytes >= self._too_large:  # that something small fits says nothing
            self._accounts.over("full")
        return True

    def _make_room_for_record(self, nbytes: int) -> None:
        """Raises:
        StoreIOError: there is no room under the cap, and none could be made.
        """
        if not self.make_room(nbytes):
            raise StoreIOError(
                f"the store {self.root} is full (cap {format_bytes(self.capacity)}), the session is not saved: give it "
                "a larger cap (`disk=`), or delete sessions"
            )

    def _empty_log(self) -> bool:
        """Moves the index's log into the index. False where other processes keep it from that for a while: one that
        has kept it from that just now is not waited for with every block."""
        for attempt in range(1 if self._clock.monotonic() < self._log_held_until else _LOG_ATTEMPTS):
            if attempt:
                time.sleep(0.01)
            if self.index.database.truncate_log():
                return True
        self._log_held_until = self._clock.monotonic() + _LOG_HELD_SECONDS
        return False

    # sessions

    @contextmanager
    def _changing(self, namespace: str, session: str) -> Iterator[Keep]:
        """For a change of a session that is committed to the index meanwhile: its record takes the old one's place
        afterwards. Nothing of it for a store that keeps nothing on disk."""
        if not self.capacity:
            yield lambda record: 0
            return
        try:
            yield self.records.stage
        except BaseException:
            with suppress(OSError):
                self.records.drop(namespace, session)
            raise
        self.records.publish(namespace, session)

    def restore(self, record: SessionRecord) -> None:
        """Puts a session in, or back, as its record says; only for who is `writing`."""
        with self._changing(record.namespace, record.name) as keep:
            self.index.sessions.restore(record, keep)

    def take_in(self, record: SessionRecord) -> None:
        """Puts a session in as another machine left it, as far as its blocks are here. Raises what `commit` does."""
        with self.writing():
            if self.capacity:
                self._make_room_for_record(_RECORD_SLACK + 160 * len(record.manifest.spans) + 4 * len(record.metadata))
            self.restore(record)

    def commit(self, namespace: str, session: str, fingerprint: str, manifest: Manifest) -> None:
        """Sets what a session consists of.

        Raises:
            StoreIOError: the disk would not; the session is as it was.
        """
        with self.writing():
            if self.capacity:
                ids = sum(len(span.dropped) for span in manifest.spans)
                self._make_room_for_record(_RECORD_SLACK + 160 * len(manifest.spans) + 3 * ids)
            with self._changing(namespace, session) as keep:
                self.index.sessions.commit(namespace, session, fingerprint, manifest, keep)

    def set_metadata(self, namespace: str, session: str, metadata: str) -> None:
        """`metadata` is JSON. See `commit` for what it raises."""
        with self.writing():
            if self.capacity:
                self._make_room_for_record(_RECORD_SLACK + 4 * len(metadata))
            with self._changing(namespace, session) as keep:
                self.index.sessions.set_metadata(namespace, session, metadata, keep)

    def fork(self, namespace: str, source: str, target: str) -> bool:
        """Makes session `target` with all that `source` has. False if `target` exists already."""
        with self.writing():
            if self.capacity:
                self._make_room_for_record(_RECORD_SLACK + self._record_bytes(namespace, source))
            if self.index.sessions.exists(namespace, target):
                return False
            with self._changing(namespace, target) as keep:
                self.index.sessions.copy(namespace, source, target, keep)
            return True

    def rename(self, namespace: str, source: str, target: str) -> bool:
        """Gives a session another name. False if there is one of that name already."""
        with self.writing():
            if self.index.sessions.exists(namespace, target):
                return False
            self.index.sessions.find(namespace, source)
            marker = self.records.mark(namespace, source)
            with self._changing(namespace, target) as keep:
                self.index.sessions.rename(namespace, source, target, keep)
            self.records.delete(namespace, source)
            marker.unlink()
            return True

    def _record_bytes(self, namespace: str, session: str) -> int:
        with suppress(FileNotFoundError):
            return self.records.path(namespace, session).stat().st_size
        return 0

    def delete_session(
        self, namespace: str, session: str, forget: Callable[[Key], None], *, secure: bool
    ) -> Sequence[BlockRow]:
        """Deletes a session and the blocks that only it used; `forget` is called with their keys.

        Returns:
            These blocks.

        Raises:
            SessionNotFoundError: there is no such session.
            StoreIOError: the disk would not; with `secure`, also where another process's reading kept old pages alive.
        """
        with self.writing():
            self.index.sessions.find(namespace, session)
            marker = self.records.mark(namespace, session)
            gone = self.index.delete_session(namespace, session)
            self.records.delete(namespace, session)
            marker.unlink()
            for row in gone:
                forget(row.key)
            self._remove_files(gone)
            if secure:
                self.files.drop_quarantine()
                self._truncate_log()
            return gone

    def _truncate_log(self) -> None:
        deadline = time.monotonic() + _SECURE_SECONDS
        while not self.index.database.truncate_log():
            if time.monotonic() > deadline:
                raise StoreIOError(
                    "the session is deleted, but another process's reading kept old pages of the index's log alive: "
                    "run `attnstore gc` when it is done"
                )
            time.sleep(0.02)

    def manifest(self, namespace: str, session: str) -> Manifest | None:
        """What a session consists of; None if there is none, or nothing that can be read."""

        def look() -> Manifest | None:
            try:
                return self.index.sessions.manifest(namespace, session)
            except SessionNotFoundError:
                return None

        found = self._attempt(look, None)
        return found if isinstance(found, Manifest) else None

    def session_with(self, namespace: str, key: Key) -> str | None:
        """The session used last of those that have a block; None if none has it, or the disk would not say."""
        found = self._attempt(partial(self.index.sessions.with_block, namespace, key), None)
        return found if isinstance(found, str) else None

    def fingerprint(self, namespace: str, session: str) -> str | None:
        """The model fingerprint that a session was last saved with; None if it is not known."""
        found = self._attempt(partial(self.index.sessions.fingerprint, namespace, session), None)
        return found if isinstance(found, str) else None

    def touch(self, keys: Sequence[Key]) -> None:
        policy, now = self._order.policy, self._clock.time()
        self.move({key: policy.place(row.place, row.group, now) for key, row in self.rows(keys).items()})

    def move(self, places: Mapping[Key, Place]) -> None:
        """Sets where blocks stand in the order of eviction.

        Raises:
            StoreIOError: the disk would not.
        """
        self.index.move(places)

    def note(self, fingerprint: str) -> str | None:
        """What was kept of a model."""
        found = self._attempt(partial(self.index.note, fingerprint), None)
        return found if isinstance(found, str) else None
