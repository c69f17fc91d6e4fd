"""The tokens a cache holds, and the chain of block keys that they make."""

from collections.abc import Sequence

import numpy as np

from ..store.blocks.keys import Key, block_key, encode_tokens, state_root


class TokenChain:
    """A growing and croppable sequence of token ids, cut into blocks of `block_size`.

    Keys are computed once per full block; `root` is the parent of the first. Blocks begin at position `base`;
    the tokens before that have their KV elsewhere, and `root` names it. `secret` keys the digests.
    """

    def __init__(
        self,
        root: Key,
        block_size: int,
        ids: Sequence[int] | np.ndarray = (),
        base: int = 0,
        secret: bytes = b"",
    ) -> None:
        self.root = root
        self._secret = secret
        self.block_size = block_size
        self.base = base
        self._ids = np.empty(max(64, len(ids)), dtype=np.int64)
        self._length = 0
        self._keys: list[Key] = []
        self.append(ids)

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> np.ndarray:
        """The ids `[tokens]`, a view that is valid until the next change."""
        return self._ids[: self._length]

    def append(self, ids: Sequence[int] | np.ndarray) -> None:
        end = self._length + len(ids)
        if end > len(self._ids):
            grown = np.empty(max(end, 2 * len(self._ids)), dtype=np.int64)
            grown[: self._length] = self.ids
            self._ids = grown
        self._ids[self._length : end] = ids
        self._length = end

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        self._length = min(self._length, max(length, 0))
        del self._keys[self.full_blocks() :]

    def block_at(self, position: int) -> int:
        """The number of the block that a token at `position` is in."""
        return max(position - self.base, 0) // self.block_size

    def full_blocks(self) -> int:
        return self.block_at(self._length)

    def bounds(self, block: int) -> tuple[int, int]:
        """Positions `[start, stop)` of a block; the last one may be short."""
        start = self.base + block * self.block_size
        return start, min(start + self.block_size, self._length)

    def tokens(self, block: int) -> bytes:
        """The encoded ids of a block."""
        start, stop = self.bounds(block)
        return encode_tokens(self._ids[start:stop])

    def full_keys(self) -> list[Key]:
        """The keys of all full blocks."""
        first, count = len(self._keys), self.full_blocks()
        parent = self.parent(first)
        size = self.block_size
        encoded = encode_tokens(self._ids[self.base + first * size : self.base + count * size])
        for start in range(0, len(encoded), 4 * size):
            parent = block_key(parent, encoded[start : start + 4 * size], self._secret)
            self._keys.append(parent)
        return self._keys[:count]

    def parent(self, block: int) -> Key:
        return self.root if block == 0 else self.key(block - 1)

    def checkpoint(self, tokens: int) -> tuple[Key, Key, int]:
        """The names that go with the running states after the first `tokens` tokens, at least one of them.

        Returns:
            Their parent, the block before the last one (empty if there is none), and where the last one starts.
        """
        block = self.block_at(tokens - 1)
        before = self.key(block - 1) if block else b""
        return state_root(self.parent(block), self._secret), before, self.bounds(block)[0]

    def checkpoint_key(self, tokens: int) -> Key:
        """The name of the running states after the first `tokens` tokens."""
        parent, _, start = self.checkpoint(tokens)
        return block_key(parent, encode_tokens(self._ids[start:tokens]), self._secret)

    def key(self, block: int) -> Key:
        """The key of a block, as it is now: that of a short last block changes as it grows."""
        if block < self.full_blocks():
            return self._keys[block] if block < len(self._keys) else self.full_keys()[block]
        return block_key(self.parent(block), self.tokens(block), self._secret)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading ids on which two arrays `[tokens]` agree."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length
