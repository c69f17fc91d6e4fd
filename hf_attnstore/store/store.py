"""AttentionStore: blocks by key in memory and on disk, and the sessions made of them."""

import atexit
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from ..errors import (
    AttentionStoreError,
    LoadError,
    SessionNameError,
    StoreClosedError,
)
from .accounts import MISSED, Accounts, readable
from .blocks import TOKEN_IDS, Block, Match, TensorSpec
from .keys import Key, chain_root, common_prefix, decode_tokens, encode_tokens
from .locks import SessionLock, SessionLocks
from .maintenance import Garbage, Report, collect, repair, verify
from .manifest import Manifest, SessionInfo
from .memory import MemoryTier
from .portable import Exported, export_session, import_session
from .rebuild import Progress, no_progress, open_disk_store
from .settings import open_folder
from .sizes import parse_bytes
from .threads import IOThreads, RightOfWay
from .transfer import Load, Source, Stage
from .vault import parse_key

logger = logging.getLogger("hf_attnstore")

MAX_NAME_BYTES = 1024

Durability = Literal["process", "power"]


class Saver(Protocol):
    """Somebody with KV that the store does not have yet, such as a cache between two forwards."""

    def save(self) -> None:
        """Hands over everything that is complete."""


_open_stores: "weakref.WeakSet[AttentionStore]" = weakref.WeakSet()


@atexit.register
def _close_open_stores() -> None:
    """What was handed over to a store that nobody closed is written before the process ends."""
    for store in list(_open_stores):
        try:
            store.close()
        except Exception:
            logger.warning("the store %s could not be closed at exit", store.path, exc_info=True)


