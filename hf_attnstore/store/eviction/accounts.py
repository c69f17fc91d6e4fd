"""The accounts of a tier: bytes reserved and held under a cap, and who goes when room is needed. No bytes here."""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate, takewhile

from .lookahead import Lookahead
from .order import EvictionOrder
from .policies import Place, Policy


class TierBook:
    """Blocks by key with their sizes. A block that is `dirty` is nowhere else yet and stays.

    Args:
        capacity: bytes; what is reserved and held is never more.
        policy: who goes first.
        lookahead: the upcoming turns, whose blocks go last; shared by the tiers.
        evicted: called with blocks that had to go.
    """

    def __init__(
        self,
        capacity: int,
        policy: Policy,
        lookahead: Lookahead | None = None,
        evicted: Callable[[Sequence[Hashable]], None] = lambda keys: None,
    ) -> None:
        self.capacity = capacity
        self.used = 0
        self.dirty: set[Hashable] = set()
        self.evictions = 0
        self.order = EvictionOrder(policy, lookahead)
        self._sizes: dict[Hashable, int] = {}
        self._evicted = evicted

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sizes

    def size(self, key: Hashable) -> int:
        """Bytes of a block; 0 if it is not here."""
        return self._sizes.get(key, 0)

    def sizes(self, keys: Iterable[Hashable]) -> list[int]:
        """Bytes of blocks; 0 for one that is not here."""
        size = self._sizes.get
        return [size(key, 0) for key in keys]

    def make_room(
        self, nbytes: int, now: float, *, evict: bool = True, job: int | None = None, newcomer: Place | None = None
    ) -> bool:
        """Evicts until `nbytes` more fit.

        Args:
            evict: else only says whether they fit as it is.
            job: the upcoming turn for which this is; None for one that is running.
            newcomer: where the block will stand for which this is, if that may be refused (`Policy.admits`).

        Returns:
            False if there is no room for them.
        """
        if nbytes > self.capacity:
            return False
        missing = self.used + nbytes - self.capacity
        if missing <= 0:
            return True
        if not evict:
            return False
        gone = self.order.evict(missing, self._sizes, now, self.dirty, job=job, newcomer=newcomer)
        if gone:
            self.used -= sum(map(self._sizes.pop, gone))
            self.evictions += len(gone)
            self._evicted(gone)
        return self.used + nbytes <= self.capacity

    def shrink(self, capacity: int, now: float) -> None:
        """Sets the cap, and evicts down to it as far as that can be done now."""
        self.capacity = capacity
        self.make_room(0, now)

    def reserve(
        self, nbytes: int, now: float, *, evict: bool = True, job: int | None = None, newcomer: Place | None = None
    ) -> bool:
        """Takes `nbytes` out of the free room. False if there is none; see `make_room`."""
        if not self.make_room(nbytes, now, evict=evict, job=job, newcomer=newcomer):
            return False
        self.used += nbytes
        return True

    def reserve_leading(self, sizes: Sequence[int], now: float, *, job: int | None = None) -> int:
        """Reserves for as many of these sizes, from the first on, as there is room for. Returns how many."""
        total = sum(sizes)
        if self.reserve(total, now, job=job):
            return len(sizes)
        if total > self.capacity:
            return len(list(takewhile(lambda size: self.reserve(size, now, job=job), sizes)))
        sums = list(accumulate(sizes))  # what may go has gone
        count = bisect_right(sums, self.capacity - self.used)
        self.used += sums[count - 1] if count else 0
        return count

    def release(self, nbytes: int) -> None:
        """Gives reserved bytes back."""
        self.used -= nbytes

    def add(
        self, key: Hashable, parent: Hashable, start: int, nbytes: int, place: Place, *, dirty: bool = False
    ) -> bool:
        """Takes over a block whose bytes were reserved; gives them back if it is here already (then False)."""
        if key in self._sizes:
            self.used -= nbytes
            self.order.move(key, place)
            return False
        self._sizes[key] = nbytes
        self.order.add(key, parent, start, place)
        if dirty:
            self.dirty.add(key)
        return True

    def add_chain(
        self,
        keys: Sequence[Hashable],
        parent: Hashable,
        start: int,
        sizes: Sequence[int],
        place: Place,
        *,
        dirty: bool = False,
    ) -> None:
        """Takes over blocks that follow one another, none of which is here, and whose bytes were reserved."""
        self._sizes.update(zip(keys, sizes, strict=True))
        self.order.add_chain(keys, parent, start, place)
        if dirty:
            self.dirty.update(keys)

    def leading(self, keys: Iterable[Hashable]) -> int:
        """How many of these blocks, from the first on, are here."""
        return len(list(takewhile(self._sizes.__contains__, keys)))

    def absent(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """Those of these blocks that are not here."""
        sizes = self._sizes
        return [key for key in keys if key not in sizes]

    def has_any(self, keys: Iterable[Hashable]) -> bool:
        """Whether any of these blocks is here."""
        return not self._sizes.keys().isdisjoint(keys)

    def remove(self, key: Hashable) -> None:
        """Takes a block out. Harmless if it is not here."""
        nbytes = self._sizes.pop(key, None)
        if nbytes is not None:
            self.used -= nbytes
            self.order.remove(key)
            self.dirty.discard(key)

    def shrink_block(self, key: Hashable, nbytes: int) -> None:
        """A block that is here takes no more than so many bytes now."""
        self.used += nbytes - self._sizes[key]
        self._sizes[key] = nbytes

    def keys(self) -> Iterable[Hashable]:
        """All blocks. A copy."""
        return list(self._sizes)
