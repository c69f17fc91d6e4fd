"""AttentionStore: blocks by key in memory and on disk, and the sessions made of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    AttentionStoreError,
    LoadError,
    SessionBusyError,
    SessionNotFoundError,
    SharedTierError,
    StoreClosedError,
)
from .blocks.codecs import known_codecs
from .blocks.keys import APART, Key, chain_root, decode_tokens
from .blocks.vault import parse_key
from .disk.folder import open_folder
from .disk.maintenance import Garbage, Report, collect, repair, verify
from .disk.rebuild import Progress, no_progress
from .opened import default_path
from .processes.locks import SessionLock
from .processes.parts import MOST, is_part, part_name
from .records.manifest import Manifest, SessionInfo
from .upcoming import UpcomingTurns

if TYPE_CHECKING:
    from .disk.portable import Exported
    from .shared.tier import SharedTier
    from .shared.upkeep import Upkeep

logger = logging.getLogger("hf_attnstore")


def repair_store(
    path: str | os.PathLike[str] | None = None,
    *,
    encryption_key: str | bytes | None = None,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Sets everything right that `AttentionStore.verify` finds wrong in a store that nobody has open.

    Damaged blocks go into quarantine, whole files that the index does not know are brought back, and a damaged index
    is made anew from the files.

    Args:
        dry_run: only say what is wrong.

    Raises:
        AttentionStoreError: there is no store, or somebody has it open.
    """
    where = Path(path).expanduser() if path is not None else default_path()
    key = parse_key(encryption_key)
    return repair(open_folder(where, None, key, create=False), progress, dry_run=dry_run)


