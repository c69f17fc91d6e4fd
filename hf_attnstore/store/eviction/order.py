"""Which block of a tier goes next: leaves only, upcoming turns last."""

import heapq
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
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
        self._jobs_of = self._lookahead.jobs.get
        self._entries: dict[Hashable, _Entry] = {}
        self._orphans: dict[Hashable, int] = {}
        """How many blocks here follow one that is not."""
        self._heaps: list[list[tuple[float, int, Any]]] = [[] for _ in range(policy.groups)]
        self._jobs: list[tuple[int, int, Any]] = []
        self._pushed: set[int] = set()
        """Groups of which the first may be another one than it was."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def place(self, key: Hashable) -> Place | None:
        """Where a block stands; None if it is not here."""
        entry = self._entries.get(key)
        return entry.place if entry is not None else None

    def _push(self, key: Hashable, entry: _Entry) -> None:
        """A block may be one of those that can go now."""
        if entry.followers:
            return
        jobs = self._jobs_of(key)
        if jobs is None:
            group, stamp = entry.place
            heapq.heappush(self._heaps[group], (stamp, -entry.start, key))
            self._pushed.add(group)
        else:
            heapq.heappush(self._jobs, (-jobs[0], -entry.start, key))

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

    def add_chain(self, keys: Sequence[Hashable], parent: Hashable, start: int, place: Place) -> None:
        """Adds blocks none of which is here, each following the one before and the first `parent`: as `add` does from
        the last to the first."""
        if not keys:
            return
        entries, orphans = self._entries, self._orphans
        before = entries.get(parent)
        if before is not None:
            before.followers += 1
        else:
            orphans[parent] = orphans.get(parent, 0) + 1
        for number, key in enumerate(keys, start):
            entries[key] = entry = _Entry(parent, number, place, orphans.pop(key, 0) + 1)
            parent = key
        entry.followers -= 1  # what the last one is followed by was here before
        self._push(keys[-1], entry)

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

    def touch(self, keys: Iterable[Hashable], now: float) -> None:
        """Blocks were read now, each for itself. Harmless for those that are not here."""
        entries = self._entries
        before: Place | None = None
        for key in keys:
            entry = entries.get(key)
            if entry is not None:
                if entry.place is not before:  # mostly a chain's blocks all stand at one place
                    before = entry.place
                    place = self.policy.place(before, before.group, now)
                entry.place = place
                if not entry.followers and place != before:
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
        before = self._unfollow(entry)
        if before is not None:
            self._push(entry.parent, before)

    def _unfollow(self, entry: _Entry) -> _Entry | None:
        """A block has gone. Returns what it followed, if that is here and may go now."""
        before = self._entries.get(entry.parent)
        if before is None:
            if self._orphans[entry.parent] > 1:
                self._orphans[entry.parent] -= 1
            else:
                del self._orphans[entry.parent]
            return None
        before.followers -= 1
        if before.followers:
            return None
        if before.place is not entry.place:
            before.place = self.policy.left(before.place, entry.place)
        return before

    def rescheduled(self, keys: Iterable[Hashable]) -> None:
        """What the look-ahead says of these blocks has changed."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                self._push(key, entry)

    def evict(
        self,
        nbytes: int,
        sizes: Mapping[Hashable, int],
        now: float,
        excluded: Container[Hashable] = (),
        *,
        job: int | None = None,
        newcomer: Place | None = None,
    ) -> list[Hashable]:
        """Takes out the blocks that go next, until they have `nbytes` or nothing is left that may go. Returns them, in
        the order in which they went.

        Args:
            sizes: bytes by block.
            excluded: blocks to pass over.
            job: the upcoming turn for which room is needed: what an earlier one needs is passed over. None: for a turn
                that is running.
            newcomer: where the block will stand for which room is needed. As long as nobody says what comes next,
                nothing goes for it that the policy thinks is worth more (`Policy.admits`).
        """
        gone: list[Hashable] = []
        passed: list[tuple[list[Any], Any]] = []
        values: dict[int, tuple[float, float, int]] = {}
        changed = self._pushed = {group for group, heap in enumerate(self._heaps) if heap}
        worth = self.policy.worth
        if self._lookahead.jobs:
            newcomer = None
        try:
            while nbytes > 0:
                for group in changed:
                    head = self._first(self._heaps[group], excluded, group, passed)
                    if head is not None:
                        place = self._entries[head[2]].place
                        values[group] = (worth(place, now), place.stamp, group)
                    else:
                        values.pop(group, None)
                changed.clear()
                if values:
                    _, stamp, group = min(values.values())
                    if newcomer is not None and not self.policy.admits(newcomer, Place(group, stamp), now):
                        break
                    changed.add(group)
                    heap = self._heaps[group]
                    nbytes -= self._evict_run(heap, nbytes, sizes, excluded, gone)
                    while nbytes > 0 and len(changed) == 1:  # others of the same stamp: no group's value is another now
                        head = self._first(heap, excluded, group, passed)
                        if head is None or head[0] != stamp:
                            break
                        nbytes -= self._evict_run(heap, nbytes, sizes, excluded, gone)
                else:
                    head = self._first(self._jobs, excluded, None, passed)
                    if head is None or (job is not None and -head[0] <= job):
                        break
                    nbytes -= self._evict_run(self._jobs, nbytes, sizes, excluded, gone)
        finally:
            for heap, item in passed:
                heapq.heappush(heap, item)
        return gone

    def _evict_run(
        self,
        heap: list[tuple[Any, int, Any]],
        nbytes: int,
        sizes: Mapping[Hashable, int],
        excluded: Container[Hashable],
        gone: list[Hashable],
    ) -> int:
        """Takes out the first block of a heap and then, up its chain, what goes next anyway, until they have `nbytes`.
        Adds them to `gone`; returns their bytes."""
        entries, jobs_of = self._entries, self._jobs_of
        rank, _, key = heapq.heappop(heap)
        entry = entries.pop(key)
        jobs = jobs_of(key)
        rivals = bool(heap) and heap[0][0] == rank
        freed = 0
        while True:
            gone.append(key)
            freed += sizes[key]
            before = self._unfollow(entry)
            if before is None:
                return freed
            key = entry.parent
            if (
                freed >= nbytes
                or (before.place is not entry.place and before.place != entry.place)
                or jobs_of(key) != jobs
                or key in excluded
                or (rivals and heap[0] < (rank, -before.start, key))
            ):
                self._push(key, before)
                return freed
            entry = entries.pop(key)

    def _first(
        self, heap: list[Any], excluded: Container[Any], group: int | None, passed: list[tuple[list[Any], Any]]
    ) -> tuple[Any, int, Any] | None:
        """The first entry of a heap that still holds. Those of `excluded` are taken out of it, into `passed`."""
        entries, jobs_of = self._entries, self._jobs_of
        while heap:
            item = heap[0]
            rank, _, key = item
            entry = entries.get(key)
            jobs = jobs_of(key)
            if (
                entry is None
                or entry.followers
                or (
                    (jobs is None or jobs[0] != -rank)
                    if group is None
                    else (jobs is not None or entry.place != (group, rank))
                )
            ):
                heapq.heappop(heap)
            elif key in excluded:
                passed.append((heap, heapq.heappop(heap)))
            else:
                return item
        return None
