"""An open store: its tiers, threads and accounts, from opening to closing."""

import atexit
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

from ..errors import AttentionStoreError, SessionNameError, StoreClosedError
from ..settings import value_of
from ..sizes import parse_bytes
from ..timeline import Recorders
from .blocks.codecs import Codec, chosen_codec, codec_named, tier_codec
from .blocks.keys import APART, Key
from .blocks.tier import Source, Tier
from .blocks.vault import parse_key
from .disk.folder import open_folder
from .disk.rebuild import open_disk_store
from .disk.surroundings import Surroundings
from .eviction.policies import make_policy
from .eviction.victims import Order
from .expiry import Expiry
from .index.counts import MISSED, Accounts, readable
from .memory.device_tier import DeviceTier
from .memory.size import AUTO, AutomaticSize
from .memory.tier import MemoryTier
from .processes.forking import closed_error, watch
from .processes.locks import SessionLocks
from .processes.parts import is_part, whole_name
from .processes.threads import IOThreads, RightOfWay
from .records.manifest import Manifest
from .shared.sessions import SharedSessions
from .shared.tier import SharedTier
from .shared.url import VARIABLE as SHARED_VARIABLE
from .shared.url import SharedURL

logger = logging.getLogger("hf_attnstore")

MAX_NAME_BYTES = 1024

_LEAST_LEFT, _MOST_LEFT = 4 << 20, 512 << 20
"""Bytes of KV that stay where they were computed without anybody having asked for it. A conversation's at least, since
less is soon copied; of all together at most."""

Durability = Literal["process", "power"]


class Saver(Protocol):
    """Somebody with KV that the store does not have yet, such as a cache between two forwards."""

    def save(self) -> None:
        """Hands over everything that is complete."""


_open_stores: "weakref.WeakSet[OpenStore]" = weakref.WeakSet()


@atexit.register
def _close_open_stores() -> None:
    """What was handed over to a store that nobody closed is written before the process ends."""
    for store in list(_open_stores):
        try:
            store.close()
        except Exception:
            logger.warning("the store %s could not be closed at exit", store.path, exc_info=True)


