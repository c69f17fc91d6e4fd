"""AttentionStore: blocks by key in memory and on disk, and the sessions made of them."""

import atexit
import json
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .._version import __version__
from ..errors import (
    AttentionStoreError,
    LoadError,
    SessionNameError,
    SessionNotFoundError,
    StoreClosedError,
    StoreFormatError,
)
from .blocks import TOKEN_IDS, Block, Key, Match, TensorSpec, common_prefix, decode_tokens, encode_tokens, encoded_size
from .disk import DiskTier, make_private_directory
from .index import BlockRow, Index, Manifest, SessionInfo
from .locks import SessionLock, SessionLocks
from .memory import MemoryTier
from .sizes import format_bytes, parse_bytes
from .threads import IOThreads, RightOfWay
from .transfer import Load, Source, Stage

logger = logging.getLogger("hf_attnstore")

FORMAT = 2
MAX_NAME_BYTES = 1024


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


class AttentionStore:
    """Keeps the KV of conversations in memory and on disk.

    Args:
        path: the folder; created if missing. Default `$HF_HOME/attnstore`.
        memory: bytes of host memory for blocks, those being written included; an int, or a string like "2GiB".
        disk: bytes on disk, index included; 0 keeps blocks in memory only.
        block_size: tokens per block. A store keeps the size it was made with.
        namespace: blocks and sessions of different namespaces never meet: one for each user, for instance.
        io_threads: threads that read; default by the number of cores.

    Raises:
        AttentionStoreError: a size that is none.
        StoreFormatError: the folder holds something else, or a store of another format or block size.

    Safe to use from several threads, and several processes may share a folder. Use it as a context manager, or
    `close()` it; what was handed over is then on disk. A process that ends in the ordinary way closes its stores.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        memory: int | str = "2GiB",
        disk: int | str = "50GiB",
        block_size: int = 256,
        namespace: str = "",
        io_threads: int | None = None,
    ) -> None:
        if block_size < 1:
            raise AttentionStoreError(f"block_size is a number of tokens, at least 1, not {block_size}")
        self.path = Path(path).expanduser() if path is not None else default_path()
        self.block_size = block_size
        self.namespace = namespace
        self.disk_capacity = parse_bytes(disk)
        self._memory = MemoryTier(parse_bytes(memory))
        self._open_folder()
        self._disk = DiskTier(self.path)
        self._index = Index(self.path / "index.sqlite")
        self._locks = SessionLocks(self.path)
        self._disk.remove_partial()
        cores = os.cpu_count() or 1
        self._readers = IOThreads(io_threads or min(4, cores), "read")
        self._right_of_way = RightOfWay()
        self._writer = IOThreads(1, "write", self._right_of_way)
        self._savers: weakref.WeakSet[Saver] = weakref.WeakSet()
        self._saver_lock = threading.Lock()
        self._committing: dict[str, tuple[str, Manifest]] = {}
        """Fingerprint and manifest of sessions whose commit waits for the writer."""
        self._counts: Counter[str] = Counter()
        self._count_lock = threading.Lock()
        self._warned: set[str] = set()
        self._closed = False
        _open_stores.add(self)

    def _open_folder(self) -> None:
        try:
            make_private_directory(self.path)
            manifest = self.path / "store.json"
            if not manifest.exists():
                if any(self.path.iterdir()):
                    raise StoreFormatError(f"{self.path} is not empty and not a store; choose another folder")
                temporary = manifest.with_suffix(f".{os.getpid()}.tmp")
                settings = {
                    "format": FORMAT,
                    "block_size": self.block_size,
                    "created_by": f"hf-attnstore {__version__}",
                }
                temporary.write_text(json.dumps(settings))
                temporary.chmod(0o600)
                temporary.replace(manifest)
            settings = json.loads(manifest.read_text())
            found, block_size = settings["format"], settings["block_size"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreFormatError(f"{self.path}/store.json is damaged ({error}); restore or delete it") from error
        except OSError as error:
            raise AttentionStoreError(f"can't use {self.path} as a store: {error}") from error
        if found != FORMAT:
            raise StoreFormatError(f"{self.path} has store format {found}; this version reads {FORMAT}")
        if block_size != self.block_size:
            raise StoreFormatError(
                f"{self.path} was made with block_size={block_size}: open it with that, or choose another folder"
            )

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
        self._index.close()

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

    def sessions(self) -> list[SessionInfo]:
        """The sessions of this namespace, last used first."""
        self._check_open()
        self._writer.drain()
        return self._index.sessions(self.namespace)

    def delete(self, name: str) -> None:
        """Deletes a session and every block that no other session uses.

        Raises:
            SessionNotFoundError: there is no such session.
            SessionBusyError: a turn is running on it.
        """
        self._check_open()
        lock = self.lock_session(name, wait=0)
        try:
            self._writer.drain()
            gone = self._index.delete_session(self.namespace, name)
            for row in gone:
                self._forget(row)
        finally:
            lock.release()

    def fork(self, src: str, dst: str) -> None:
        """Makes session `dst` with all that `src` has. No KV is copied: both use the same blocks.

        Raises:
            SessionNotFoundError: there is no session `src`.
            AttentionStoreError: `dst` exists already.
        """
        self._check_open()
        self.check_name(dst)
        self._writer.drain()
        if not self._index.fork_session(self.namespace, src, dst):
            raise AttentionStoreError(f"session {dst!r} exists already; delete it first or choose another name")

    def metadata(self, name: str) -> dict[str, Any]:
        """What `set_metadata` kept with a session; an empty dict if nothing.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._check_open()
        self._writer.drain()
        return self._index.metadata(self.namespace, name)

    def set_metadata(self, name: str, metadata: dict[str, Any]) -> None:
        """Keeps a JSON-able dict with a session (which it creates if needed); forks copy it, `delete` removes it."""
        self._check_open()
        self._index.set_metadata(self.namespace, self.check_name(name), metadata)

    def note(self, fingerprint: str) -> dict[str, Any] | None:
        """What `set_note` kept of a model; None if nothing, or nothing that can be read."""
        self._check_open()
        try:
            found = json.loads(self._index.note(fingerprint) or "null")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def set_note(self, fingerprint: str, note: dict[str, Any]) -> None:
        """Keeps a JSON-able dict of what was found out about a model, in the background."""
        self._check_open()
        self._writer.submit(partial(self._guarded, partial(self._index.set_note, fingerprint, json.dumps(note))))

    def session_fingerprint(self, name: str) -> str | None:
        """The model fingerprint that a session was last saved with; None if there is no such session."""
        pending = self._committing.get(name)
        return pending[0] if pending is not None else self._index.fingerprint(self.namespace, name)

    def lock_session(self, name: str, wait: float) -> SessionLock:
        """Takes the lock of a session, which need not exist; `wait` in seconds.

        Raises:
            SessionNameError: see `check_name`.
            SessionBusyError: another turn holds it.
        """
        return self._locks.acquire(self.namespace, self.check_name(name), wait)

    # finding blocks

    def has(self, key: Key) -> bool:
        """Whether a block is in some tier."""
        return self._memory.get(key) is not None or self._index.block(key) is not None

    def nearest(self, parent: Key, ids: Sequence[int]) -> Match | None:
        """The block after `parent` that shares the longest beginning with `ids`; None if none shares a token."""
        tokens = encode_tokens(ids)
        best: Match | None = None
        found = [(block.meta.key, block.meta.tokens) for block in self._memory.followers(parent)]
        found += [(row.key, row.tokens) for row in self._index.neighbours(parent, tokens)]
        for key, candidate in found:
            common = common_prefix(candidate, tokens)
            if common > (best.common if best else 0):
                best = Match(key, common, len(candidate) // 4)
        return best

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
        row = self._index.block(key)
        if row is None:
            raise LoadError(f"block {key.hex()} is not in the store any more")
        try:
            return "disk", self._disk.open(row.fingerprint, key)
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
        """A block failed a check: out of sight and aside, so that it is recomputed and never read again."""
        self._memory.discard(key)
        row = self._index.block(key)
        if row is None:
            return
        self._count("rejected")
        self._index.remove_blocks([key])
        aside = self._disk.quarantine(row.fingerprint, key)
        where = f"; the file is now {aside}" if aside else ""
        logger.warning("a stored block can't be used and will be recomputed: %s%s", error, where)

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
        self._count("saved_blocks")
        self._count("saved_bytes", block.nbytes)
        self._writer.submit(partial(self._write, block, supersedes))

    def commit(self, session: str, fingerprint: str, manifest: Manifest) -> None:
        """Sets what a session consists of, after every block handed over before is on disk.

        Blocks of earlier branches stay the session's own, so that `delete` removes them too.
        """
        self._check_open()
        pending = self._committing[session] = (fingerprint, manifest)

        def change() -> None:
            try:
                self._index.commit_session(self.namespace, session, fingerprint, manifest)
            finally:
                if self._committing.get(session) is pending:
                    del self._committing[session]

        self._writer.submit(partial(self._guarded, change))

    def touch(self, keys: Sequence[Key]) -> None:
        """Marks blocks as just used."""
        self._memory.touch(list(keys))
        self._writer.submit(partial(self._guarded, partial(self._index.touch, list(keys))))

    def promote(self, keys: Sequence[Key]) -> None:
        """Copies blocks from disk into free or reclaimable memory, in the background and in order."""
        for key in keys:
            self._writer.submit(partial(self._promote, key))

    def _guarded(self, change: Callable[[], None]) -> None:
        """Runs an index change in the writer thread, which must outlive whatever happens there."""
        try:
            change()
        except Exception as error:
            self._count("write_errors")
            self._warn_once("index", f"the index could not be changed, some KV will not be found again: {error}")

    def _write(self, block: Block, supersedes: Key | None) -> None:
        key = block.meta.key
        try:
            if self._index.block(key) is None:
                self._write_new(block, supersedes)
        except Exception as error:
            self._count("write_errors")
            self._warn_once("write", f"saving to {self.path} failed, conversations are not kept for now: {error}")
        else:
            self._warned.discard("write")
        finally:
            self._memory.mark_clean(key)

    def _write_new(self, block: Block, supersedes: Key | None) -> None:
        meta = block.meta
        if meta.start > 0 and self._index.block(meta.predecessor) is None:
            self._count("not_saved_blocks")  # its beginning did not make it to disk: alone it is worth nothing
            return
        expected = encoded_size(block)
        if not self._make_disk_room(expected, keep={meta.predecessor}):
            self._count("not_saved_blocks")
            if self.disk_capacity:
                cap = format_bytes(self.disk_capacity)
                self._warn_once("full", f"the store {self.path} is full, new KV is not kept on disk (cap {cap})")
            return
        written = self._disk.write(block)
        try:
            old = self._index.add_block(meta, written, supersedes)
        except BaseException:
            self._disk.delete(meta.fingerprint, meta.key)
            raise
        self._count("written_bytes", written)
        if old is not None:
            self._forget(old)

    def _make_disk_room(self, nbytes: int, keep: set[Key]) -> bool:
        """Evicts until `nbytes` more fit under the disk cap. Keys in `keep` stay."""
        # what the index may grow by before this is asked again: by a commit, mostly in its log
        margin = min(max(self.disk_capacity // 64, 192 << 10), 16 << 20)

        def excess() -> int:
            used = self._index.usage()[0] + self._index.file_bytes() + self._disk.quarantine_bytes()
            return used + nbytes + margin - self.disk_capacity

        if nbytes + margin > self.disk_capacity:
            return False
        if excess() > 0:
            self._index.truncate_log()
            self._disk.drop_quarantine()
        while (over := excess()) > 0:
            victims = [row for row in self._index.eviction_candidates(16) if row.key not in keep]
            if not victims:
                return False
            chosen = []
            for row in victims:
                chosen.append(row)
                over -= row.bytes
                if over <= 0:
                    break
            self._index.remove_blocks([row.key for row in chosen])
            for row in chosen:
                self._disk.delete(row.fingerprint, row.key)
                self._count("evicted_blocks")
        self._warned.discard("full")
        return True

    def _forget(self, row: BlockRow) -> None:
        self._memory.discard(row.key)
        self._disk.delete(row.fingerprint, row.key)

    def _promote(self, key: Key) -> None:
        try:
            row = self._index.block(key)
            if row is None or self._memory.get(key) is not None:
                return
            with self._disk.open(row.fingerprint, key) as file:
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

    def drop_memory(self) -> None:
        """Empties the memory tier of everything that is on disk."""
        self.flush()
        self._memory.drop_clean()

    def _count(self, what: str, amount: int = 1) -> None:
        with self._count_lock:
            self._counts[what] += amount

    def count_turn(self, reused: int, prompt: int, loaded_bytes: int, seconds: float, exposed: float) -> None:
        """Adds a turn to the totals of `stats`; tokens, bytes, seconds."""
        with self._count_lock:
            self._counts["turns"] += 1
            self._counts["turns_with_reuse"] += reused > 0
            self._counts["prompt_tokens"] += prompt
            self._counts["reused_tokens"] += reused
            self._counts["loaded_bytes"] += loaded_bytes
            self._counts["load_microseconds"] += round(seconds * 1e6)
            self._counts["exposed_load_microseconds"] += round(exposed * 1e6)

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)

    def stats(self) -> dict[str, int | float]:
        """Bytes by tier against the caps, and totals since the store was opened (bytes, tokens, blocks, seconds)."""
        self._check_open()
        disk_bytes, disk_blocks = self._index.usage()
        counts = Counter(self._counts)
        names = (
            "turns", "turns_with_reuse", "prompt_tokens", "reused_tokens", "loaded_bytes", "saved_blocks",
            "saved_bytes", "written_bytes", "evicted_blocks", "not_saved_blocks", "rejected", "write_errors",
        )  # fmt: skip
        return {
            "memory_bytes": self._memory.used,
            "memory_capacity": self._memory.capacity,
            "memory_blocks": len(self._memory),
            "disk_bytes": disk_bytes + self._index.file_bytes() + self._disk.quarantine_bytes(),
            "disk_capacity": self.disk_capacity,
            "disk_blocks": disk_blocks,
            "evicted_from_memory": self._memory.evicted,
            "load_seconds": counts["load_microseconds"] / 1e6,
            "exposed_load_seconds": counts["exposed_load_microseconds"] / 1e6,
            **{name: counts[name] for name in names},
        }

    def manifest(self, session: str) -> Manifest:
        """What a session consists of.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._check_open()
        self._writer.drain()
        return self._index.manifest(self.namespace, session)

    def latest_manifest(self, session: str) -> Manifest | None:
        """What a session consists of, or will when what was handed over is on disk; None if there is none."""
        pending = self._committing.get(session)
        if pending is not None:
            return pending[1]
        try:
            return self._index.manifest(self.namespace, session)
        except SessionNotFoundError:
            return None

    def describe_block(self, key: Key, fingerprint: str = "") -> tuple[int, np.ndarray] | None:
        """The position for which a block's first keys were made, and its ids `[tokens]`.

        Returns:
            None if it is in no tier, or of another model than that of `fingerprint`.
        """
        held = self._memory.get(key)
        found = held.meta if held is not None else self._index.block(key)
        if found is None or (fingerprint and found.fingerprint != fingerprint):
            return None
        return found.start, decode_tokens(found.tokens)

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
