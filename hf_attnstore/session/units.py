"""Units: KV that is of use as a whole or not at all, such as what a decoder keeps of its encoder's output.

A unit is a chain of blocks of its own, below a root that names what it was computed from. Its positions have no
token ids; in their place stands whether their block is the last one. So a unit is found without knowing how long it
is, and one whose end is missing is never taken for a whole one.
"""

import numpy as np

from ..store.blocks.keys import Key, block_key, encode_tokens
from .matching import Directory
from .spans import Span

_MORE, _LAST = 0, 1


def unit_ids(positions: int, block_size: int) -> np.ndarray:
    """What stands for the ids `[positions]` of a unit's positions."""
    last = (positions - 1) // block_size * block_size
    return np.where(np.arange(positions) < last, _MORE, _LAST)


def find_unit(root: Key, block_size: int, directory: Directory) -> list[Span]:
    """Where the unit below `root` is; empty where not all of it is there."""
    spans: list[Span] = []
    parent = root
    more = encode_tokens([_MORE] * block_size)
    while True:
        first = len(spans) * block_size
        last = directory.nearest(parent, [_LAST] * block_size)
        if last is not None and last.common == last.token_count:
            spans.append(Span(last.key, 0, last.token_count, first, last.token_count))
            return spans
        parent = block_key(parent, more, directory.secret)
        if not directory.known([parent]):
            return []
        spans.append(Span(parent, 0, block_size, first, block_size))
