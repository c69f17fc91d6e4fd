"""The pure parts, against models so simple that they are right."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_attnstore.cache.layers.buffers import HostBuffers
from hf_attnstore.session.chain import TokenChain, common_prefix
from hf_attnstore.session.matching import match_prefix
from hf_attnstore.session.spans import Span, crop, overlapping, total_tokens
from hf_attnstore.store.blocks.block import Match
from hf_attnstore.store.blocks.keys import Key, block_key, chain_root, decode_tokens, encode_tokens
from hf_attnstore.store.transfer.depth import lookahead_depth

ROOT = chain_root("f", "")
IDS = st.lists(st.integers(0, 3), max_size=40)


def test_the_key_of_a_known_block_is_what_it_always_was() -> None:
    root = chain_root("0" * 40, "someone", "raw")
    assert root.hex() == "e1f4449960e4964a890ead5fe08e02a825a713032e9cc4aa74fa22e2c3dee23f"
    assert (
        block_key(root, encode_tokens([1, 2, 300])).hex()
        == "003e486d829d5e438ece58d0b6c5484f5416f6254e717ea865af5d6f57c94268"
    )


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_encoding_is_reversible_and_sorts_like_the_ids(ids: list[int]) -> None:
    assert decode_tokens(encode_tokens(ids)).tolist() == ids
    assert encode_tokens(ids) < encode_tokens([*ids, 0])
    assert encode_tokens([0, 5]) < encode_tokens([1, 0])


@given(st.lists(st.one_of(IDS, st.integers(0, 60)), max_size=8), st.integers(1, 7))
def test_a_chain_that_grew_and_was_cropped_equals_a_fresh_one(steps: list[list[int] | int], size: int) -> None:
    chain, ids = TokenChain(ROOT, size), []
    for step in steps:
        if isinstance(step, int):
            chain.crop(step)
            ids = ids[:step]
        else:
            chain.append(step)
            ids = ids + step
        blocks = -(-len(ids) // size)
        _ = [chain.key(block) for block in range(blocks)]  # computed now, it must not be stale later
    fresh = TokenChain(ROOT, size, ids)
    assert chain.ids.tolist() == ids
    assert [chain.key(b) for b in range(blocks if steps else 0)] == [fresh.key(b) for b in range(-(-len(ids) // size))]


@given(IDS, IDS)
def test_common_prefix_counts_what_agrees(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)) == expected


SPANS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 3)), max_size=6)


def make_spans(shapes: list[tuple[int, int, int]]) -> list[Span]:
    spans, first = [], 0
    for number, (start, length, rest) in enumerate(shapes):
        spans.append(Span(bytes([number]), start, start + length, first, start + length + rest))
        first += length
    return spans


def positions(spans: Sequence[Span]) -> list[tuple[int, Key, int]]:
    """Every token: its position, its block, its place in the block."""
    return [(s.first + i, s.block, s.start + i) for s in spans for i in range(s.stop - s.start)]


@given(SPANS, st.integers(0, 40), st.integers(0, 40))
def test_cropping_and_cutting_spans_moves_no_token(shapes: list[tuple[int, int, int]], low: int, high: int) -> None:
    spans = make_spans(shapes)
    everything = positions(spans)
    assert positions(crop(spans, high)) == [p for p in everything if p[0] < high]
    assert total_tokens(crop(spans, high)) == min(high, total_tokens(spans))
    assert positions(list(overlapping(spans, low, high))) == [p for p in everything if low <= p[0] < high]


class Folder:
    """Blocks by content, searched one by one."""

    def __init__(self, conversations: list[list[int]], size: int) -> None:
        self.blocks: dict[Key, tuple[Key, list[int]]] = {}
        for ids in conversations:
            chain = TokenChain(ROOT, size, ids)
            for block in range(-(-len(ids) // size)):
                start, stop = chain.bounds(block)
                self.blocks[chain.key(block)] = (chain.parent(block), ids[start:stop])

    secret = b""

    def known(self, keys: Sequence[Key]) -> int:
        return next((n for n, key in enumerate(keys) if key not in self.blocks), len(keys))

    def nearest(self, parent: Key, ids: Sequence[int]) -> Match | None:
        best = None
        for key, (before, known) in self.blocks.items():
            common = common_prefix(np.array(known), np.array(ids))
            if before == parent and common > (best.common if best else 0):
                best = Match(key, common, len(known))
        return best


@given(st.lists(IDS, max_size=6), IDS, st.integers(1, 6))
def test_matching_finds_the_longest_beginning_of_any_conversation(
    known: list[list[int]], ids: list[int], size: int
) -> None:
    spans = match_prefix(np.array(ids, dtype=np.int64), ROOT, size, Folder(known, size))
    longest = max((common_prefix(np.array(ids), np.array(other)) for other in known), default=0)
    assert total_tokens(spans) == longest
    assert [p[0] for p in positions(spans)] == list(range(longest))


def test_looking_ahead_goes_by_what_was_measured() -> None:
    assert lookahead_depth(0, 0, 32) == 32, "nothing measured yet: everything is asked for"
    assert lookahead_depth(2.0, 1.0, 32) == 32, "loading is slower: the reader must never idle"
    assert lookahead_depth(0.1, 1.0, 32) == 2
    assert lookahead_depth(0.9, 1.0, 32) == 3


def test_a_buffer_returns_only_when_no_tensor_refers_to_it() -> None:
    buffers = HostBuffers(max_idle_bytes=1 << 20)
    tensor = buffers.empty((4, 50_000), torch.float32)
    address, view = tensor.data_ptr(), tensor[1, 10:20]
    view.fill_(7)
    del tensor
    assert buffers.idle_bytes == 0, "a view is still alive"
    other = buffers.empty((4, 50_000), torch.float32)
    other.zero_()
    assert other.data_ptr() != address
    assert view.tolist() == [7] * 10
    del view
    assert buffers.idle_bytes > 0
    assert buffers.empty((4, 50_000), torch.float32).data_ptr() == address, "used again"
    del other
    big = buffers.empty((600, 1000), torch.float32)
    del big
    assert buffers.idle_bytes <= 1 << 20, "more than may wait is given back"
    buffers.clear()
    assert buffers.idle_bytes == 0
