"""Telling the store which conversation will go on soon, and finding out what that saved."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..cache.stats import TurnStats
from ..errors import AttentionStoreError
from ..store import AttentionStore

WITHIN = 60.0
"""Seconds within which a turn is likely, when somebody opens a conversation or types."""
AGAIN_AFTER = 5.0
"""Seconds for which the store is not told the same again: people press many keys."""


@dataclass(frozen=True)
class _Told:
    """When the store was told, and how many bytes of the conversation were in memory, and on disk only, before."""

    when: float
    memory: int
    missing: int


class Expectations:
    """What is expected, and how much of it was on disk only when the store was told.

    Safe to use from several threads. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._told: dict[tuple[str, str], _Told] = {}
        self._bandwidth: float | None = None

    def expect(self, store: AttentionStore, name: str) -> None:
        """Someone opened a conversation, or types in it."""
        key = store.namespace, name
        now = self._clock()
        with self._lock:
            self._told = {k: told for k, told in self._told.items() if now - told.when < WITHIN}
            told = self._told.get(key)
            if told is not None and now - told.when < AGAIN_AFTER:
                return
        if told is None:
            places = _residence(store, name)
            memory = places.get("memory", 0)
            told = _Told(now, memory, max(0, places.get("disk", 0) - memory))
        with self._lock:
            self._told[key] = replace(told, when=now)
        try:
            store.expect(name, within=WITHIN)
        except AttentionStoreError:  # it is only a hint
            return

    def take(self, store: AttentionStore, name: str) -> tuple[int, float | None]:
        """A turn begins: how many bytes came from disk into memory since the store was told, and how long reading them
        would have taken (seconds; None while no such reading was measured).
        """
        with self._lock:
            told = self._told.pop((store.namespace, name), None)
        if told is None or not told.missing:
            return 0, None
        fetched = max(0, min(_residence(store, name).get("memory", 0) - told.memory, told.missing))
        return fetched, fetched / self._bandwidth if fetched and self._bandwidth else None

    def forget(self, store: AttentionStore, name: str) -> None:
        """A turn is over: what it computed is in memory now, and nobody fetched that."""
        with self._lock:
            self._told.pop((store.namespace, name), None)

    def learn(self, stats: TurnStats) -> None:
        """How fast reading from disk is, from a turn whose KV all came from there."""
        if set(stats.blocks_from) == {"disk"} and stats.loaded_bytes and stats.load_seconds > 0:
            with self._lock:
                self._bandwidth = stats.loaded_bytes / stats.load_seconds


def _residence(store: AttentionStore, name: str) -> dict[str, int]:
    """Bytes by tier; nothing for a conversation that is new."""
    try:
        return store.residence(name)
    except AttentionStoreError:
        return {}
