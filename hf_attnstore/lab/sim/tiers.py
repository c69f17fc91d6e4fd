"""Memory and disk of a simulated store: the store's own accounts, order, policy and look-ahead, without any bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ...store.eviction.accounts import TierBook
from ...store.eviction.lookahead import Lookahead
from ...store.eviction.policies import Place, Policy, Use, make_policy


@dataclass(slots=True)
class Found:
    """How many blocks of a prompt's beginning are there.

    Attributes:
        blocks: all of them.
        slow: those of them that are only on disk.
    """

    blocks: int
    slow: list[Hashable]


class Tiers:
    """What a store holds, tier by tier.

    Args:
        memory, disk: bytes; a disk of 0 is none, and what goes out of memory is then gone.
        policy: by name, or one that is there already.
        evicted: called with blocks that memory gives up.
    """

    def __init__(
        self,
        memory: int,
        disk: int = 0,
        policy: str | Policy = "lru",
        evicted: Callable[[Sequence[Hashable]], None] = lambda keys: None,
    ) -> None:
        self.policy = make_policy(policy) if isinstance(policy, str) else policy
        self.lookahead = Lookahead()
        self.memory = TierBook(memory, self.policy, self.lookahead, evicted)
        self.disk = TierBook(disk, self.policy, self.lookahead) if disk else None
        self._books = [self.memory] if self.disk is None else [self.memory, self.disk]

    def find(self, blocks: Sequence[Hashable]) -> Found:
        """Where the blocks of a prompt are, up to the first that is nowhere."""
        memory, disk = self.memory, self.disk
        if disk is None:
            return Found(memory.leading(blocks), [])
        slow = memory.absent(blocks)
        count = disk.leading(slow) if slow else 0
        if count == len(slow):
            return Found(len(blocks), slow)
        return Found(blocks.index(slow[count]), slow[:count])

    def loaded(self, blocks: Sequence[Hashable], now: float) -> None:
        """A turn has read these blocks: those in memory count as used now."""
        self.memory.order.touch(blocks, now)

    def newcomer(self, now: float) -> Place:
        """Where a block stands whose turn is not over."""
        return self.policy.place(None, self.policy.newcomers, now)

    def turn_is_over(
        self,
        now: float,
        blocks: Sequence[Hashable],
        *,
        tokens: int,
        short: bool,
        went_on_from: Hashable | None = None,
        conversation: Hashable | None = None,
    ) -> None:
        """Takes notice of a turn that ends with `blocks`, which are saved already, as far as there was room.

        Args:
            tokens: of the blocks.
            short: the last of them is not full.
            went_on_from: the last block that the turn reused.
            conversation: whose turn it was, where conversations have names.
        """
        if not blocks:
            return
        chain, end = (blocks[:-1], blocks[-1]) if short else (blocks, None)
        matched = None
        known: tuple[Hashable, ...] = ()
        if went_on_from is not None:
            known = (went_on_from,)
            lowest = self._books[-1].order
            if lowest.followers(went_on_from) <= 1:
                matched = lowest.place(went_on_from)
        group = self.policy.group(Use(now, chain, tokens, end, known, matched, self._holds, conversation))
        for book in self._books:
            book.order.used(chain, group, now, short=end)

    def _holds(self, key: Hashable) -> bool:
        return any(key in book for book in self._books)

    def admit(
        self,
        book: TierBook,
        now: float,
        blocks: Sequence[Hashable],
        start: int,
        sizes: Sequence[int],
        place: Place,
        *,
        first: int = 0,
        dirty: bool = False,
        protect: bool = False,
        before: Hashable | None = None,
    ) -> list[Hashable]:
        """Takes blocks of a chain into a tier, in order, as far as there is room, and into the lowest as far as the
        policy admits them. Returns those that are new there.

        Args:
            start: number of the chain's first block.
            sizes: bytes of `blocks[first:]`.
            place: where the new ones stand.
            first: number in `blocks` of the first one to look at.
            dirty: they stay until somebody takes them out of the tier's `dirty`.
            before: what the first of `blocks` follows, if that is known.
            protect: the end of the chain must not go to make room for what continues it.
        """
        there = book.leading(blocks[first:])
        first += there
        if first >= len(blocks):
            return []
        new, sizes = blocks[first:], sizes[there:]
        parent = blocks[first - 1] if first else before
        distinct = not book.has_any(new) and len(set(new)) == len(new)
        newcomer = place if book is self._books[-1] else None
        if distinct and self._reserve_all(book, sizes, now, parent, protect, newcomer):
            book.add_chain(new, parent, start + first, sizes, place, dirty=dirty)
            return list(new)
        added: list[Hashable] = []
        for number, (key, size) in enumerate(zip(new, sizes, strict=True), first):
            if key not in book:
                if not self._reserve(book, size, now, parent if protect else None, newcomer):
                    break
                book.add(key, parent, start + number, size, place, dirty=dirty)
                added.append(key)
            parent = key
        return added

    def _reserve_all(
        self,
        book: TierBook,
        sizes: Sequence[int],
        now: float,
        parent: Hashable | None,
        protect: bool,
        newcomer: Place | None,
    ) -> bool:
        """Reserves room for all blocks that follow `parent`, or none. What the first is reserved for may be `parent`
        itself, unless `protect`; then that has a follower, and stays."""
        if not protect:
            if not self._reserve(book, sizes[0], now, None, newcomer):
                return False
            if self._reserve(book, sum(sizes[1:]), now, parent, newcomer):
                return True
            book.release(sizes[0])
            return False
        return self._reserve(book, sum(sizes), now, parent, newcomer)

    @staticmethod
    def _reserve(book: TierBook, size: int, now: float, protected: Hashable | None, newcomer: Place | None) -> bool:
        """Reserves room for what follows `protected`, which must not go for it."""
        if protected is None or protected not in book or protected in book.dirty:
            return book.reserve(size, now, newcomer=newcomer)
        book.dirty.add(protected)
        try:
            return book.reserve(size, now, newcomer=newcomer)
        finally:
            book.dirty.discard(protected)

    def supersede(self, key: Hashable) -> None:
        """A longer block has taken the place of this one."""
        for book in self._books:
            book.remove(key)

    def queued(self, name: Hashable, blocks: Sequence[Hashable]) -> None:
        """A turn that needs these blocks will run after all that are known to come."""
        self._rescheduled(self.lookahead.push(name, blocks))

    def started(self) -> None:
        """The first of the turns to come runs now."""
        self._rescheduled(self.lookahead.pop())

    def _rescheduled(self, changed: set[Hashable]) -> None:
        for book in self._books:
            book.order.rescheduled(changed)
