"""The memory tier: blocks in host memory under a hard byte cap.

Room is reserved before bytes are allocated, so blocks that are being filled or written count too.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator

from .blocks import Block
from .keys import Key
from .policy import LeafLRU


class MemoryTier:
    """Blocks by key. A block that is not on disk yet is `dirty` and stays; clean ones go least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: dict[Key, Block] = {}
        self._dirty: set[Key] = set()
        self._order = LeafLRU()
        self._by_parent: defaultdict[Key, set[Key]] = defaultdict(set)
        self._used = 0
        self._changed = threading.Condition(threading.RLock())
        self.evicted = 0

    @property
    def used(self) -> int:
        """Bytes held or reserved; never more than `capacity`, but for what was dirty or reserved when that shrank."""
        return self._used

    def __len__(self) -> int:
        return len(self._blocks)

    def reserve(self, nbytes: int, *, wait: bool = False, evict: bool = True) -> bool:
        """Takes `nbytes` out of the free room, evicting if `evict`. With `wait`, waits while blocks that are being
        written may still make room. False if there is none."""
        with self._changed:
            while not self._make_room(nbytes, evict):
                if not (wait and self._dirty and nbytes <= self.capacity):
                    return False
                self._changed.wait(timeout=1)
            self._used += nbytes
            return True

    def resize(self, capacity: int) -> None:
        """Sets the capacity. Evicts what is over it and on disk; what is dirty follows when it has been written."""
        with self._changed:
            self.capacity = capacity
            self._make_room(0, evict=True)
            self._changed.notify_all()

    def release(self, nbytes: int) -> None:
        """Gives reserved bytes back."""
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()

    def _make_room(self, nbytes: int, evict: bool) -> bool:
        if nbytes > self.capacity:
            return False
        while self._used + nbytes > self.capacity:
            victim = self._order.victim(self._dirty) if evict else None
            if victim is None:
                return False
            self._remove(victim)
            self.evicted += 1
        return True

    def _remove(self, key: Key) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self._order.remove(key)
            siblings = self._by_parent[block.meta.parent]
            siblings.discard(key)
            if not siblings:
                del self._by_parent[block.meta.parent]
            self._dirty.discard(key)
            self._used -= block.nbytes

    def insert(self, block: Block, *, dirty: bool) -> bool:
        """Takes over a block whose bytes were reserved; gives them back if it is here already (then False)."""
        key = block.meta.key
        with self._changed:
            if key in self._blocks:
                self._used -= block.nbytes
                self._order.touch([key])
                self._changed.notify_all()
                return False
            self._blocks[key] = block
            self._order.add(key, block.meta.predecessor, block.meta.start)
            self._by_parent[block.meta.parent].add(key)
            if dirty:
                self._dirty.add(key)
            else:
                self._make_room(0, evict=True)  # the capacity may have shrunk since the bytes were reserved
            return True

    def mark_clean(self, key: Key) -> None:
        """The block is on disk, or will never be: it may be evicted from now on."""
        with self._changed:
            self._dirty.discard(key)
            self._make_room(0, evict=True)
            self._changed.notify_all()

    def get(self, key: Key) -> Block | None:
        return self._blocks.get(key)

    def touch(self, keys: list[Key]) -> None:
        with self._changed:
            self._order.touch(keys)

    def discard(self, key: Key) -> None:
        with self._changed:
            self._remove(key)
            self._changed.notify_all()

    def drop_clean(self) -> None:
        """Empties the tier of everything that is on disk too."""
        with self._changed:
            for key in [key for key in self._blocks if key not in self._dirty]:
                self._remove(key)
            self._changed.notify_all()

    def followers(self, parent: Key) -> Iterator[Block]:
        """The blocks here that follow `parent`."""
        with self._changed:
            found = [self._blocks[key] for key in self._by_parent.get(parent, ())]
        return iter(found)
