"""Finding what can be reused: the longest known beginning of a prompt, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..store.blocks.block import Match
from ..store.blocks.keys import Key
from .chain import TokenChain
from .spans import Span


@dataclass(frozen=True)
class Checkpoint:
    """The running states of all layers after `tokens` tokens."""

    tokens: int
    key: Key


class Directory(Protocol):
    """Who knows which blocks there are: an `AttentionStore`."""

    secret: bytes

    def known(self, keys: Sequence[Key]) -> int: ...

    def nearest(self, parent: Key, ids: Sequence[int]) -> Match | None: ...

    def latest_checkpoint(self, parents: Sequence[Key], ids: Sequence[np.ndarray]) -> tuple[int, Key, int] | None: ...


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


def match_checkpoint(
    ids: np.ndarray, root: Key, block_size: int, directory: Directory, base: int = 0
) -> Checkpoint | None:
    """The checkpoint that sums up the longest beginning of `ids` `[tokens]`."""
    chain = TokenChain(root, block_size, ids, base, directory.secret)
    numbers = range(chain.block_at(len(ids) - 1) + 1) if len(ids) > base else range(0)
    bounds = [chain.bounds(number) for number in numbers]
    parents = [chain.checkpoint(stop)[0] for _, stop in bounds]
    found = directory.latest_checkpoint(parents, [ids[start:stop] for start, stop in bounds])
    return Checkpoint(bounds[found[0]][0] + found[2], found[1]) if found is not None else None