def _fit(tier: DeviceTier, memory: int) -> None:
    """Gives a device tier that nobody asked for its size, beside so many bytes of memory for blocks."""
    if tier.host_only:
        tier.resize(min(memory // 4, _MOST_LEFT))


def _chosen(name: str, given: Any) -> Any:
    """What was given, else what is set."""
    return given if given is not None else value_of(name)


def days_of(given: float | None) -> float | None:
    """Days without a turn after which sessions go: what was given, else what is set; None where neither is.

    Raises:
        AttentionStoreError: it is no number of days.
    """
    days = _chosen("older_than", given)
    try:
        days = float(days) if days != "" else None
    except (TypeError, ValueError):
        raise AttentionStoreError(f"older_than is a number of days, such as 30, not {days!r}") from None
    if days is not None and not days > 0:
        raise AttentionStoreError(f"older_than is a number of days above 0, not {days:g}")
    return days


def windows_of(given: int | None) -> int | None:
    """Tokens between points of a conversation at which windows are kept: what was given, else what is set; None where
    all are.

    Raises:
        AttentionStoreError: it is no number of tokens.
    """
    every = _chosen("windows_every", given)
    try:
        every = int(every) if every != "" else None
    except (TypeError, ValueError):
        every = -1
    if every is not None and every < 0:
        raise AttentionStoreError("windows_every is a number of tokens, such as 2048, or 0 for the last window alone")
    return every


def default_path() -> Path:
    """The folder that the setting `store` names, else `$HF_HOME/attnstore`, with the default of huggingface_hub.

    Raises:
        SettingsError: the file with settings is none.
    """
    named = value_of("store")
    if named:
        return Path(named).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "attnstore"


class OpenStore:
    """What an `AttentionStore` is made of. See there for the arguments."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        memory: int | str | None = None,
        disk: int | str | None = None,
        block_size: int | None = None,
        namespace: str = "",
        io_threads: int | None = None,
        durability: Durability | None = None,
        encryption_key: str | bytes | None = None,
        policy: str | None = None,
        on_device: int | str | None = None,
        older_than: float | None = None,
        surroundings: Surroundings | None = None,
        codec: str | None = None,
        disk_codec: str | None = None,
        shared_codec: str | None = None,
        windows_every: int | None = None,
        below: Sequence[Tier] = (),
        shared: str | None = None,
    ) -> None:
        if block_size is not None and block_size < 1:
            raise AttentionStoreError(f"block_size is a number of tokens, at least 1, not {block_size}")
        memory, disk = _chosen("memory", memory), _chosen("disk", disk)
        durability = _chosen("durability", durability)
        if durability not in ("process", "power"):
            raise AttentionStoreError(f'durability is "process" or "power", not {durability!r}')
        days = days_of(older_than)
        self.path = Path(path).expanduser() if path is not None else default_path()
        self.namespace = self.check_namespace(namespace)
        self.codec = chosen_codec(_chosen("codec", codec))
        """How new blocks are written; others are not found."""
        self._disk_codec = tier_codec(_chosen("disk_codec", disk_codec))
        shared_own = tier_codec(_chosen("shared_codec", shared_codec))
        self.windows_every = windows_of(windows_every)
        """Tokens between points of a conversation at which sliding layers' windows are kept, beside the last; None
        where all are."""
        self._order = Order(make_policy(_chosen("policy", policy)))
        capacity = 0 if memory == AUTO else parse_bytes(memory)
        surroundings = surroundings or Surroundings()
        self._clock = surroundings.clock
        self._expiry = Expiry(days, self._clock)
        self._memory = MemoryTier(capacity, self._order.policy, self._order.lookahead, self._clock.time)
        on_device = _chosen("on_device", on_device)
        left = None if on_device == AUTO else parse_bytes(on_device)
        self._accounts = Accounts()
        key = parse_key(encryption_key)
        url = os.environ.get(SHARED_VARIABLE, "") if shared is None else shared
        where = SharedURL(url) if url else None
        folder = open_folder(self.path, block_size, key, common=where is not None)
        self.block_size = folder.block_size
        self.secret = folder.vault.secret
        """Keys the names of blocks; empty without encryption."""
        self._right_of_way = RightOfWay()
        self._shared = self._open_shared(where, shared_own)
        self._whole_manifests: dict[tuple[str, str], Manifest] = {}
        """What sessions consist of that are shared, where the index may know of fewer blocks: by namespace and name."""
        self._shared_sessions: SharedSessions | None = None
        if self._shared is not None:
            whole = self._whole_manifests
            self._shared_sessions = SharedSessions(self._shared, self.path, lambda session: session not in whole)
        self._disk, self._open_lock = open_disk_store(
            folder, parse_bytes(disk), self._accounts, self._order, surroundings, sync=durability == "power"
        )
        self._lower = (self._disk, *below, *([self._shared] if self._shared is not None else []))
        self._tiers: tuple[Tier, ...] = (self._memory, *self._lower)
        """In the order in which they are asked."""
        for tier in self._tiers:
            tier.vault = folder.vault
        self._locks = SessionLocks(self._disk.locks_folder, self.secret)
        cores = os.cpu_count() or 1
        self._readers = IOThreads(io_threads or min(4, cores), "read")
        self._fetcher = IOThreads(1, "fetch")
        self._writer = IOThreads(1, "write", self._right_of_way)
        self._savers: weakref.WeakSet[Saver] = weakref.WeakSet()
        self._saver_lock = threading.Lock()
        self.recorders = Recorders()
        """Timelines of what is written and fetched in the background."""
        self._committing: dict[tuple[str, str], tuple[str, Manifest]] = {}
        """Fingerprint and manifest of sessions, by namespace and name, whose commit waits for the writer."""
        self._end = threading.Event()
        """Set when it is closed, for all of its namespaces."""
        self._closing = threading.RLock()
        self._left_behind = False
        """Whether this is a child of the process that opened it."""
        self._views: weakref.WeakValueDictionary[tuple[str, str], OpenStore] = weakref.WeakValueDictionary()
        self._views[self.namespace, self.codec] = self
        self._prepare_upcoming()
        self._order.policy.recall(self._learned() or {})
        self.device_tier = DeviceTier(left) if left is not None else DeviceTier(0, least=_LEAST_LEFT, host_only=True)
        """KV that stays where it was computed between two turns; caches park it there and take it."""
        fit = partial(_fit, self.device_tier)
        fit(capacity)
        self._automatic = AutomaticSize(self._memory, fit) if memory == AUTO else None
        _open_stores.add(self)
        watch(self)
        self._expire()

    def _expire(self) -> None:
        """For who deletes what is not used any more."""

    def _prepare_upcoming(self) -> None:
        """For who looks ahead."""

    def _open_shared(self, url: SharedURL | None, codec: Codec) -> SharedTier | None:
        """The tier that a URL names. It is not asked for anything yet."""
        if url is None:
            return None
        clock, way = self._clock.monotonic, self._right_of_way
        return SharedTier(url, self._accounts, way, clock, self.block_size, self._local_source, codec)

    def _local_source(self, key: Key) -> Source | None:
        raise NotImplementedError

    # life

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise closed_error(self.path, self._left_behind)

    def check_not_left_behind(self) -> None:
        """Does nothing in the process that opened the store.

        Raises:
            StoreClosedError: this is a child of it.
        """
        if self._left_behind:
            self._check_open()

    def after_fork_in_child(self) -> None:
        """This is a child of the process that opened the store: here it is closed."""
        self._end = threading.Event()
        self._end.set()
        self._left_behind = True
        self._closing, self._saver_lock = threading.RLock(), threading.Lock()
        self._prepare_upcoming()

    @property
    def closed(self) -> bool:
        """Whether `close` was called, in whatever namespace."""
        return self._end.is_set()

    def flush(self) -> None:
        """Returns when everything handed over is on disk, that of caches between two turns included, and in a shared
        tier, as long as that answers."""
        self._check_open()
        with self._saver_lock:
            savers = list(self._savers)
        for saver in savers:
            saver.save()
        self._writer.drain()
        for tier in self._tiers:
            tier.flush()

    def close(self) -> None:
        """Flushes and closes. Idempotent: whoever calls it, it is closed when it returns, unless the caller is one of
        the store's own threads, as a destructor may be, or is just closing it: these can't wait for themselves."""
        threads = (self._fetcher, self._readers, self._writer)
        if any(own.has(threading.current_thread()) for own in threads):
            threading.Thread(target=self.close, name="attnstore-close").start()
            return
        with suppress(StoreClosedError):  # another thread closed it
            self.flush()
        with self._closing:
            if self.closed:
                return
            self._end.set()
            try:
                if self._shared_sessions is not None:
                    self._shared_sessions.leases.close()
                self._end_threads()
                self._keep_totals()
                self._keep_learned()
            finally:
                for tier in self._tiers:
                    tier.close()
                self._open_lock.release()

    def _end_threads(self) -> None:
        self._fetcher.close()
        self.device_tier.close()
        if self._automatic is not None:
            self._automatic.close()
        self._readers.close()
        with self._right_of_way.hurry():
            self._writer.close()

    def register(self, saver: Saver) -> None:
        """Makes `flush` and `close` call `saver.save()`, for as long as somebody else keeps it."""
        with self._saver_lock:
            self._savers.add(saver)

    def _settle(self) -> None:
        """What was handed over is on disk."""
        self._check_open()
        self._writer.drain()

    # namespaces

    def in_namespace(self, namespace: str) -> Self:
        """This store, seen from another namespace: for a server with many users, one for each of them.

        Sessions and blocks of the two never meet, while tiers, caps, threads and accounts are shared, so that a cap
        holds for all namespaces together. Asked for the same namespace again, and while somebody still has it, it is
        the same object. Closing one of them closes them all.

        Raises:
            SessionNameError: the name can't be used.
            StoreClosedError: the store is closed.
        """
        return self._seen_from(self.check_namespace(namespace), self.codec)

    def with_codec(self, codec: str) -> Self:
        """This store, writing by another codec: for conversations that are to be kept without loss beside others that
        are not. What one codec wrote the other does not find; all else is shared, as with `in_namespace`.

        Raises:
            AttentionStoreError: there is no such codec.
            StoreClosedError: the store is closed.
        """
        return self._seen_from(self.namespace, chosen_codec(codec))

    def with_windows_apart(self) -> Self:
        """This store, writing what sliding layers have of a block as a block of its own, so that it can be let go."""
        return self._seen_from(self.namespace, self.codec.removesuffix(APART) + APART)

    @property
    def keeps_windows_apart(self) -> bool:
        """Whether what sliding layers have of a block is a block of its own."""
        return self.codec.endswith(APART)

    def _seen_from(self, namespace: str, codec: str) -> Self:
        self._check_open()
        with self._saver_lock:
            view = self._views.get((namespace, codec))
            if view is None:
                view = object.__new__(type(self))
                view.__dict__.update(self.__dict__, namespace=namespace, codec=codec)
                self._views[namespace, codec] = view
                _open_stores.add(view)
                watch(view)
        return cast(Self, view)

    @property
    def is_lossy(self) -> bool:
        """Whether what is restored from blocks may be something else than what was computed."""
        return codec_named(self.codec).lossy

    def __reduce__(self) -> Any:
        raise AttentionStoreError(
            f"an open store can't be pickled or copied: hand over the path, and open it where it is needed with "
            f"AttentionStore({str(self.path)!r})"
        )

    # names

    @staticmethod
    def check_name(name: str) -> str:
        """Returns `name` if a session can have it.

        Raises:
            SessionNameError: empty, too long, not text, or with the character that the store itself puts into names.
        """
        if not isinstance(name, str) or not name:
            raise SessionNameError(f"a session's name is a text of at least one character, not {name!r}")
        if is_part(name):
            raise SessionNameError(
                f"the session name {whole_name(name)[:20]!r}… has the character U+001F, which is for the store's "
                "own use: leave it out"
            )
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
        return OpenStore.check_name(name) if name else ""

    # memory

    def drop_memory(self) -> None:
        """Empties the device tier, and the memory tier of everything that is on disk."""
        self.flush()
        self.device_tier.clear()
        self._memory.drop_clean()

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

    def model_name(self, fingerprint: str) -> str:
        """What the model of that fingerprint is called; the beginning of the fingerprint where nobody said."""
        note = self.note(f"{fingerprint}/name") if fingerprint else None
        return str(note["name"]) if note and "name" in note else fingerprint[:8]

    def set_model_name(self, fingerprint: str, name: str) -> None:
        """Says what the model of that fingerprint is called."""
        self.set_note(f"{fingerprint}/name", {"name": name})

    @property
    def _policy_note(self) -> str:
        return f"policy {self._order.policy.name}"

    def _learned(self) -> dict[str, Any] | None:
        """What the policy of an earlier process found out."""
        try:
            found = json.loads(self._disk.note(self._policy_note) or "null")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _keep_learned(self) -> None:
        learned = self._order.policy.learned()
        if learned:
            with suppress(AttentionStoreError):
                self._disk.index.set_note(self._policy_note, json.dumps(learned))

    def _guarded(self, change: Callable[[], object]) -> None:
        """Runs an index change in the writer thread, which must outlive whatever happens there."""
        try:
            change()
        except Exception as error:
            self._accounts.count("write_errors")
            self._accounts.warn_once("write to disk", f"the index of {self.path} could not be changed: {error}")

    # accounts

    @property
    def failures(self) -> int:
        """How often something could not be read, or was not what it should be."""
        return self._accounts.failures

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

    def _keep_totals(self) -> None:
        new = self._accounts.take_new()
        try:
            if new:
                self._disk.index.add_totals(new)
        except AttentionStoreError:
            self._accounts.give_back(new)

    def stats(self) -> dict[str, int | float]:
        """Bytes by tier against the caps, and totals since the store was opened (bytes, tokens, blocks, seconds)."""
        self._check_open()
        usage = self._disk.index.usage()
        return {
            "device_bytes": self.device_tier.used,
            "device_capacity": self.device_tier.capacity,
            "device_sessions": len(self.device_tier),
            "memory_bytes": self._memory.used,
            "memory_capacity": self._memory.capacity,
            "memory_blocks": len(self._memory),
            "disk_bytes": self._disk.used,
            "disk_capacity": self._disk.capacity,
            "disk_blocks": usage.blocks,
            "sessions": usage.sessions,
            "index_bytes": self._disk.index.database.file_bytes(),
            "quarantine_bytes": self._disk.files.quarantine_bytes(),
            **{f"{tier.name}_{what}": getattr(tier, what) for tier in self._lower[1:] for what in ("used", "capacity")},
            "evicted_from_device": self.device_tier.evicted,
            "evicted_from_memory": self._memory.evicted,
            **readable(self._accounts.counts()),
        }

    def totals(self) -> dict[str, int | float]:
        """What `stats` counts, summed over every process that ever used the store."""
        self._settle()
        self._keep_totals()
        return readable(self._disk.index.totals())
