"""Memory and disk of a simulated store: the store's own accounts, order, policy and look-ahead, without any bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ..store.book import TierBook
from ..store.lookahead import Lookahead
from ..store.policies import Place, Policy, Use, make_policy


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
        evicted: called with every block that memory gives up.
    """

    def __init__(
        self,
        memory: int,
        disk: int = 0,
        policy: str | Policy = "lru",
        evicted: Callable[[Hashable], None] = lambda key: None,
    ) -> None:
        self.policy = make_policy(policy) if isinstance(policy, str) else policy
        self.lookahead = Lookahead()
        self.memory = TierBook(memory, self.policy, self.lookahead, evicted)
        self.disk = TierBook(disk, self.policy, self.lookahead) if disk else None
        self._books = [self.memory] if self.disk is None else [self.memory, self.disk]

    def find(self, blocks: Sequence[Hashable]) -> Found:
        """Where the blocks of a prompt are, up to the first that is nowhere."""
        memory, disk = self.memory, self.disk
        slow: list[Hashable] = []
        for number, key in enumerate(blocks):
            if key not in memory:
                if disk is None or key not in disk:
                    return Found(number, slow)
                slow.append(key)
        return Found(len(blocks), slow)

    def place(self, key: Hashable) -> Place | None:
        """Where a block stands in the order; None if it is nowhere."""
        for book in self._books:
            place = book.order.place(key)
            if place is not None:
                return place
        return None

    def used(
        self,
        now: float,
        blocks: Sequence[Hashable],
        *,
        tokens: int,
        short: bool,
        known: Sequence[Hashable] = (),
        matched: Hashable | None = None,
    ) -> int:
        """A turn that ends with `blocks`, of which the last may be `short`. Returns the turn's group.

        Args:
            known: short blocks that it went on from.
            matched: the last block that it reused.
        """
        whole = blocks[:-1] if short else blocks
        place = self.place(matched) if matched is not None else None
        group = self.policy.group(Use(now, whole, tokens, blocks[-1] if short else None, known, place))
        for book in self._books:
            book.order.used(whole, group, now)
            if short:
                before = book.order.place(blocks[-1])
                if before is not None:
                    book.order.move(blocks[-1], self.policy.place(before, group, now, short=True))
        return group

    def admit(
        self,
        book: TierBook,
        now: float,
        blocks: Sequence[Hashable],
        start: int,
        sizes: Callable[[int], int],
        places: Callable[[int], Place],
        *,
        first: int = 0,
        dirty: bool = False,
    ) -> list[Hashable]:
        """Takes blocks of a chain into a tier, in order, as far as there is room. Returns those that are new there.

        Args:
            start: number of the chain's first block.
            sizes, places: bytes and place of a block, by its number in `blocks`.
            first: number in `blocks` of the first one to look at.
        """
        added: list[Hashable] = []
        protected: Hashable | None = None
        for number in range(first, len(blocks)):
            key = blocks[number]
            if key in book:
                continue
            parent = blocks[number - 1] if number else None
            # the end of the chain must not go to make room for its own continuation
            if parent is not None and parent in book and parent not in book.dirty:
                book.dirty.add(parent)
                protected = parent
            place = places(number)
            size = sizes(number)
            fits = book.reserve(size, now, place=place)
            if protected is not None:
                book.dirty.discard(protected)
                protected = None
            if not fits:
                break
            book.add(key, parent, start + number, size, place, dirty=dirty)
            added.append(key)
        return added

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
