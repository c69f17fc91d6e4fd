"""Which block of a tier goes next: leaves only, upcoming turns last."""

import heapq
from collections.abc import Container, Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .lookahead import Lookahead
from .policies import Place, Policy


@dataclass(slots=True)
class _Entry:
    parent: Hashable
    start: int
    place: Place
    followers: int


class EvictionOrder:
    """The order in which a policy gives up blocks of chains, of which only those without followers may go.

    A prefix is thus kept before its continuation; among blocks of one place the end of a chain goes first. Blocks that
    an upcoming turn needs go after all others, those of the farthest turn first. A decision costs O(log n).
    """

    def __init__(self, policy: Policy, lookahead: Lookahead | None = None) -> None:
        self.policy = policy
        self._lookahead = lookahead if lookahead is not None else Lookahead()
        self._entries: dict[Hashable, _Entry] = {}
        self._orphans: dict[Hashable, int] = {}
        """How many blocks here follow one that is not."""
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
        if entry.followers:
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
        entry = self._entries[key] = _Entry(parent, start, place, self._orphans.pop(key, 0))
        before = self._entries.get(parent)
        if before is not None:
            before.followers += 1
        else:
            self._orphans[parent] = self._orphans.get(parent, 0) + 1
        self._push(key, entry)

    def followers(self, parent: Hashable) -> int:
        """How many blocks here follow `parent`, which itself need not be here."""
        entry = self._entries.get(parent)
        return entry.followers if entry is not None else self._orphans.get(parent, 0)

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
        if entry.followers:
            self._orphans[key] = entry.followers
        parent = self._entries.get(entry.parent)
        if parent is not None:
            parent.followers -= 1
            if not parent.followers:
                parent.place = self.policy.left(parent.place, entry.place)
                self._push(entry.parent, parent)
        elif self._orphans[entry.parent] > 1:
            self._orphans[entry.parent] -= 1
        else:
            del self._orphans[entry.parent]

    def rescheduled(self, keys: Iterable[Hashable]) -> None:
        """What the look-ahead says of these blocks has changed."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                self._push(key, entry)

    def victims(self, now: float, excluded: Container[Any] = (), *, job: int | None = None) -> Generator[Hashable]:
        """The blocks that go next, one after the other. Each is to be removed before the next is asked for, and nothing
        else is to change until the iterator is closed.

        Args:
            excluded: blocks to pass over.
            job: the upcoming turn for which room is needed: what an earlier one needs is passed over. None: for a turn
                that is running.
        """
        passed: list[tuple[list[Any], Any]] = []
        heads: list[Any] = [None] * len(self._heaps)
        values: list[Any] = [_NEVER] * len(self._heaps)
        try:
            while True:
                for group, heap in enumerate(self._heaps):
                    if heads[group] is (heap[0] if heap else None):  # as when the one before was chosen
                        continue
                    head = heads[group] = self._first(heap, excluded, group, passed)
                    place = self._entries[head[2]].place if head is not None else None
                    values[group] = (self.policy.worth(place, now), place.stamp) if place is not None else _NEVER
                best = min(values)
                if best is not _NEVER:
                    group = values.index(best)
                    head, heads[group] = heads[group], _UNKNOWN
                else:
                    head = self._first(self._jobs, excluded, None, passed)
                    if head is None or (job is not None and -head[0] <= job):
                        return
                yield head[2]
        finally:
            for heap, item in passed:
                heapq.heappush(heap, item)

    def _first(
        self, heap: list[Any], excluded: Container[Any], group: int | None, passed: list[tuple[list[Any], Any]]
    ) -> tuple[Any, int, Any] | None:
        """The first entry of a heap that still holds. Those of `excluded` are taken out of it, into `passed`."""
        entries, job_of = self._entries, self._lookahead.job
        while heap:
            item = heap[0]
            rank, _, key = item
            entry = entries.get(key)
            job = -rank if group is None else None
            if (
                entry is None
                or entry.followers
                or job_of(key) != job
                or (group is not None and entry.place != (group, rank))
            ):
                heapq.heappop(heap)
            elif key in excluded:
                passed.append((heap, heapq.heappop(heap)))
            else:
                return item
        return None


_UNKNOWN = object()
_NEVER = (float("inf"), float("inf"))
