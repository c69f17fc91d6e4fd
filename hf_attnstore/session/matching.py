"""Finding what can be reused: the longest known beginning of a prompt, token by token."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..store.blocks import Match
from ..store.keys import Key
from .chain import TokenChain
from .spans import Span


class Directory(Protocol):
    """Who knows which blocks there are: an `AttentionStore`."""

    secret: bytes

    def known(self, keys: Sequence[Key]) -> int: ...

    def nearest(self, parent: Key, ids: Sequence[int]) -> Match | None: ...


def match_prefix(ids: np.ndarray, root: Key, block_size: int, directory: Directory, base: int = 0) -> list[Span]:
    """The longest beginning of `ids` `[tokens]` that the directory's blocks hold, of whichever session.

    Whole blocks are found by key; where the chain ends, the block that agrees longest with the rest gives its
    first tokens. Spans follow each other without gaps, from position `base`, where the chain below `root` begins.
    """
    chain = TokenChain(root, block_size, ids, base, directory.secret)
    keys = chain.full_keys()
    known = directory.known(keys)
    spans = [Span(key, 0, block_size, base + n * block_size, block_size) for n, key in enumerate(keys[:known])]
    position = base + len(spans) * block_size
    if position < len(ids):
        nearest = directory.nearest(chain.parent(len(spans)), ids[position : position + block_size].tolist())
        if nearest is not None:
            spans.append(Span(nearest.key, 0, nearest.common, position, nearest.token_count))
    return spans
