"""Which block of a tier goes next: leaves only, upcoming turns last."""

import heapq
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .lookahead import Lookahead
from .policies import Place, Policy


@dataclass(slots=True)
class _Entry:
    parent: Hashable
    start: int
    place: Place
    children: set[Any] = field(default_factory=set)


class EvictionOrder:
    """The order in which a policy gives up blocks of chains, of which only those without followers may go.

    A prefix is thus kept before its continuation; among blocks of one place the end of a chain goes first. Blocks that
    an upcoming turn needs go after all others, those of the farthest turn first. A decision costs O(log n).
    """

    def __init__(self, policy: Policy, lookahead: Lookahead | None = None) -> None:
        self.policy = policy
        self._lookahead = lookahead if lookahead is not None else Lookahead()
        self._entries: dict[Hashable, _Entry] = {}
        self._orphans: dict[Hashable, set[Any]] = {}
        self._heaps: list[list[tuple[float, int, Any]]] = [[] for _ in range(policy.groups)]
        self._jobs: list[tuple[int, int, Any]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def place(self, key: Hashable) -> Place | None:
        """Where a block stands; None if it is not here."""
        entry = self._entries.get(key)
        return entry.place if entry is not None else None

    def _push(self, key: Hashable, entry: _Entry) -> None:
        if entry.children:
            return
        job = self._lookahead.job(key)
        if job is None:
            group, stamp = entry.place
            heapq.heappush(self._heaps[group], (stamp, -entry.start, key))
        else:
            heapq.heappush(self._jobs, (-job, -entry.start, key))

    def add(self, key: Hashable, parent: Hashable, start: int, place: Place) -> None:
        """Adds a block that follows `parent`, which itself need not be here."""
        if key in self._entries:
            self.move(key, place)
            return
        entry = self._entries[key] = _Entry(parent, start, place, self._orphans.pop(key, set()))
        self._siblings(parent).add(key)
        self._push(key, entry)

    def _siblings(self, parent: Hashable) -> set[Any]:
        entry = self._entries.get(parent)
        return entry.children if entry is not None else self._orphans.setdefault(parent, set())

    def children(self, parent: Hashable) -> set[Any]:
        """The blocks here that follow `parent`, which itself need not be here."""
        entry = self._entries.get(parent)
        return entry.children if entry is not None else self._orphans.get(parent, set())

    def move(self, key: Hashable, place: Place) -> None:
        """Gives a block another place. Harmless if it is not here."""
        entry = self._entries.get(key)
        if entry is not None and entry.place != place:
            entry.place = place
            self._push(key, entry)

    def used(self, chain: Sequence[Hashable], group: int, now: float, *, short: Hashable | None = None) -> None:
        """A turn of a policy's `group` used a chain.

        Args:
            chain: its whole blocks, in order; the last one that is here counts.
            short: the short block after them, if there is one.
        """
        end = next((key for key in reversed(chain) if key in self._entries), None)
        for key in (end, short):
            entry = self._entries.get(key) if key is not None else None
            if entry is not None:
                self.move(key, self.policy.place(entry.place, group, now, short=key == short))

    def remove(self, key: Hashable) -> None:
        """Takes a block out. Harmless if it is not here."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.children:
            self._orphans[key] = entry.children
        siblings = self._siblings(entry.parent)
        siblings.discard(key)
        parent = self._entries.get(entry.parent)
        if parent is not None:
            if not siblings:
                parent.place = self.policy.left(parent.place, entry.place)
            self._push(entry.parent, parent)
        elif not siblings:
            self._orphans.pop(entry.parent, None)

    def rescheduled(self, keys: Iterable[Hashable]) -> None:
        """What the look-ahead says of these blocks has changed."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                self._push(key, entry)

    def victim(self, now: float, excluded: Container[Any] = (), *, job: int | None = None) -> Hashable | None:
        """The block that goes next.

        Args:
            excluded: blocks to pass over.
            job: the upcoming turn for which room is needed: what an earlier one needs is passed over. None: for a turn
                that is running.

        Returns:
            None if nothing may go.
        """
        best: tuple[float, float] | None = None
        found: Hashable | None = None
        for group, heap in enumerate(self._heaps):
            head = self._first(heap, excluded, group)
            if head is not None:
                value = (self.policy.worth(Place(group, head[0]), now), head[0])
                if best is None or value < best:
                    best, found = value, head[2]
        if found is None:
            farthest = self._first(self._jobs, excluded, None)
            if farthest is not None and (job is None or -farthest[0] > job):
                found = farthest[2]
        return found

    def _first(self, heap: list[Any], excluded: Container[Any], group: int | None) -> tuple[Any, int, Any] | None:
        """The first entry of a heap that still holds, passing over `excluded`."""
        passed = []
        found = None
        while heap:
            item = heap[0]
            if not self._holds(item, group):
                heapq.heappop(heap)
            elif item[2] in excluded:
                passed.append(heapq.heappop(heap))
            else:
                found = item
                break
        for item in passed:
            heapq.heappush(heap, item)
        return found

    def _holds(self, item: tuple[Any, int, Any], group: int | None) -> bool:
        rank, _, key = item
        entry = self._entries.get(key)
        if entry is None or entry.children:
            return False
        job = self._lookahead.job(key)
        if group is None:
            return job == -rank
        return job is None and entry.place == (group, rank)
