"""First in, first out over single blocks, whatever follows them: the plain baseline of caching studies."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from .replay import Hits, Requests, count_hits


def plain_fifo(requests: Requests, capacity: int) -> Hits:
    """What a store of `capacity` blocks finds that drops the oldest block even if others go on from it."""
    held: set[Hashable] = set()
    order: deque[Hashable] = deque()
    hits = Hits()
    for row in requests.rows:
        count = next((number for number, key in enumerate(row.prompt) if key not in held), len(row.prompt))
        count_hits(hits, row, count, 0, requests.block_tokens)
        held.discard(row.superseded)
        for key in row.blocks:
            if key in held:
                continue
            while len(held) >= capacity:
                held.discard(order.popleft())
            held.add(key)
            order.append(key)
    return hits
