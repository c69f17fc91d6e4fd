"""Views, windows and manifests against a conversation kept as a plain list."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attnstore.errors import CacheUseError, ContextWindowError
from hf_attnstore.session.chain import TokenChain
from hf_attnstore.session.manifests import read_manifest, write_manifest
from hf_attnstore.session.spans import Span, crop, total_tokens
from hf_attnstore.session.view import View
from hf_attnstore.session.window import Window
from hf_attnstore.store.blocks.keys import Key, chain_root

ROOT = chain_root("f", "")
SIZE = 4


@dataclass
class Model:
    """A conversation as lists: ids, which of them are in view, and for each in view the place its KV was made for."""

    ids: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    made_for: list[int] = field(default_factory=list)
    blocks: dict[Key, tuple[int, np.ndarray]] = field(default_factory=dict)

    def grow(self, view: View, new: list[int]) -> list[Span]:
        """Computes `new` tokens after what `view` shows; returns where the KV of all tokens in view is."""
        for token in new:
            self.kept.append(len(self.ids))
            self.made_for.append(len(self.kept) - 1)
            self.ids.append(token)
        shown = np.array([self.ids[place] for place in self.kept], dtype=np.int64)
        chain = TokenChain(view.root, SIZE, shown, view.base)
        spans = list(view.prefix)
        for block in range(-(-(len(shown) - view.base) // SIZE)):
            start, stop = chain.bounds(block)
            spans.append(Span(chain.key(block), 0, stop - start, start, stop - start))
            self.blocks[chain.key(block)] = (start, shown[start:stop].copy())
        return spans

    def drop(self, low: int, high: int) -> None:
        del self.kept[low:high], self.made_for[low:high]

    def check(self, view: View, spans: list[Span]) -> None:
        ids = np.array(self.ids, dtype=np.int64)
        assert view.in_view(ids).tolist() == [self.ids[place] for place in self.kept]
        assert view.whole(view.in_view(ids)).tolist() == self.ids
        assert view.dropped == len(self.ids) - len(self.kept)
        position = 0
        for span in spans:
            assert span.first == position
            made_for, tokens = self.blocks[span.block]
            for offset in range(span.start, span.stop):
                assert tokens[offset] == self.ids[self.kept[position]]
                assert made_for + offset == self.made_for[position]
                assert made_for + offset + span.shift == position
                position += 1
        assert position == len(self.kept)
        for place in range(len(self.kept) + 1):
            assert view.position(view.logical(place)) == place


STEPS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(0, 30), st.integers(0, 30)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=250, deadline=None)
@given(STEPS, st.integers(0, 60))
def test_views_agree_with_a_plain_list(steps: list[tuple[list[int], int, int]], cropped: int) -> None:
    model, view = Model(), View.plain(ROOT)
    roots: dict[Key, list[tuple[Key, int, int, int]]] = {}
    for new, one, other in steps:
        spans = model.grow(view, new)
        model.check(view, spans)
        manifest = write_manifest(view, spans, len(model.ids))
        again = read_manifest(manifest, View.plain(ROOT), model.blocks.get)
        assert again.same(view)
        low, high = sorted((one % (len(model.kept) + 1), other % (len(model.kept) + 1)))
        if low < high:
            view = view.without(low, high, np.array(model.ids), spans, movable=True)
            model.drop(low, high)
            if view.base:
                parts = [(s.block, s.start, s.stop, s.shift) for s in view.prefix]
                assert roots.setdefault(view.root, parts) == parts  # a root names what comes before it
                assert view.root != ROOT
    spans = model.grow(view, [1])
    model.check(view, spans)
    shorter = view.cropped(cropped)
    kept = [place for place in model.kept if place < cropped]
    ids = np.array([*model.ids[:cropped], 9, 9], dtype=np.int64)
    assert shorter.in_view(ids).tolist()[: len(kept)] == [model.ids[place] for place in kept]
    if shorter.dropped:
        assert shorter.prefix == tuple(crop(view.prefix, len(kept)))
        assert (shorter.root == view.root) == (shorter.base == view.base)
    else:  # what comes before the first dropped token is a plain conversation
        assert shorter.same(View.plain(ROOT))


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_what_can_not_be_moved_is_a_plain_chain_of_what_is_left(steps: list[tuple[list[int], int, int]]) -> None:
    view, ids, kept = View.plain(ROOT), [], []
    for new, one, other in steps:
        kept += range(len(ids), len(ids) + len(new))
        ids += new
        low, high = sorted((one % (len(kept) + 1), other % (len(kept) + 1)))
        if low < high:
            view = view.without(low, high, np.array(ids), [], movable=False)
            del kept[low:high]
        assert (view.root, view.base) == (ROOT, 0)
        assert view.in_view(np.array(ids)).tolist() == [ids[place] for place in kept]
        chain = TokenChain(ROOT, SIZE, view.in_view(np.array(ids)))
        spans = [Span(chain.key(0), 0, len(kept), 0, len(kept))] if kept else []
        blocks = {chain.key(0): (0, chain.ids)} if kept else {}
        again = read_manifest(write_manifest(view, spans, len(ids)), View.plain(ROOT), blocks.get)
        assert again.in_view(np.array(ids)).tolist() == view.in_view(np.array(ids)).tolist()


@settings(max_examples=250, deadline=None)
@given(STEPS, st.integers(0, 200))
def test_a_manifest_with_a_lost_block_is_read_up_to_there(steps: list[tuple[list[int], int, int]], lost: int) -> None:
    model, view = Model(), View.plain(ROOT)
    for new, one, other in steps:
        spans = model.grow(view, new)
        low, high = sorted((one % (len(model.kept) + 1), other % (len(model.kept) + 1)))
        if low < high:
            view = view.without(low, high, np.array(model.ids), spans, movable=True)
            model.drop(low, high)
    spans = model.grow(view, [2, 2])
    manifest = write_manifest(view, spans, len(model.ids))
    gone = spans[lost % len(spans)].block
    found = read_manifest(manifest, View.plain(ROOT), lambda key: None if key == gone else model.blocks.get(key))
    agreed = len(found.ids)
    assert found.ids.tolist() == model.ids[:agreed]
    assert all(span.block != gone for span in found.prefix)
    assert found.prefix == view.prefix[: len(found.prefix)]
    assert (found.root == view.root) == (found.prefix == view.prefix) or not found.prefix
    altered = replace(manifest, spans=tuple(replace(row, shift=row.shift + 1) for row in manifest.spans))
    assert not read_manifest(altered, View.plain(ROOT), model.blocks.get).prefix


@given(
    st.integers(2, 60),
    st.integers(0, 20),
    st.floats(0.01, 1),
    st.integers(0, 80),
    st.integers(0, 20),
    st.integers(0, 9),
)
def test_a_window_drops_the_oldest_and_makes_room(
    size: int, first: int, drop: float, history: int, new: int, room: int
) -> None:
    if first >= size - 1:
        with pytest.raises(ContextWindowError):
            Window(size, first, drop)
        return
    window = Window(size, first, drop)
    tokens = history + new
    if min(first, history) + new + room > size:
        with pytest.raises(ContextWindowError, match=f"window of {size}"):
            window.choose(tokens, history, room)
        return
    low, high = window.choose(tokens, history, room)
    assert low == min(first, history)
    assert low <= high <= history
    assert not window.overflows(tokens - (high - low), room)
    excess = tokens + room - size
    assert high - low >= drop * (history - low) - 1e-9 or high == history
    assert high - low <= max(excess, np.ceil(drop * (history - low)))


@pytest.mark.parametrize("drop", [0, -0.5, 1.01])
def test_a_share_is_a_share(drop: float) -> None:
    with pytest.raises(CacheUseError):
        Window(64, 0, drop)


def test_total_of_no_spans_is_nothing() -> None:
    assert total_tokens(View.plain(ROOT).prefix) == 0
    assert View.plain(ROOT).is_plain
