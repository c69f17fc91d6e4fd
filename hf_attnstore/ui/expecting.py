"""Telling the store which conversation will go on soon, and finding out what that saved."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..cache.stats import TurnStats
from ..errors import AttentionStoreError
from ..store import AttentionStore

WITHIN = 60.0
"""Seconds within which a turn is likely, when somebody opens a conversation or types."""
AGAIN_AFTER = 5.0
"""Seconds for which the store is not told the same again: people press many keys."""


class Expectations:
    """What is expected, and how much of it was on disk only when the store was told.

    Safe to use from several threads. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        self._bandwidth: float | None = None

    def expect(self, store: AttentionStore, name: str) -> None:
        """Someone opened a conversation, or types in it."""
        key = store.namespace, name
        now = self._clock()
        with self._lock:
            self._told = {k: v for k, v in self._told.items() if now - v[0] < WITHIN}
            told = self._told.get(key)
            if told is not None and now - told[0] < AGAIN_AFTER:
                return
            if told is not None:
                self._told[key] = now, told[1]
        if told is None:
            held = store.residence(name).get("memory", 0)
            with self._lock:
                self._told[key] = now, held
        try:
            store.expect(name, within=WITHIN)
        except AttentionStoreError:  # it is only a hint
            return

    def take(self, store: AttentionStore, name: str) -> tuple[int, float | None]:
        """A turn begins: how many bytes came into memory since the store was told, and how long reading them from
        disk would have taken (seconds; None while no such reading was measured).
        """
        with self._lock:
            told = self._told.pop((store.namespace, name), None)
        if told is None:
            return 0, None
        fetched = max(0, store.residence(name).get("memory", 0) - told[1])
        return fetched, fetched / self._bandwidth if fetched and self._bandwidth else None

    def learn(self, stats: TurnStats) -> None:
        """How fast reading from disk is, from a turn whose KV all came from there."""
        if set(stats.blocks_from) == {"disk"} and stats.loaded_bytes and stats.load_seconds > 0:
            with self._lock:
                self._bandwidth = stats.loaded_bytes / stats.load_seconds
