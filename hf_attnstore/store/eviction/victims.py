"""Which blocks on disk go next: what `EvictionOrder` does for memory, over the index instead of over all blocks."""

import heapq
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from ..blocks.keys import Key
from ..index.rows import BlockRow
from .lookahead import Lookahead
from .policies import LRU, MOST_GROUPS, Place, Policy

_PAGE = 16


class Leaves(Protocol):
    """What the search asks of an index."""

    def leaves(self, group: int, limit: int, offset: int) -> list[BlockRow]:
        """Blocks of a group with nothing after them, by stamp, the end of a chain first."""

    def block(self, key: Key) -> BlockRow | None: ...

    def followers(self, key: Key) -> int:
        """How many blocks come after one."""


@dataclass
class Order:
    """Who goes first: a policy, and the upcoming turns for which it has exceptions."""

    policy: Policy = field(default_factory=LRU)
    lookahead: Lookahead = field(default_factory=Lookahead)


class VictimSearch:
    """Names blocks to evict, one after the other, as if each were gone when the next is asked for.

    The index must not change meanwhile. Raises what the index raises.

    Args:
        keep: keys of blocks that stay.
        newcomer: where the block will stand for which they go. As long as nobody says what comes next, nothing goes for
            it that the policy thinks is worth more (`Policy.admits`).
    """

    def __init__(
        self, index: Leaves, order: Order, now: float, keep: Collection[Key] = (), newcomer: Place | None = None
    ) -> None:
        self._index = index
        self._policy = order.policy
        self._lookahead = order.lookahead
        self._now = now
        self._keep = keep
        self._newcomer = newcomer if not order.lookahead.jobs else None
        self.refused = False
        """What goes next is worth more than the newcomer for which it would."""
        self._heads: list[list[tuple[float, int, Key]]] = [[] for _ in range(MOST_GROUPS)]
        self._read = [0] * MOST_GROUPS
        self._last: list[tuple[float, int] | None] = [(float("-inf"), 0)] * MOST_GROUPS
        """How far each group has been read; None where all of it was."""
        self._rows: dict[Key, BlockRow] = {}
        self._jobs: list[tuple[int, int, Key]] = []
        self._gone: dict[Key, int] = {}
        """By block, how many of its followers are gone."""

    def next(self) -> BlockRow | None:
        """The block that goes next; None if nothing may go."""
        best: tuple[float, float] | None = None
        chosen: tuple[int, Place] | None = None
        for group in range(MOST_GROUPS):
            head = self._head(group)
            if head is not None:
                # more groups there are where another policy was at work
                place = Place(min(group, self._policy.groups - 1), head[0])
                value = (self._policy.worth(place, self._now), head[0])
                if best is None or value < best:
                    best, chosen = value, (group, place)
        if chosen is not None:
            group, place = chosen
            if self._newcomer is not None and not self._policy.admits(self._newcomer, place, self._now):
                self.refused = True
                return None
            _, _, key = heapq.heappop(self._heads[group])
        elif self._jobs:
            _, _, key = heapq.heappop(self._jobs)
        else:
            return None
        row = self._rows.pop(key)
        self._expose(row)
        return row

    def _head(self, group: int) -> tuple[float, int, Key] | None:
        heads = self._heads[group]
        while True:
            last = self._last[group]
            if heads and (last is None or heads[0][:2] <= last):
                return heads[0]
            if last is None:
                return None
            rows = self._index.leaves(group, _PAGE, self._read[group])
            self._read[group] += len(rows)
            for row in rows:
                self._add(row)
            self._last[group] = (rows[-1].stamp, -rows[-1].start) if len(rows) == _PAGE else None

    def _add(self, row: BlockRow) -> None:
        if row.key in self._keep or row.key in self._rows:
            return
        self._rows[row.key] = row
        job = self._lookahead.job(row.key)
        if job is None:
            heapq.heappush(self._heads[row.group], (row.stamp, -row.start, row.key))
        else:
            heapq.heappush(self._jobs, (-job, -row.start, row.key))

    def _expose(self, row: BlockRow) -> None:
        """What a block follows may go next, if that was the last one after it."""
        parent = row.continues
        self._gone[parent] = self._gone.get(parent, 0) + 1
        before = self._index.block(parent)
        if before is not None and self._index.followers(parent) == self._gone[parent]:
            self._add(before.moved(self._policy.left(before.place, row.place)))
