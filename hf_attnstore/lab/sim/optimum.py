"""The best that any policy could do: what is used farthest in the future goes, or is not taken in at all.

Belady's MIN with bypass is optimal for blocks of one size. A chain's beginning is used whenever its continuation is, so
with ties broken towards the end of chains MIN holds prefixes only, and what it finds is what counts here: contiguous
beginnings.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable

from .replay import Hits, Requests, count_hits

NEVER = 1 << 60


def optimum(requests: Requests, capacity: int) -> Hits:
    """What a store of `capacity` blocks finds with full knowledge of what comes."""
    rows = requests.rows
    following: list[list[int]] = []
    upcoming: dict[Hashable, int] = {}
    for number in range(len(rows) - 1, -1, -1):
        blocks = rows[number].blocks
        following.append([upcoming.get(key, NEVER) for key in blocks])
        upcoming.update(dict.fromkeys(rows[number].prompt, number))
    following.reverse()
    held: dict[Hashable, int] = {}
    heap: list[tuple[int, int, Hashable]] = []
    hits = Hits()
    for number, row in enumerate(rows):
        count = 0
        for key in row.prompt:
            if key not in held:
                break
            count += 1
        count_hits(hits, row, count, 0, requests.block_tokens)
        if row.superseded is not None:
            held.pop(row.superseded, None)
        for place, (key, following_use) in enumerate(zip(row.blocks, following[number], strict=True)):
            if following_use == NEVER:
                held.pop(key, None)
                continue
            if key not in held and len(held) >= capacity:
                victim = _farthest(heap, held)
                if victim is None or victim[:2] >= (-following_use, -place):
                    break  # nothing here is of less use, nor will the continuation of this be of more
                heapq.heappop(heap)
                del held[victim[2]]
            held[key] = following_use
            heapq.heappush(heap, (-following_use, -place, key))
    return hits


def _farthest(heap: list[tuple[int, int, Hashable]], held: dict[Hashable, int]) -> tuple[int, int, Hashable] | None:
    while heap:
        use, _, key = heap[0]
        if held.get(key) == -use:
            return heap[0]
        heapq.heappop(heap)
    return None
