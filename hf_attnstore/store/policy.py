"""Who goes first, and how far to read ahead: plain decisions over metadata, no I/O and no tensors."""

import heapq
import math
from collections.abc import Container
from dataclasses import dataclass, field

from .keys import Key


@dataclass
class _Entry:
    parent: Key
    start: int
    used: int
    children: set[Key] = field(default_factory=set)


class LeafLRU:
    """Least recently used order over chains of blocks in which only a block without followers may go.

    A prefix is thus kept before its continuation; among blocks used at the same time the end of a chain goes first.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._orphans: dict[Key, set[Key]] = {}
        self._clock = 0
        self._heap: list[tuple[int, int, Key]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def _push(self, key: Key) -> None:
        entry = self._entries[key]
        if not entry.children:
            heapq.heappush(self._heap, (entry.used, -entry.start, key))

    def add(self, key: Key, parent: Key, start: int) -> None:
        """Adds a block, as used now."""
        if key in self._entries:
            self.touch([key])
            return
        self._clock += 1
        self._entries[key] = _Entry(parent, start, self._clock, self._orphans.pop(key, set()))
        self._siblings(parent).add(key)
        self._push(key)

    def _siblings(self, parent: Key) -> set[Key]:
        entry = self._entries.get(parent)
        return entry.children if entry is not None else self._orphans.setdefault(parent, set())

    def children(self, parent: Key) -> set[Key]:
        """The blocks here that follow `parent`, which itself need not be here."""
        entry = self._entries.get(parent)
        return entry.children if entry is not None else self._orphans.get(parent, set())

    def touch(self, keys: list[Key]) -> None:
        """Marks blocks as used now, all at the same time."""
        self._clock += 1
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                entry.used = self._clock
                self._push(key)

    def remove(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.children:
            self._orphans[key] = entry.children
        siblings = self._siblings(entry.parent)
        siblings.discard(key)
        if entry.parent in self._entries:
            self._push(entry.parent)
        elif not siblings:
            self._orphans.pop(entry.parent, None)

    def victim(self, excluded: Container[Key] = ()) -> Key | None:
        """The block that goes next, passing over `excluded`; None if nothing may go."""
        passed = []
        found = None
        while self._heap and found is None:
            item = heapq.heappop(self._heap)
            if self._is_current(item):
                passed.append(item)
                if item[2] not in excluded:
                    found = item[2]
        for item in passed:
            heapq.heappush(self._heap, item)
        return found

    def _is_current(self, item: tuple[int, int, Key]) -> bool:
        used, _, key = item
        entry = self._entries.get(key)
        return entry is not None and entry.used == used and not entry.children


def lookahead_depth(load_seconds: float, compute_seconds: float, layers: int) -> int:
    """How many layers to have on their way beyond the one that computes.

    `load_seconds` and `compute_seconds` are per layer, as measured; 0 means not measured yet. When loading a
    layer takes longer than computing one, every layer is asked for at once: the reader is the bottleneck
    and must never idle. (The paper's read buffer, section 3.2.1, is what makes that room.)
    """
    if load_seconds <= 0 or compute_seconds <= 0 or load_seconds >= compute_seconds:
        return layers
    return min(layers, 1 + math.ceil(2 * load_seconds / compute_seconds))


def read_buffer_bytes(bandwidth: float, load_seconds: float, history: int, compute_seconds: float, new: int) -> float:
    """How much has to be on the device before computing begins, so that it never waits for a load afterwards.

    The paper's formula for the read buffer (section 3.2.1), B * (T_load * L_hist - T_pref * L_new). It is 0 under the
    paper's condition for perfect overlap, T_load * L_hist <= T_pref * L_new: then one layer ahead is enough.

    Args:
        bandwidth: bytes per second of the load.
        load_seconds: to load the KV of one token, all layers.
        history: tokens to load.
        compute_seconds: to compute one token, all layers.
        new: tokens to compute.
    """
    return bandwidth * max(load_seconds * history - compute_seconds * new, 0.0)


def read_buffer_layers(load_seconds: float, compute_seconds: float, layers: int) -> int:
    """The same in layers, where loading all layers takes `load_seconds` and computing them `compute_seconds`: how many
    have to be there, or on their way for as long as they take, before the first one computes. At least 1."""
    if load_seconds <= 0 or layers < 1:
        return min(1, layers)
    buffered = read_buffer_bytes(layers / load_seconds, load_seconds, 1, compute_seconds, 1)
    return min(layers, max(1, math.ceil(buffered)))