class AttentionStore(UpcomingTurns):
    """Keeps the KV of conversations in memory and on disk.

    Args:
        path: the folder; created if missing. Default: the setting `store`, else `$HF_HOME/attnstore`. This and what
            else has no default of its own here is set by the environment or a file: see `attnstore config`.
        memory: bytes of host memory for blocks, those being written included; an int, or a string like "2GiB", which
            is the default. "auto" follows what is free: it shrinks when other programs need memory, and grows back.
        disk: bytes on disk, index included, 50 GiB if not said; 0 keeps blocks in memory only.
        on_device: bytes of KV that stay where they were computed, between two turns of a session, for the sessions
            used last: of all devices together, the buffers' spare room included. 0 keeps none. "auto", the default: for
            models that compute on the CPU, a quarter of `memory` beside it, 512 MiB at most.
        block_size: tokens per block, 256 if not said. A store keeps the size it was made with.
        namespace: blocks and sessions of different namespaces never meet: one for each user, for instance.
        io_threads: threads that read; default by the number of cores.
        durability: what a saved turn survives. "process", the default: the end of the process, however it comes;
            after a loss of power what had not reached the disk by itself is noticed and recomputed. "power": a loss of
            power too; every file is fsynced, and so is the index with every turn.
        policy: what goes first where there is no room: `predictive`, the default (what is least likely to be used
            again, as learned while running), `lru` (what was used least recently), `fifo` or `hyperbolic`.
        older_than: days without a turn after which a session is deleted, in all namespaces; looked at when the store is
            opened and once an hour while it is used. By default never.
        encryption_key: 32 bytes, or a text of them in hex or base64, under which files are encrypted (AES-256-GCM).
            Default: the environment variable `ATTNSTORE_KEY`. A store is encrypted from its beginning or not at all.
        surroundings: the clock and the disk to go by, where they are not to be the machine's own.
        codec: how blocks are written: `raw`, `lossless`, or with loss `fp16`, `int8`, `int8z`, `int4`.
            What one codec wrote a store with another does not find.
        disk_codec, shared_codec: `lossless` for one tier alone, where `codec` is `raw`. What is found does not depend
            on them: they may change at any time, and differ between machines that share.
        windows_every: for models with sliding layers: what these have of blocks that have left their window is let go,
            but for what is needed to go on at the end and at every so many tokens (0: at the end only). Who goes back
            to a place between computes from the last such point. By default everything is kept.
        below: tiers below the disk, in the order in which they are asked.
        shared: the URL of an engine below all of them that other machines use too, such as
            "valkey://host:6379/0?prefix=team"; see docs/shared.md. Default: the environment variable
            `ATTNSTORE_SHARED`; "" for none.

    Raises:
        AttentionStoreError: a size or another argument that is none.
        SharedTierError: the URL of a shared tier can't be read. Whether its engine answers is found out later.
        StoreFormatError: the folder holds something else, or a store of another format or block size.
        EncryptionKeyError: the store's key is missing or wrong.

    Safe to use from several threads, and several processes of one machine may share a folder. Use it as a context
    manager, or `close()` it; what was handed over is then on disk. A process that ends in the ordinary way closes its
    stores.
    """

    # sessions

    def _parts(self, name: str) -> list[int]:
        """The numbers of a session's parts, where several processes keep one each; at least the first."""
        there = self._disk.index.sessions.existing(self.namespace, [part_name(name, n) for n in range(MOST)])
        return [n for n in range(MOST) if part_name(name, n) in there] or [0]

    def sessions(self, limit: int | None = None, offset: int = 0) -> list[SessionInfo]:
        """The sessions of this namespace, last used first: all, or a page of them."""
        self._settle()
        self._learn_all()
        return self._disk.index.sessions.listing(self.namespace, limit, offset)

    def session(self, name: str) -> SessionInfo:
        """One session.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._settle()
        self._learn((self.namespace, name))
        return self._disk.index.sessions.info(self.namespace, name)

    def bytes_together(self, *names: str) -> int:
        """Bytes on disk of all blocks of these sessions, or of all of the namespace, a block that several of them share
        counted once.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._settle()
        return self._disk.index.sessions.bytes_together(self.namespace, names)

    def bytes_only_in(self, *names: str) -> int:
        """Bytes on disk that deleting these sessions together sets free: what others share stays.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._settle()
        parts = [part_name(name, number) for name in names for number in self._parts(name)]
        return self._disk.index.sessions.bytes_only_in(self.namespace, parts)

    def namespaces(self) -> list[str]:
        """The namespaces that have sessions, in order; the empty one is that of who says none."""
        self._settle()
        return sorted({namespace for namespace, _ in self._disk.index.sessions.all_names()})

    def session_count(self) -> int:
        """How many sessions this namespace has."""
        self._settle()
        self._learn_all()
        return self._disk.index.sessions.number(self.namespace)

    def delete(self, name: str, *, secure: bool = False) -> None:
        """Deletes a session and every block that no other session uses. In a shared tier blocks stay: sessions of
        other machines may use them.

        Args:
            secure: return only when nothing of it is in any file of the store: not in the index's free pages or its
                log, and not in quarantine, which is emptied for that. Blocks that other sessions use too stay; what
                goes here is removed from a shared tier, too, where another machine may have to compute it again.

        Raises:
            SessionNotFoundError: there is no such session.
            SessionBusyError: a turn is running on it.
            StoreIOError: the disk would not.
            SharedTierError: it is deleted here, but a shared tier did not say that it is there.
        """
        self._check_open()
        locks = [self.lock_session(name, wait=0)]
        try:
            self._writer.drain()
            self._learn((self.namespace, name))
            parts = [part_name(name, number) for number in self._parts(name)]
            locks += [self.lock_session(part, wait=0) for part in parts if part != name]
            gone = [
                (row.parent, row.key)
                for part in reversed(parts)
                for row in self._disk.delete_session(self.namespace, part, self._forget, secure=secure)
            ]
            self._whole_manifests.pop((self.namespace, name), None)
            self._publish((self.namespace, name))
            if secure and self._shared is not None:
                self._shared.delete_now(gone)
        finally:
            self.device_tier.forget(name, self.namespace)
            for lock in locks:
                lock.release()

    def clear_namespace(self) -> int:
        """Deletes all sessions of this namespace, and what is kept in it by content alone, by this store's codec. Of
        what tiers below the disk have, only the blocks that are on disk too.

        Returns:
            The number of sessions.

        Raises:
            SessionBusyError: a turn is running on one of them; others may be gone already.
            StoreIOError: the disk would not.
        """
        names = [info.name for info in self.sessions()]
        for name in names:
            self.delete(name)
        self.device_tier.forget_unnamed()
        with self._disk.writing():
            for fingerprint in self._disk.index.fingerprints():
                for each in (self, self.with_windows_apart()):
                    self._disk.remove(self._disk.index.under(each.root(fingerprint)), self._forget)
        return len(names)

    def fork(self, src: str, dst: str) -> None:
        """Makes session `dst` with all that `src` has. No KV is copied: both use the same blocks.

        Raises:
            SessionNotFoundError: there is no session `src`.
            AttentionStoreError: `dst` exists already.
            StoreIOError: the disk would not.
        """
        self.check_name(dst)
        self._settle()
        for name in (src, dst):
            self._learn((self.namespace, name))
        pairs = [(part_name(src, number), part_name(dst, number)) for number in self._parts(src)]
        if not all(self._disk.fork(self.namespace, *pair) for pair in pairs):
            raise AttentionStoreError(f"session {dst!r} exists already; delete it first or choose another name")
        self._named_anew(src, dst)

    def rename(self, src: str, dst: str) -> None:
        """Gives session `src` the name `dst`.

        Raises:
            SessionNotFoundError: there is no session `src`.
            SessionBusyError: a turn is running on it.
            AttentionStoreError: `dst` exists already.
            StoreIOError: the disk would not.
        """
        self.check_name(dst)
        self._check_open()
        locks = [self.lock_session(src, wait=0)]
        try:
            self._writer.drain()
            for name in (src, dst):
                self._learn((self.namespace, name))
            pairs = [(part_name(src, number), part_name(dst, number)) for number in self._parts(src)]
            locks += [self.lock_session(part, wait=0) for part, _ in pairs if part != src]
            if not all(self._disk.rename(self.namespace, *pair) for pair in pairs):
                raise AttentionStoreError(f"session {dst!r} exists already; delete it first or choose another name")
            self.device_tier.rename(src, dst, self.namespace)
            self._named_anew(src, dst)
            self._whole_manifests.pop((self.namespace, src), None)
            self._publish((self.namespace, src))
        finally:
            for lock in locks:
                lock.release()

    def _named_anew(self, src: str, dst: str) -> None:
        """Session `dst` is what `src` is, or was."""
        whole = self._whole_manifests.get((self.namespace, src))
        if whole is not None:
            self._whole_manifests[self.namespace, dst] = whole
        self._publish((self.namespace, dst))

    def metadata(self, name: str) -> dict[str, Any]:
        """What `set_metadata` kept with a session; an empty dict if nothing.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._settle()
        self._learn((self.namespace, name), settled=True)
        return self._disk.index.sessions.metadata(self.namespace, name)

    def set_metadata(self, name: str, metadata: dict[str, Any]) -> None:
        """Keeps a JSON-able dict with a session (which it creates if needed); forks copy it, `delete` removes it.

        Raises:
            StoreIOError: the disk would not.
        """
        self._check_open()
        self._disk.set_metadata(self.namespace, self.check_name(name), json.dumps(metadata))
        self._publish((self.namespace, name))

    def export_session(self, name: str, path: str | os.PathLike[str]) -> Exported:
        """Writes a session, with all of its KV, to one portable safetensors file, private to the user, not encrypted.

        Of a session of a tensor-parallel model this is the part of its first rank.

        Raises:
            SessionNotFoundError: there is no such session.
            AttentionStoreError: a block can't be read, or the file not be written.
        """
        from .disk.portable import export_session

        self._settle()
        return export_session(self._disk, self.namespace, name, Path(path))

    def import_session(self, path: str | os.PathLike[str], name: str | None = None) -> Exported:
        """Takes an exported session in, after all of the file was checked.

        Args:
            name: what it is called here; default is the name it had.

        Raises:
            AttentionStoreError: the file is damaged or does not fit, the session exists already, or there is no room.
            SessionNameError: a name that can't be one.
        """
        from .disk.portable import import_session

        if name is not None:
            self.check_name(name)
        self._settle()
        return import_session(self._disk, self.namespace, Path(path), self.block_size, name, self.check_name)

    # looking after the store

    def _expire(self) -> None:
        if self._expiry.is_due():
            self._fetcher.submit(partial(self._guarded, self._delete_expired))

    def _delete_expired(self) -> None:
        """Deletes the sessions that had no turn for as many days as the store was opened with."""
        limit, gone = self._expiry.unused_since, (SessionBusyError, SessionNotFoundError, StoreClosedError)
        for namespace, name in self._disk.index.sessions.all_names(unused_since=limit):
            if self.closed:
                return
            with suppress(*gone):
                view = self.in_namespace(namespace)
                if not is_part(name) and view.session(name).last_used < limit:
                    view.delete(name)
                    logger.info("session %r was deleted: no turn for %g days", name, self._expiry.days)

    def verify(self, progress: Progress = no_progress, *, shared: bool = False) -> Report:
        """Reads everything on disk and says what is not as it was written. Changes nothing; see `repair_store`.

        Args:
            shared: looks at the blocks of the shared tier instead. What is wrong there goes when it is next used.

        Raises:
            StoreIOError: the disk would not.
            SharedTierError: there is no shared tier, or its engine does not answer.
        """
        self._settle()
        if not shared:
            return verify(self._disk, progress)
        tier = self._needs_shared()
        report = Report()

        def note(name: str, nbytes: int, error: LoadError | None) -> None:
            report.blocks += 1
            report.bytes += nbytes
            if error is not None:
                report.add("damaged block", name, error)

        tier.check(note, progress)
        return report

    def _needs_shared(self) -> SharedTier:
        self._check_open()
        if self._shared is None:
            raise SharedTierError("there is no shared tier: name one with shared=, or in ATTNSTORE_SHARED")
        return self._shared

    def shared_upkeep(self) -> Upkeep:
        """For who looks after what machines share.

        Raises:
            SharedTierError: there is no shared tier.
        """
        from .shared.upkeep import Upkeep

        return Upkeep(self._needs_shared())

    def collect_garbage(
        self, *, unowned: bool = False, dry_run: bool = False, progress: Progress = no_progress
    ) -> Garbage:
        """Removes what nobody needs: files that no index knows, the quarantine, lock files, free room in the index.

        Args:
            unowned: also blocks that belong to no session.
            dry_run: only say what would go.

        Raises:
            StoreIOError: the disk would not.
        """
        self._settle()
        if unowned and not dry_run:
            self.device_tier.forget_unnamed()
        return collect(
            self._disk,
            self._locks,
            self._open_lock,
            unowned=unowned,
            dry_run=dry_run,
            forget=self._forget,
            progress=progress,
        )

    def session_with(self, key: Key) -> str | None:
        """The name of the session used last, of those that a block belongs to; None if it belongs to none."""
        for (namespace, name), (_, manifest) in reversed(list(self._committing.items())):
            if namespace == self.namespace and not is_part(name) and any(s.block == key for s in manifest.spans):
                return name
        return self._disk.session_with(self.namespace, key)

    def session_fingerprint(self, name: str) -> str | None:
        """The model fingerprint that a session was last saved with; None if there is no such session."""
        self._check_open()
        pending = self._committing.get((self.namespace, name))
        return pending[0] if pending is not None else self._disk.fingerprint(self.namespace, name)

    def session_codec(self, name: str) -> str | None:
        """The codec that wrote the KV of a session, as far as it is known here; None if it has none on disk.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        first = next((span.block for span in self.manifest(name).spans if span.block), None)
        row = self._disk.row(first) if first is not None else None
        if row is None:
            return None
        names = [name + apart for name in known_codecs() for apart in ("", APART)]
        roots = (chain_root(row.fingerprint, self.namespace, name, self.secret) for name in names)
        return next((name for name, root in zip(names, roots, strict=True) if root == row.parent), None)

    def lock_session(self, name: str, wait: float, *, patient: bool = True) -> SessionLock:
        """Takes the lock of a session, which need not exist, on all machines of a shared tier; `wait` in seconds.

        Args:
            patient: waits a moment, whatever `wait`, for a turn of another machine that may just have ended.

        Raises:
            SessionNameError: see `check_name`.
            SessionBusyError: another turn holds it.
            StoreClosedError: the store is closed.
        """
        self._check_open()
        lock = self._locks.acquire(self.namespace, name if is_part(name) else self.check_name(name), wait)
        shared, place = self._shared_sessions, (self.namespace, name)
        if shared is not None and not is_part(name):
            try:
                reads = place not in self._committing
                self._take_in(place, partial(shared.begin, wait=wait, patient=patient, reads=reads))
            except BaseException:
                lock.release()
                raise
            lock.then = partial(shared.leases.end, place)
        return lock

    def give_way(self, name: str) -> None:
        """The turn that runs on a session is one that other machines need not wait for."""
        if self._shared_sessions is not None:
            self._shared_sessions.leases.give_way((self.namespace, name))

    @contextmanager
    def one_step(self, name: str) -> Iterator[None]:
        """What is done to a session meanwhile is one step for other machines: a turn, and what is kept of it."""
        place, shared = (self.namespace, name), self._shared_sessions
        if shared is None:
            yield
            return
        shared.leases.keep(place)
        try:
            yield
        finally:
            shared.leases.let_go(place)

    # turns

    def commit(self, session: str, fingerprint: str, manifest: Manifest) -> None:
        """Sets what a session consists of, after every block handed over before is on disk.

        Blocks of earlier branches stay the session's own, so that `delete` removes them too.
        """
        self._check_open()
        place = self.namespace, session
        pending = self._committing[place] = (fingerprint, manifest)
        hold = self._locks.keep(self.namespace, session)
        shared = self._shared_sessions
        if shared is not None:
            shared.leases.keep(place)

        def change() -> None:
            try:
                self._disk.commit(self.namespace, session, fingerprint, manifest)
                self._keep_totals()
                self._keep_whole(place, manifest)
            finally:
                if self._committing.get(place) is pending:
                    del self._committing[place]
                self._publish(place)
                if shared is not None:
                    shared.leases.let_go(place)
                if hold is not None:
                    hold.done()

        self._writer.submit(partial(self._guarded, change))
        self._turn_is_over(session)
        self._expire()

    def tokens(self, session: str, *, dropped: bool = False) -> list[int]:
        """The token ids of a session whose KV is in the store.

        Args:
            dropped: with those that were dropped from the window, in their place.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        ids: list[int] = []
        for span in self.manifest(session).spans:
            if not span.block:
                ids += decode_tokens(span.dropped).tolist() if dropped else []
                continue
            found = self.describe_block(span.block)
            if found is None:
                break
            ids += found[1][span.start : span.stop].tolist()
        return ids
