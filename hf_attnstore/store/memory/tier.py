"""The memory tier: blocks in host memory under a hard byte cap.

Room is reserved before bytes are allocated, so blocks that are being filled or written count too.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from ..blocks.block import Block, Match
from ..blocks.keys import Key, common_prefix
from ..blocks.tier import Tier
from ..eviction.accounts import TierBook
from ..eviction.lookahead import Lookahead
from ..eviction.policies import Place, Policy
from ..processes.forking import watch


def _itself(block: Block) -> Block:
    return block


class MemoryTier(Tier):
    """Blocks by key. A block that is not on disk yet is `dirty` and stays; the policy says which of the others go.

    Safe to use from several threads. Times are those of `clock`, in seconds.
    """

    name = "memory"

    def __init__(
        self,
        capacity: int,
        policy: Policy,
        lookahead: Lookahead | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._book = TierBook(capacity, policy, lookahead, self._evict)
        self._policy = policy
        self._clock = clock
        self._blocks: dict[Key, Block] = {}
        self._by_parent: defaultdict[Key, set[Key]] = defaultdict(set)
        self._changed = threading.Condition(threading.RLock())
        watch(self)

    def after_fork_in_child(self) -> None:
        self._changed = threading.Condition(threading.RLock())

    @property
    def capacity(self) -> int:
        return self._book.capacity

    @property
    def used(self) -> int:
        """Bytes held or reserved; never more than `capacity`, but for what was dirty or reserved when that shrank."""
        return self._book.used

    @property
    def evicted(self) -> int:
        """How many blocks had to go for want of room."""
        return self._book.evictions

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def dirty(self) -> int:
        """How many blocks are still to be written."""
        return len(self._book.dirty)

    def resize(self, capacity: int) -> None:
        """Sets the capacity. Evicts what is over it and on disk; what is dirty follows when it has been written."""
        with self._changed:
            self._book.shrink(capacity, self._clock())
            self._changed.notify_all()

    def reserve(self, nbytes: int, *, wait: bool = False, evict: bool = True, job: int | None = None) -> bool:
        """Takes `nbytes` out of the free room, evicting if `evict`. With `wait`, waits while blocks that are being
        written may still make room. False if there is none.

        Args:
            job: the upcoming turn for which this is; what an earlier one needs is not evicted for it.
        """
        with self._changed:
            while not self._book.reserve(nbytes, self._clock(), evict=evict, job=job):
                if not (wait and self._book.dirty and nbytes <= self.capacity):
                    return False
                self._changed.wait(timeout=1)
            return True

    def release(self, nbytes: int) -> None:
        """Gives reserved bytes back."""
        with self._changed:
            self._book.release(nbytes)
            self._changed.notify_all()

    def _evict(self, keys: Sequence[Hashable]) -> None:
        """The book has let go of blocks."""
        for key in keys:
            assert isinstance(key, bytes)
            self._forget(self._blocks.pop(key))

    def _forget(self, block: Block) -> None:
        siblings = self._by_parent[block.meta.parent]
        siblings.discard(block.meta.key)
        if not siblings:
            del self._by_parent[block.meta.parent]

    def put(
        self, block: Block, supersedes: Key | None = None, *, dirty: bool = True, place: Place | None = None
    ) -> bool:
        """Takes over a block whose bytes were reserved; gives them back if it is here already (then False).

        Args:
            supersedes: stays until what takes its place is on disk.
            place: where it stands; default: that of a new one.
        """
        meta = block.meta
        with self._changed:
            if place is None:
                place = self._policy.place(None, self._policy.newcomers, self._clock())
            if not self._book.add(meta.key, meta.predecessor, meta.start, block.nbytes, place, dirty=dirty):
                self._changed.notify_all()
                return False
            self._blocks[meta.key] = block
            self._by_parent[meta.parent].add(meta.key)
            if not dirty:
                self._book.make_room(0, self._clock())  # the capacity may have shrunk since the bytes were reserved
            return True

    def replace(self, old: Block, new: Block) -> None:
        """Keeps a block in another form, that takes no more room. Harmless if `old` is not here any more."""
        key = old.meta.key
        with self._changed:
            if self._blocks.get(key) is old:
                self._blocks[key] = new
                self._book.shrink_block(key, new.nbytes)
                self._changed.notify_all()

    def mark_clean(self, key: Key) -> None:
        """The block is on disk, or will never be: it may be evicted from now on."""
        with self._changed:
            self._book.dirty.discard(key)
            self._book.make_room(0, self._clock())
            self._changed.notify_all()

    def get(self, key: Key) -> Block | None:
        return self._blocks.get(key)

    def find(self, keys: Sequence[Key]) -> set[Key]:
        return {key for key in keys if key in self._blocks}

    def sources(self, keys: Sequence[Key]) -> Mapping[Key, Callable[[], Block]]:
        held = ((key, self._blocks.get(key)) for key in keys)
        return {key: partial(_itself, block) for key, block in held if block is not None}

    def sizes(self, keys: Sequence[Key]) -> dict[Key, int]:
        return {key: opens().nbytes for key, opens in self.sources(keys).items()}

    def place(self, key: Key) -> Place | None:
        """Where a block stands; None if it is not here."""
        return self._book.order.place(key)

    def used_by_turn(self, chain: Sequence[Key], group: int, now: float, *, short: Key | None = None) -> None:
        """A turn of a policy's `group` used the whole blocks `chain` and the short one after them."""
        with self._changed:
            self._book.order.used(chain, group, now, short=short)

    def touch(self, keys: Sequence[Key]) -> None:
        with self._changed:
            self._book.order.touch(keys, self._clock())

    def reschedule(self, schedule: Callable[[], Iterable[Hashable]]) -> None:
        """Changes the look-ahead, by a function that says for which blocks that changes something."""
        with self._changed:
            self._book.order.rescheduled(schedule())

    def delete(self, keys: Sequence[Key]) -> None:
        with self._changed:
            for key in keys:
                self._remove(key)
            self._changed.notify_all()

    def _remove(self, key: Key) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self._book.remove(key)
            self._forget(block)

    def drop_clean(self) -> None:
        """Empties the tier of everything that is on disk too."""
        with self._changed:
            for key in [key for key in self._blocks if key not in self._book.dirty]:
                self._remove(key)
            self._changed.notify_all()

    def followers(self, parent: Key) -> Iterator[Block]:
        """The blocks here that follow `parent`."""
        with self._changed:
            found = [self._blocks[key] for key in self._by_parent.get(parent, ())]
        return iter(found)

    def nearest(self, parent: Key, tokens: bytes, beyond: int) -> Match | None:
        best: Match | None = None
        for block in self.followers(parent):
            common = common_prefix(block.meta.tokens, tokens)
            if common > (best.common if best else beyond):
                best = Match(block.meta.key, common, block.meta.token_count)
        return best

    def follower(self, parent: Key, block_size: int) -> Key | None:
        block = next(self.followers(parent), None)
        return block.meta.key if block is not None else None

    def followed(self, parents: Sequence[Key]) -> set[Key]:
        return {parent for parent in parents if parent in self._by_parent}

    def longest_beginning(self, parent: Key, tokens: bytes) -> tuple[Key, int] | None:
        metas = [b.meta for b in self.followers(parent) if tokens.startswith(b.meta.tokens) and b.meta.tokens]
        longest = max(metas, key=lambda meta: meta.token_count, default=None)
        return (longest.key, longest.token_count) if longest is not None else None