def default_path() -> Path:
    """`$HF_HOME/attnstore`, where `HF_HOME` defaults as in huggingface_hub."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "attnstore"


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


class AttentionStore:
    """Keeps the KV of conversations in memory and on disk.

    Args:
        path: the folder; created if missing. Default `$HF_HOME/attnstore`.
        memory: bytes of host memory for blocks, those being written included; an int, or a string like "2GiB".
        disk: bytes on disk, index included; 0 keeps blocks in memory only.
        block_size: tokens per block, 256 if not said. A store keeps the size it was made with.
        namespace: blocks and sessions of different namespaces never meet: one for each user, for instance.
        io_threads: threads that read; default by the number of cores.
        durability: what a saved turn survives. "process": the end of the process, however it comes; after a loss of
            power what had not reached the disk by itself is noticed and recomputed. "power": a loss of power too;
            every file is fsynced, and so is the index with every turn.
        encryption_key: 32 bytes, or a text of them in hex or base64, under which files are encrypted (AES-256-GCM).
            Default: the environment variable `ATTNSTORE_KEY`. A store is encrypted from its beginning or not at all.

    Raises:
        AttentionStoreError: a size or another argument that is none.
        StoreFormatError: the folder holds something else, or a store of another format or block size.
        EncryptionKeyError: the store's key is missing or wrong.

    Safe to use from several threads, and several processes of one machine may share a folder. Use it as a context
    manager, or `close()` it; what was handed over is then on disk. A process that ends in the ordinary way closes its
    stores.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        memory: int | str = "2GiB",
        disk: int | str = "50GiB",
        block_size: int | None = None,
        namespace: str = "",
        io_threads: int | None = None,
        durability: Durability = "process",
        encryption_key: str | bytes | None = None,
    ) -> None:
        if block_size is not None and block_size < 1:
            raise AttentionStoreError(f"block_size is a number of tokens, at least 1, not {block_size}")
        if durability not in ("process", "power"):
            raise AttentionStoreError(f'durability is "process" or "power", not {durability!r}')
        self.path = Path(path).expanduser() if path is not None else default_path()
        self.namespace = self.check_namespace(namespace)
        self.disk_capacity = parse_bytes(disk)
        self._memory = MemoryTier(parse_bytes(memory))
        self._accounts = Accounts()
        key = parse_key(encryption_key)
        folder = open_folder(self.path, block_size, key)
        self.block_size = folder.block_size
        self.secret = folder.vault.secret
        """Keys the names of blocks; empty without encryption."""
        self._disk, self._open_lock = open_disk_store(
            folder, self.disk_capacity, self._accounts, sync=durability == "power"
        )
        self._locks = SessionLocks(self._disk.locks_folder, self.secret)
        cores = os.cpu_count() or 1
        self._readers = IOThreads(io_threads or min(4, cores), "read")
        self._right_of_way = RightOfWay()
        self._writer = IOThreads(1, "write", self._right_of_way)
        self._savers: weakref.WeakSet[Saver] = weakref.WeakSet()
        self._saver_lock = threading.Lock()
        self._committing: dict[str, tuple[str, Manifest]] = {}
        """Fingerprint and manifest of sessions whose commit waits for the writer."""
        self._closed = False
        _open_stores.add(self)

    # life

    def __enter__(self) -> "AttentionStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError(f"the store {self.path} is closed; open it again with AttentionStore(...)")

    @property
    def closed(self) -> bool:
        return self._closed

    def flush(self) -> None:
        """Returns when everything handed over is on disk, that of caches between two turns included."""
        self._check_open()
        with self._saver_lock:
            savers = list(self._savers)
        for saver in savers:
            saver.save()
        self._writer.drain()

    def close(self) -> None:
        """Flushes and closes. Idempotent."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        self._readers.close()
        with self._right_of_way.hurry():
            self._writer.close()
        self._keep_totals()
        self._disk.close()
        self._open_lock.release()

    def register(self, saver: Saver) -> None:
        """Makes `flush` and `close` call `saver.save()`, for as long as somebody else keeps it."""
        with self._saver_lock:
            self._savers.add(saver)

    # sessions

    @staticmethod
    def check_name(name: str) -> str:
        """Returns `name` if a session can have it.

        Raises:
            SessionNameError: empty, too long, or not text.
        """
        if not isinstance(name, str) or not name:
            raise SessionNameError(f"a session's name is a text of at least one character, not {name!r}")
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            raise SessionNameError(f"the session name {name!r} is not valid unicode") from None
        if size > MAX_NAME_BYTES:
            raise SessionNameError(
                f"a session's name has at most {MAX_NAME_BYTES} bytes, {name[:20]!r}… has {size}; use a digest of it"
            )
        return name

    @staticmethod
    def check_namespace(name: str) -> str:
        """Returns `name` if a namespace can have it.

        Raises:
            SessionNameError: too long, or not text.
        """
        return AttentionStore.check_name(name) if name else ""

    def sessions(self, limit: int | None = None, offset: int = 0) -> list[SessionInfo]:
        """The sessions of this namespace, last used first: all, or a page of them."""
        self._settle()
        return self._disk.index.sessions.listing(self.namespace, limit, offset)

    def session(self, name: str) -> SessionInfo:
        """One session.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._settle()
        return self._disk.index.sessions.info(self.namespace, name)

    def session_count(self) -> int:
        """How many sessions this namespace has."""
        self._settle()
        return self._disk.index.sessions.number(self.namespace)

    def _settle(self) -> None:
        """What was handed over is on disk."""
        self._check_open()
        self._writer.drain()

    def delete(self, name: str, *, secure: bool = False) -> None:
        """Deletes a session and every block that no other session uses.

        Args:
            secure: return only when nothing of it is in any file of the store: not in the index's free pages or its
                log, and not in quarantine, which is emptied for that. Blocks that other sessions use too stay.

        Raises:
            SessionNotFoundError: there is no such session.
            SessionBusyError: a turn is running on it.
            StoreIOError: the disk would not.
        """
        self._check_open()
        lock = self.lock_session(name, wait=0)
        try:
            self._writer.drain()
            self._disk.delete_session(self.namespace, name, self._memory.discard, secure=secure)
        finally:
            lock.release()

    def fork(self, src: str, dst: str) -> None:
        """Makes session `dst` with all that `src` has. No KV is copied: both use the same blocks.

        Raises:
            SessionNotFoundError: there is no session `src`.
            AttentionStoreError: `dst` exists already.
            StoreIOError: the disk would not.
        """
        self.check_name(dst)
        self._settle()
        if not self._disk.fork(self.namespace, src, dst):
            raise AttentionStoreError(f"session {dst!r} exists already; delete it first or choose another name")

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
        lock = self.lock_session(src, wait=0)
        try:
            self._writer.drain()
            if not self._disk.rename(self.namespace, src, dst):
                raise AttentionStoreError(f"session {dst!r} exists already; delete it first or choose another name")
        finally:
            lock.release()

    def metadata(self, name: str) -> dict[str, Any]:
        """What `set_metadata` kept with a session; an empty dict if nothing.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._settle()
        return self._disk.index.sessions.metadata(self.namespace, name)

    def set_metadata(self, name: str, metadata: dict[str, Any]) -> None:
        """Keeps a JSON-able dict with a session (which it creates if needed); forks copy it, `delete` removes it.

        Raises:
            StoreIOError: the disk would not.
        """
        self._check_open()
        self._disk.set_metadata(self.namespace, self.check_name(name), json.dumps(metadata))

    def export_session(self, name: str, path: str | os.PathLike[str]) -> Exported:
        """Writes a session, with all of its KV, to one portable safetensors file, private to the user, not encrypted.

        Raises:
            SessionNotFoundError: there is no such session.
            AttentionStoreError: a block can't be read, or the file not be written.
        """
        self._settle()
        return export_session(self._disk, self.namespace, name, Path(path))

    def import_session(self, path: str | os.PathLike[str], name: str | None = None) -> Exported:
        """Takes an exported session in, after all of the file was checked.

        Args:
            name: what it is called here; default is the name it had.

        Raises:
            AttentionStoreError: the file is damaged or does not fit, the session exists already, or there is no room.
        """
        if name is not None:
            self.check_name(name)
        self._settle()
        return import_session(self._disk, self.namespace, Path(path), self.block_size, name)

    # looking after the store

    def verify(self, progress: Progress = no_progress) -> Report:
        """Reads everything on disk and says what is not as it was written. Changes nothing; see `repair_store`.

        Raises:
            StoreIOError: the disk would not.
        """
        self._settle()
        return verify(self._disk, progress)

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
        return collect(
            self._disk,
            self._locks,
            self._open_lock,
            unowned=unowned,
            dry_run=dry_run,
            forget=self._memory.discard,
            progress=progress,
        )

    # models

    def note(self, fingerprint: str) -> dict[str, Any] | None:
        """What `set_note` kept of a model; None if nothing, or nothing that can be read."""
        self._check_open()
        try:
            found = json.loads(self._disk.note(fingerprint) or "null")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def set_note(self, fingerprint: str, note: dict[str, Any]) -> None:
        """Keeps a JSON-able dict of what was found out about a model, in the background."""
        self._check_open()
        keep = partial(self._disk.index.set_note, fingerprint, json.dumps(note))
        self._writer.submit(partial(self._guarded, keep))

    def session_fingerprint(self, name: str) -> str | None:
        """The model fingerprint that a session was last saved with; None if there is no such session."""
        pending = self._committing.get(name)
        return pending[0] if pending is not None else self._disk.fingerprint(self.namespace, name)

    def lock_session(self, name: str, wait: float) -> SessionLock:
        """Takes the lock of a session, which need not exist; `wait` in seconds.

        Raises:
            SessionNameError: see `check_name`.
            SessionBusyError: another turn holds it.
        """
        return self._locks.acquire(self.namespace, self.check_name(name), wait)

    # finding blocks

    def root(self, fingerprint: str) -> Key:
        """The parent of every first block of a model, in this namespace."""
        return chain_root(fingerprint, self.namespace, secret=self.secret)

    def has(self, key: Key) -> bool:
        """Whether a block is in some tier."""
        return bool(self.known([key]))

    def known(self, keys: Sequence[Key]) -> int:
        """How many of these blocks, from the first on, are in some tier."""
        elsewhere = [key for key in keys if self._memory.get(key) is None]
        missing = set(elsewhere) - self._disk.has(elsewhere) if elsewhere else set()
        return next((place for place, key in enumerate(keys) if key in missing), len(keys))

    def nearest(self, parent: Key, ids: Sequence[int]) -> Match | None:
        """The block after `parent` that shares the longest beginning with `ids`; None if none shares a token."""
        tokens = encode_tokens(ids)
        best: Match | None = None
        for block in self._memory.followers(parent):
            common = common_prefix(block.meta.tokens, tokens)
            if common > (best.common if best else 0):
                best = Match(block.meta.key, common, block.meta.token_count)
        found = self._disk.nearest(parent, tokens, best.common if best else 0)
        return Match(*found) if found is not None else best

    def describe(self, key: Key) -> Mapping[str, TensorSpec]:
        """Name, dtype and shape of a block's tensors.

        Raises:
            LoadError: it is not there, or damaged (it is then in quarantine).
        """
        _, source = self._open(key)
        if isinstance(source, Block):
            return source.specs()
        with source:
            return {name: t.spec for name, t in source.layout.tensors.items() if name != TOKEN_IDS}

    def _open(self, key: Key) -> tuple[str, Source]:
        block = self._memory.get(key)
        if block is not None:
            return "memory", block
        try:
            return "disk", self._disk.open(key)
        except LoadError as error:
            self._reject(key, error)
            raise

    def load(self, stages: Sequence[Stage]) -> Load:
        """Opens the blocks of all stages and returns a load, of which nothing is requested yet.

        Raises:
            LoadError: a block is missing or damaged.
        """
        self._check_open()
        sources: dict[Key, tuple[str, Source]] = {}
        try:
            for key in dict.fromkeys(piece.key for stage in stages for piece in stage.pieces):
                sources[key] = self._open(key)
        except BaseException:
            for _, source in sources.values():
                if not isinstance(source, Block):
                    source.close()
            raise
        self._memory.touch(list(sources))
        return Load(self._readers, stages, sources, self._reject)

    def _reject(self, key: Key, error: LoadError) -> None:
        """A block on disk could not be used."""
        if not error.transient:
            self._memory.discard(key)
        self._disk.failed(key, error)

    # saving blocks

    def begin_computing(self, owner: object) -> None:
        """`owner` (hashable) computes on the CPU from now on: writing stands back, for a few seconds at most."""
        self._right_of_way.take(owner)

    def end_computing(self, owner: object) -> None:
        """Ends what `begin_computing` began. Harmless if nothing did."""
        self._right_of_way.give(owner)

    def reserve(self, nbytes: int, *, wait: bool = False) -> bool:
        """Reserves host memory for a block that is being filled; False where the cap leaves no room for it."""
        if not self._memory.reserve(nbytes):
            self._right_of_way.overrule()  # what waits to be written is what fills the memory
            return wait and self._memory.reserve(nbytes, wait=True)
        return True

    def release(self, nbytes: int) -> None:
        """Gives back what `reserve` took, for a block that will not be handed over."""
        self._memory.release(nbytes)

    def put(self, block: Block, supersedes: Key | None = None) -> None:
        """Takes over a complete block, whose bytes were reserved, and writes it behind the caller's back.

        Args:
            supersedes: a short block whose tokens this one begins with; it is dropped when this one is on disk.
        """
        self._check_open()
        if not self._memory.insert(block, dirty=True):
            return
        self._accounts.count_all({"saved_blocks": 1, "saved_bytes": block.nbytes})
        self._writer.submit(partial(self._write, block, supersedes))

    def commit(self, session: str, fingerprint: str, manifest: Manifest) -> None:
        """Sets what a session consists of, after every block handed over before is on disk.

        Blocks of earlier branches stay the session's own, so that `delete` removes them too.
        """
        self._check_open()
        pending = self._committing[session] = (fingerprint, manifest)
        hold = self._locks.keep(self.namespace, session)

        def change() -> None:
            try:
                self._disk.commit(self.namespace, session, fingerprint, manifest)
                self._keep_totals()
            finally:
                if self._committing.get(session) is pending:
                    del self._committing[session]
                if hold is not None:
                    hold.done()

        self._writer.submit(partial(self._guarded, change))

    def _keep_totals(self) -> None:
        new = self._accounts.take_new()
        try:
            if new:
                self._disk.index.add_totals(new)
        except AttentionStoreError:
            self._accounts.give_back(new)

    def touch(self, keys: Sequence[Key]) -> None:
        """Marks blocks as just used."""
        self._memory.touch(list(keys))
        self._writer.submit(partial(self._guarded, partial(self._disk.index.touch, list(keys))))

    def promote(self, keys: Sequence[Key]) -> None:
        """Copies blocks from disk into free or reclaimable memory, in the background and in order."""
        for key in keys:
            self._writer.submit(partial(self._promote, key))

    def _guarded(self, change: Callable[[], None]) -> None:
        """Runs an index change in the writer thread, which must outlive whatever happens there."""
        try:
            change()
        except Exception as error:
            self._disk.note_damage(error)
            self._accounts.count("write_errors")
            self._accounts.warn_once("write", f"the index of {self.path} could not be changed: {error}")

    def _write(self, block: Block, supersedes: Key | None) -> None:
        try:
            written = self._write_after_its_beginning(block, supersedes)
        except Exception as error:
            self._disk.note_damage(error)
            self._accounts.count("write_errors")
            self._accounts.warn_once(
                "write", f"saving to {self.path} failed, conversations are not kept for now: {error}"
            )
        else:
            if written:
                self._accounts.over("write")
                if supersedes is not None and not self._disk.has([supersedes]):
                    self._memory.discard(supersedes)
            else:
                self._accounts.count("not_saved_blocks")
        finally:
            self._memory.mark_clean(block.meta.key)

    def _write_after_its_beginning(self, block: Block, supersedes: Key | None) -> bool:
        """Writes a block, and before it those that it follows, where these did not get to the disk when they should
        have and are still in memory."""
        beginning: list[Block] = []
        before = self._memory.get(block.meta.predecessor) if self.disk_capacity else None
        while before is not None and not self._disk.has([before.meta.key]):
            beginning.append(before)
            before = self._memory.get(before.meta.predecessor)
        for missing in reversed(beginning):
            if not self._disk.write(missing, None):
                return False
        return self._disk.write(block, supersedes)

    def _promote(self, key: Key) -> None:
        try:
            if self._memory.get(key) is not None or not self._disk.has([key]):
                return
            with self._disk.open(key) as file:
                meta = file.read_meta()
                specs = [t for name, t in file.layout.tensors.items() if name != TOKEN_IDS]
                size = sum(t.spec.nbytes for t in specs)
                if not self._memory.reserve(size):
                    return
                try:
                    pinned = torch.cuda.is_available()
                    tensors = {
                        t.spec.name: torch.empty(t.spec.shape, dtype=t.spec.dtype, pin_memory=pinned) for t in specs
                    }
                    file.read([(t, [tensors[t.spec.name].view(torch.uint8).reshape(-1).numpy()]) for t in specs])
                except BaseException:
                    self._memory.release(size)
                    raise
            self._memory.insert(Block(meta, tensors), dirty=False)
        except LoadError as error:
            self._reject(key, error)
        except Exception as error:
            logger.debug("promoting block %s failed: %r", key.hex(), error)

    # accounts

    @property
    def failures(self) -> int:
        """How often something could not be read, or was not what it should be."""
        return self._accounts.failures

    def drop_memory(self) -> None:
        """Empties the memory tier of everything that is on disk."""
        self.flush()
        self._memory.drop_clean()

    def count_turn(
        self, reused: int, prompt: int, loaded_bytes: int, seconds: float, exposed: float, missed: str = ""
    ) -> None:
        """Adds a turn to the totals of `stats`; tokens, bytes, seconds, and why nothing was reused."""
        counts = {
            "turns": 1,
            "turns_with_reuse": int(reused > 0),
            "prompt_tokens": prompt,
            "reused_tokens": reused,
            "loaded_bytes": loaded_bytes,
            "load_microseconds": round(seconds * 1e6),
            "exposed_load_microseconds": round(exposed * 1e6),
        }
        if not reused:
            counts[MISSED + (missed or "not in the store")] = 1
        self._accounts.count_all(counts)

    def stats(self) -> dict[str, int | float]:
        """Bytes by tier against the caps, and totals since the store was opened (bytes, tokens, blocks, seconds)."""
        self._check_open()
        usage = self._disk.index.usage()
        return {
            "memory_bytes": self._memory.used,
            "memory_capacity": self._memory.capacity,
            "memory_blocks": len(self._memory),
            "disk_bytes": self._disk.used_bytes(),
            "disk_capacity": self.disk_capacity,
            "disk_blocks": usage.blocks,
            "sessions": usage.sessions,
            "index_bytes": self._disk.index.database.file_bytes(),
            "quarantine_bytes": self._disk.files.quarantine_bytes(),
            "evicted_from_memory": self._memory.evicted,
            **readable(self._accounts.counts()),
        }

    def totals(self) -> dict[str, int | float]:
        """What `stats` counts, summed over every process that ever used the store."""
        self._settle()
        self._keep_totals()
        return readable(self._disk.index.totals())

    def manifest(self, session: str) -> Manifest:
        """What a session consists of.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._settle()
        return self._disk.index.sessions.manifest(self.namespace, session)

    def latest_manifest(self, session: str) -> Manifest | None:
        """What a session consists of, or will when what was handed over is on disk; None if there is none."""
        pending = self._committing.get(session)
        return pending[1] if pending is not None else self._disk.manifest(self.namespace, session)

    def describe_block(self, key: Key, fingerprint: str = "") -> tuple[int, np.ndarray] | None:
        """The position for which a block's first keys were made, and its ids `[tokens]`.

        Returns:
            None if it is in no tier, can't be read, or is of another model than that of `fingerprint`.
        """
        held = self._memory.get(key)
        if held is None:
            found = self._disk.describe(key, fingerprint)
        else:
            found = (held.meta.start, held.meta.tokens) if fingerprint in ("", held.meta.fingerprint) else None
        return (found[0], decode_tokens(found[1])) if found is not None else None

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
