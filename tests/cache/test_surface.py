"""The whole surface of a transformers Cache, against a DynamicCache that goes through the same operations."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import WINDOW, make_model, tokens
from support.turns import assert_reused, follow_up, turn
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError
from hf_attnstore.cache.layers.buffers import HostBuffers
from hf_attnstore.cache.layers.by_token import FullLayer, SlidingLayer

FAMILIES = ("llama-gqa", "mistral", "gemma3", "deepseek-v3")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_equal_state(ours: AttentionStoreCache, theirs: DynamicCache) -> None:
    assert len(ours) == len(theirs)
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.is_sliding == theirs.is_sliding
    assert ours.is_initialized == theirs.is_initialized
    assert not ours.is_compileable
    for number, (mine, other) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        assert ours.get_seq_length(number) == theirs.get_seq_length(number)
        assert ours.get_max_length(number) == theirs.get_max_length(number)
        for queries in (1, 7, 40):
            assert ours.get_mask_sizes(queries, number) == theirs.get_mask_sizes(queries, number)
        if other.get_seq_length() == 0:
            continue
        assert mine.keys.shape == other.keys.shape
        assert mine.values.shape == other.values.shape
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)
        assert mine.dtype == other.keys.dtype
        assert mine.device == other.keys.device


class Pair:
    """A cache of ours and a DynamicCache that get the same forwards."""

    def __init__(self, family: str, store: AttentionStore) -> None:
        self.model = make_model(family)
        self.ours = AttentionStoreCache(self.model, "alice", store)
        self.theirs = DynamicCache(config=self.model.config)
        self.seed = 0

    def feed(self, count: int, rows: int = 1) -> None:
        self.seed += 1
        new = torch.cat([tokens(count, 10 * self.seed + row) for row in range(rows)])
        with torch.no_grad():
            ours = self.model(input_ids=new, past_key_values=self.ours).logits
            theirs = self.model(input_ids=new, past_key_values=self.theirs).logits
        assert torch.equal(ours, theirs)
        self.check()

    def check(self) -> None:
        assert_equal_state(self.ours, self.theirs)

    def do(self, name: str, *arguments: Any) -> None:
        for cache in (self.ours, self.theirs):
            getattr(cache, name)(*arguments)
        self.check()


@pytest.fixture
def pair(family: str, store: AttentionStore) -> Pair:
    return Pair(family, store)


def test_an_empty_cache_looks_like_an_empty_dynamic_cache(pair: Pair) -> None:
    pair.check()
    assert pair.ours.layers[0].keys is None


def test_keys_and_values_are_real_tensors_of_the_right_shape(pair: Pair) -> None:
    for count in (5, 1, 18, 1, 40, 1):
        pair.feed(count)
        assert all(isinstance(layer.keys, torch.Tensor) for layer in pair.ours.layers)


def test_crop_within_the_window(pair: Pair) -> None:
    pair.feed(20)
    pair.do("crop", -7)
    pair.feed(5)
    pair.do("crop", 0)
    pair.do("crop", -1)
    pair.feed(1)


def test_crop_of_everything_and_more(pair: Pair) -> None:
    pair.feed(20)
    pair.ours.crop(-20)
    assert pair.ours.get_seq_length() == 0
    pair.theirs = DynamicCache(config=pair.model.config)
    pair.feed(9)
    pair.ours.crop(-100)
    assert pair.ours.get_seq_length() == 0


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_crop_with_a_positive_number_is_refused(pair: Pair, count: int) -> None:
    pair.feed(20)
    with pytest.raises(ValueError, match="negative"):
        pair.ours.crop(count)
    assert pair.ours.get_seq_length() == 20


def test_crop_with_a_recorded_past_beyond_the_window(pair: Pair) -> None:
    pair.feed(40)
    pair.do("activate_past_recording")
    pair.feed(9)
    pair.do("crop", -5)
    pair.feed(12)
    more = 0
    if "num_visible" in inspect.getsource(DynamicSlidingWindowLayer):  # else DynamicCache itself shows too much
        more = 3
        pair.feed(more)
    pair.do("crop", -12 - more)
    pair.do("crop", 0)
    pair.feed(1)
    pair.do("crop", 0)
    pair.feed(WINDOW + 10)
    pair.do("crop", -(WINDOW + 3))
    pair.feed(2)


def test_crop_beyond_the_window_gets_the_window_back_from_the_store(pair: Pair, store: AttentionStore) -> None:
    pair.feed(64)
    pair.ours.layers[0].expected = 0
    for _ in range(120):
        pair.feed(1)
    pair.ours.save()
    store.drop_memory()
    fresh = DynamicCache(config=pair.model.config)
    whole = torch.tensor([pair.ours.token_ids])
    with torch.no_grad():
        pair.model(input_ids=whole[:, :64], past_key_values=fresh)
        for position in range(64, 70):
            pair.model(input_ids=whole[:, position : position + 1], past_key_values=fresh)
    pair.ours.crop(-(184 - 70))
    pair.theirs = fresh
    pair.check()
    pair.feed(5)


def test_crop_beyond_the_window_without_a_store_is_a_clear_error(store: AttentionStore) -> None:
    pair = Pair("mistral", store)
    pair.feed(40)
    twin = copy.deepcopy(pair.ours)
    pair.ours = twin
    for _ in range(120):
        pair.feed(1)
    with pytest.raises(CacheUseError, match="activate_past_recording"):
        twin.crop(-100)
    pair.check()
    pair.feed(1)


def test_rows_are_repeated_reordered_and_selected(pair: Pair) -> None:
    pair.feed(30)
    pair.do("batch_repeat_interleave", 3)
    pair.feed(1, rows=3)
    pair.do("reorder_cache", torch.tensor([2, 0, 0]))
    pair.feed(2, rows=3)
    pair.do("batch_select_indices", torch.tensor([2, 1]))
    pair.feed(1, rows=2)
    pair.do("reorder_cache", torch.tensor([1, 0]))
    pair.do("batch_select_indices", torch.tensor([False, True]))
    pair.feed(30)
    pair.do("crop", 0) if not any(pair.ours.is_sliding) else None


def test_row_operations_on_an_empty_cache_do_nothing(pair: Pair) -> None:
    pair.do("reorder_cache", torch.tensor([0]))
    pair.do("batch_repeat_interleave", 2)
    pair.feed(5)


def test_a_forward_with_another_number_of_rows_is_a_clear_error(store: AttentionStore) -> None:
    pair = Pair("llama-gqa", store)
    pair.feed(5, rows=2)
    with pytest.raises(CacheUseError, match="rows"), torch.no_grad():
        pair.model(input_ids=tokens(3), past_key_values=pair.ours)
    pair.check()


def test_reset_empties_the_cache_and_leaves_it_usable(pair: Pair, store: AttentionStore) -> None:
    pair.feed(40)
    pair.ours.reset()
    pair.theirs = DynamicCache(config=pair.model.config)
    pair.check()
    pair.feed(7)
    store.flush()
    assert store.tokens("alice") == pair.ours.token_ids


def test_a_deep_copy_is_independent_of_the_original_and_of_the_store(pair: Pair, store: AttentionStore) -> None:
    pair.feed(40)
    pair.ours.save()
    store.flush()
    files = sorted(store.path.glob("blocks/*/*/*"))
    twin = copy.deepcopy(pair.ours)
    other = copy.deepcopy(pair.theirs)
    pair.feed(6)
    pair.ours, twin = twin, pair.ours
    pair.theirs, other = other, pair.theirs
    pair.check()
    assert pair.ours.session is None
    assert pair.ours.store is None
    pair.feed(30)
    pair.do("crop", 0) if not any(pair.ours.is_sliding) else None
    pair.ours.save()
    store.flush()
    assert len(sorted(store.path.glob("blocks/*/*/*"))) == len(files)
    pair.ours, pair.theirs = twin, other
    pair.check()
    pair.feed(8)
    pair.ours.save()
    assert len(store.tokens("alice")) == 54


def test_a_deep_copy_serves_generate(family: str, store: AttentionStore) -> None:
    model, other = make_model(family), make_model(family)
    cache = AttentionStoreCache(model, "alice", store)
    sequence = turn(model, tokens(40), cache).sequences
    twin = copy.deepcopy(cache)
    for seed in (2, 3):
        prompt = follow_up(sequence, 20, seed)
        assert torch.equal(turn(model, prompt, twin).sequences, turn(other, prompt, None).sequences)
        assert twin.reused_tokens == (45 if seed == 2 else 46)  # the last answer's last token has been fed meanwhile
        assert twin.stats.saved_bytes == 0
    assert store.tokens("alice") == sequence[0, :-1].tolist()
    assert [info.name for info in store.sessions()] == ["alice"]


def test_a_deep_copy_notices_changed_weights(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    sequence = turn(model, tokens(40), cache).sequences
    twin = copy.deepcopy(cache)
    model.load_state_dict(make_model(seed=4).state_dict())
    prompt = follow_up(sequence, 4, 2)
    assert torch.equal(turn(model, prompt, twin).sequences, turn(make_model(seed=4), prompt, None).sequences)
    assert_reused(twin, prompt, 0)


def test_a_copy_of_a_cache_that_is_still_loading_has_everything(store: AttentionStore) -> None:
    model = make_model("gemma3")
    turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    store.drop_memory()
    cache = AttentionStoreCache(model, "alice", store)
    cache.begin_turn(tokens(40)[0].numpy(), limit=39)
    twin = copy.deepcopy(cache)
    for mine, other in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert mine.keys.data_ptr() != other.keys.data_ptr()


def kv(count: int, rows: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, count, 4, generator=generator), torch.randn(rows, 2, count, 6, generator=generator)


STEPS = st.lists(st.tuples(st.sampled_from(["update", "update", "update", "crop"]), st.integers(0, 90)), max_size=40)


@given(steps=STEPS, expected=st.integers(0, 200))
@settings(deadline=None, max_examples=150)
def test_a_full_layer_grown_in_place_holds_what_concatenation_gives(steps: list[Any], expected: int) -> None:
    layer = FullLayer()
    layer.expected = expected
    keys, values = torch.empty(1, 2, 0, 4), torch.empty(1, 2, 0, 6)
    for number, (step, count) in enumerate(steps):
        if step == "update" and count:
            new = kv(count, seed=number)
            keys, values = torch.cat([keys, new[0]], dim=-2), torch.cat([values, new[1]], dim=-2)
            ours = layer.update(*new)
            assert torch.equal(ours[0], keys)
            assert torch.equal(ours[1], values)
        elif step == "crop":
            layer.crop(-count)
            left = max(0, keys.shape[-2] - count)
            keys, values = keys[..., :left, :], values[..., :left, :]
        assert layer.get_seq_length() == keys.shape[-2]
        if keys.shape[-2]:
            assert torch.equal(layer.keys, keys)  # type: ignore[arg-type]
            assert torch.equal(layer.values, values)  # type: ignore[arg-type]


@given(steps=STEPS, window=st.integers(2, 40), saved=st.integers(0, 400))
@settings(deadline=None, max_examples=150)
def test_a_sliding_layer_grown_in_place_shows_what_the_window_needs(steps: list[Any], window: int, saved: int) -> None:
    layer = FullLayer() if window is None else SlidingLayer(window)
    assert isinstance(layer, SlidingLayer)
    keys = torch.empty(1, 2, 0, 4)
    for number, (step, count) in enumerate(steps):
        if step == "update" and count:
            new = kv(count, seed=number)
            before = keys.shape[-2]
            keys = torch.cat([keys, new[0]], dim=-2)
            ours, _ = layer.update(*new)
            low = max(0, before - window + 1)
            assert torch.equal(ours, keys[..., low:, :])
            assert layer.get_mask_sizes(1) == (
                keys.shape[-2] - max(0, keys.shape[-2] - window + 1) + 1,
                max(0, keys.shape[-2] - window + 1),
            )
        elif step == "crop":
            length = max(0, keys.shape[-2] - count)
            if not layer.may_crop_to(length):
                continue
            layer.crop_to(length)
            keys = keys[..., :length, :]
        layer.saved_to = min(saved, keys.shape[-2])
        if keys.shape[-2]:
            assert torch.equal(layer.keys, keys[..., max(0, keys.shape[-2] - window + 1) :, :])  # type: ignore[arg-type]
            if layer.holds(layer.saved_to, keys.shape[-2]):
                assert torch.equal(layer.piece(layer.saved_to, keys.shape[-2])["keys"], keys[0, :, layer.saved_to :])


@pytest.mark.parametrize("window", [None, 16])
def test_the_number_of_reallocations_is_logarithmic(window: int | None) -> None:
    layer = FullLayer() if window is None else SlidingLayer(window)
    allocations = 0
    allocate = layer._allocate

    def counted(*arguments: Any) -> list[torch.Tensor]:
        nonlocal allocations
        allocations += 1
        return allocate(*arguments)

    layer._allocate = counted  # type: ignore[method-assign]
    new = kv(1)
    for _ in range(4000):
        layer.update(*new)
    # by half again from 64 on: 64, 128, 192, 320 … 4,000; a window's buffer holds 15 tokens and room for the rest
    assert allocations <= (13 if window is None else 4000 // (64 - 15) + 2)
    assert layer._buffers["keys"].shape[-2] <= (6500 if window is None else 128)


def test_an_announced_length_is_allocated_once() -> None:
    layer = FullLayer()
    layer.expected = 3000
    layer.update(*kv(100))
    before = layer._buffers["keys"].data_ptr()
    for _ in range(2900):
        layer.update(*kv(1))
    assert layer._buffers["keys"].data_ptr() == before


def test_views_handed_out_keep_their_content_when_the_layer_grows() -> None:
    layer = FullLayer()
    views = []
    wanted = torch.empty(1, 2, 0, 4)
    for number in range(60):
        new = kv(1 + number % 7, seed=number)
        wanted = torch.cat([wanted, new[0]], dim=-2)
        views.append((layer.update(*new)[0], wanted))
        assert torch.equal(layer.keys, wanted)  # type: ignore[arg-type]
    for view, content in views:
        assert torch.equal(view, content)


def test_memory_given_back_by_one_cache_is_not_seen_by_another() -> None:
    held = []
    for number in range(30):
        layer = FullLayer()
        layer.expected = 4096
        new = kv(200, seed=number)
        keys, _ = layer.update(*new)
        held.append((keys, new[0]))
        layer.reset()
    for keys, content in held:
        assert torch.equal(keys, content)


def test_memory_that_is_given_back_while_some_is_looked_for_disturbs_nobody() -> None:
    buffers = HostBuffers()

    class Finalised(list[np.ndarray]):
        """As if the garbage collector ran while it is looked at."""

        def __len__(self) -> int:
            buffers._give_back(np.empty(1 << 20, dtype=np.uint8))
            return super().__len__()

    buffers._idle[1 << 16] = Finalised()
    taken = buffers.empty((1024,), torch.float32)
    assert taken.shape == (1024,)
    assert buffers.idle_bytes == 1 << 20


def test_going_back_behind_a_block_that_took_a_short_ones_place_loses_nothing(store: AttentionStore) -> None:
    model = make_model()
    with torch.no_grad():
        cache = AttentionStoreCache(model, "alice", store)
        model(input_ids=tokens(47), past_key_values=cache)
        cache.save()
        cache = AttentionStoreCache(model, "alice", store)
        cache.resume()
        model(input_ids=tokens(6, 2), past_key_values=cache)  # fills the last block, which replaces the short one
        cache.crop(-6)
        cache.save()
    store.flush()
    assert store.tokens("alice") == tokens(47)[0].tolist()
    store.drop_memory()
    again = AttentionStoreCache(model, "alice", store)
    assert again.resume().shape[1] == 47


def test_a_turn_that_computed_nothing_does_not_bring_a_deleted_session_back(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    with torch.no_grad():
        model(input_ids=tokens(40), past_key_values=cache)
    cache.save()
    store.flush()
    store.delete("alice")
    cache.match(tokens(41))
    cache.save()
    store.flush()
    assert store.sessions() == []
    assert store.stats()["disk_blocks"] == 0
