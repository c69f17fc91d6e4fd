"""The device tier: a turn that goes on with the layers of the one before loads nothing, and is the same to the bit."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import tiny_model, tiny_tokenizer
from support.tiny_models import BLOCK, make_model, tokens
from support.turns import Reference, assert_reused, assert_same, follow_up, turn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_attnstore import AttentionStore, AttentionStoreCache, ChatSession, ContextWindowError, attach, detach
from hf_attnstore.cache.layers import shared_memory as watching
from hf_attnstore.lab.families.encoder_decoders import encoder_input, make_seq2seq
from hf_attnstore.lab.families.tiny import build, families
from hf_attnstore.store.memory import size as memory_size

FAMILIES = ("llama-gqa", "gemma3", "mistral", "deepseek-v3", "gpt2")
STATES = ("qwen3_next", "lfm2", "mamba2", "falcon_h1", "deepseek_v4", "glm_moe_dsa")
"""Running states, alone, beside attention and of a kind of their own; and layers with an indexer."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AttentionStore]:
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device="64MiB") as opened:
        yield opened


@pytest.fixture
def other_store(tmp_path: Path) -> Iterator[AttentionStore]:
    """Without a device tier."""
    with AttentionStore(tmp_path / "other", block_size=BLOCK) as opened:
        yield opened


def built(family: str) -> Any:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    return build(family)


def assert_from_device(cache: AttentionStoreCache, prompt: torch.Tensor, reused: int) -> None:
    """All that was reused was on the device: nothing was loaded."""
    assert_reused(cache, prompt, reused)
    assert cache.stats.loaded_bytes == 0
    assert cache.stats.blocks_from == {"device": -(-reused // BLOCK)}
    assert cache.stats.recomputed == ""


def assert_loaded(cache: AttentionStoreCache, prompt: torch.Tensor, reused: int) -> None:
    """What was reused came from the store."""
    assert_reused(cache, prompt, reused)
    assert cache.stats.loaded_bytes > 0
    assert "device" not in cache.stats.blocks_from


def sessions_on_device(store: AttentionStore) -> int:
    return int(store.stats()["device_sessions"])


def snapshot(cache: AttentionStoreCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def shown(cache: AttentionStoreCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def assert_equal(a: list[tuple[torch.Tensor, ...]], b: list[tuple[torch.Tensor, ...]]) -> None:
    assert all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


# the same as a kept cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [False, True], ids=["object gone", "object kept"])
def test_turns_are_those_of_a_kept_cache_and_load_nothing(family: str, kept: bool, store: AttentionStore) -> None:
    model, reference = make_model(family), Reference(make_model(family))
    prompt, objects, held = tokens(37), [], 0
    for number in range(5):
        cache = AttentionStoreCache(model, "alice", store)
        ours = turn(model, prompt, cache)
        assert_same(ours, reference.turn(prompt))
        if number:
            assert_from_device(cache, prompt, held)
        held = ours.sequences.shape[1] - 1
        if kept:
            objects.append(cache)
        assert sessions_on_device(store) == 1
        prompt = follow_up(ours.sequences, 9 + 7 * number, seed=number)
    assert store.tokens("alice") == ours.sequences[0, :-1].tolist()


@pytest.mark.parametrize("family", STATES)
@pytest.mark.parametrize("kept", [False, True], ids=["object gone", "object kept"])
def test_layers_of_every_kind_change_hands(
    family: str, kept: bool, store: AttentionStore, other_store: AttentionStore
) -> None:
    model = built(family)
    one = AttentionStoreCache(model, "one object", other_store)  # the same turns, fed in the same parts
    prompt, objects, held = tokens(37).clamp_min(8), [], 0
    for number in range(4):
        expected = turn(model, prompt, one)
        cache = AttentionStoreCache(model, "alice", store)
        ours = turn(model, prompt, cache)
        assert_same(ours, expected)
        if number:
            assert_from_device(cache, prompt, held)
        held = ours.sequences.shape[1] - 1
        if kept:
            objects.append(cache)
        prompt = torch.cat([ours.sequences, tokens(9 + 7 * number, seed=number).clamp_min(8)], dim=1)
    detach(model)


def test_no_buffer_is_copied_where_there_is_room(store: AttentionStore) -> None:
    model = make_model()
    first = AttentionStoreCache(model, "alice", store)
    ours = turn(model, tokens(40), first, max_new_tokens=4)
    places = [layer.keys.data_ptr() for layer in first.layers]
    again = AttentionStoreCache(model, "alice", store)
    turn(model, follow_up(ours.sequences, 5, seed=1), again, max_new_tokens=4)
    assert [layer.keys.data_ptr() for layer in again.layers] == places


def test_one_object_for_all_turns_takes_its_own_back(store: AttentionStore) -> None:
    model, reference = make_model(), Reference(make_model())
    cache = AttentionStoreCache(model, "alice", store)
    prompt = tokens(30)
    for number in range(3):
        ours = turn(model, prompt, cache, max_new_tokens=4)
        assert_same(ours, reference.turn(prompt, max_new_tokens=4))
        assert cache.stats.loaded_bytes == 0
        assert cache.reused_tokens == (0 if not number else prompt.shape[1] - 6)
        assert sessions_on_device(store) == 1
        prompt = follow_up(ours.sequences, 5, seed=number)


# where nobody asked for it


def large_model() -> LlamaForCausalLM:
    """16 KiB of KV a token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(vocab_size=101, num_key_value_heads=8, head_dim=64, **sizes, **ends)
    return LlamaForCausalLM(config).eval()


LARGE = 300
"""Tokens of which that model has more KV than is always loaded."""


@pytest.mark.parametrize("session", ["alice", None])
def test_on_a_cpu_much_kv_stays_without_being_asked_for(session: str | None, tmp_path: Path) -> None:
    model, reference, prompt, held = large_model(), Reference(large_model()), tokens(LARGE), 0
    with AttentionStore(tmp_path / "store", block_size=BLOCK) as store:
        for number in range(3):
            cache = AttentionStoreCache(model, session, store)
            ours = turn(model, prompt, cache)
            assert_same(ours, reference.turn(prompt))
            if number:
                assert_from_device(cache, prompt, held)
            prompt, held = follow_up(ours.sequences, 9, seed=number), ours.sequences.shape[1] - 1
            assert store.stats()["device_bytes"] >= 16 * 1024 * held > store.device_tier.least
        del cache
        store.drop_memory()
        assert sessions_on_device(store) == 0
        again = AttentionStoreCache(model, session, store)  # all of it is in the store as well
        assert_same(turn(model, prompt, again), reference.turn(prompt))
        assert_loaded(again, prompt, held)


def test_little_kv_does_not(tmp_path: Path) -> None:
    model = make_model()
    with AttentionStore(tmp_path / "store", block_size=BLOCK) as store:
        first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
        assert (store.stats()["device_bytes"], sessions_on_device(store)) == (0, 0)
        cache = AttentionStoreCache(model, "alice", store)
        prompt = follow_up(first.sequences, 9, seed=1)
        turn(model, prompt, cache)
        assert_loaded(cache, prompt, 45)


def test_none_does_where_that_was_asked_for(tmp_path: Path) -> None:
    model = large_model()
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device=0) as store:
        first = turn(model, tokens(LARGE), AttentionStoreCache(model, "alice", store))
        assert (store.stats()["device_bytes"], store.stats()["device_capacity"], sessions_on_device(store)) == (0, 0, 0)
        cache = AttentionStoreCache(model, "alice", store)
        prompt = follow_up(first.sequences, 9, seed=1)
        turn(model, prompt, cache)
        assert_loaded(cache, prompt, first.sequences.shape[1] - 1)


def test_none_does_on_an_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = large_model()
    with AttentionStore(tmp_path / "store", block_size=BLOCK) as store:
        cache = AttentionStoreCache(model, "alice", store)
        monkeypatch.setattr(cache._setup.attachment, "computes_on_cpu", False)
        turn(model, tokens(LARGE), cache)
        assert sessions_on_device(store) == 0


@pytest.mark.parametrize(
    ("memory", "capacity"), [(0, 0), ("64MiB", 16 << 20), ("1GiB", 256 << 20), ("2GiB", 512 << 20), ("8GiB", 512 << 20)]
)
def test_it_has_a_quarter_of_what_blocks_have(memory: int | str, capacity: int, tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "store", memory=memory) as store:
        assert store.stats()["device_capacity"] == capacity
    with AttentionStore(tmp_path / "store", memory=memory, on_device="3GiB") as store:
        assert store.stats()["device_capacity"] == 3 << 30


def test_it_shrinks_with_the_memory_for_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [memory_size.FreeMemory(8 << 30, 6 << 30)]
    monkeypatch.setattr(memory_size, "free_memory", lambda: free[0])
    monkeypatch.setattr(memory_size, "_TICK_SECONDS", 3600.0)
    model = large_model()
    with AttentionStore(tmp_path / "store", block_size=BLOCK, memory="auto") as store:
        cache = AttentionStoreCache(model, "alice", store)
        made = turn(model, tokens(LARGE), cache).sequences
        buffers = [weakref.ref(buffer) for layer in cache.layers for buffer in layer._buffers.values()]
        del cache
        gc.collect()
        store.flush()
        assert (store.stats()["device_capacity"], sessions_on_device(store)) == (512 << 20, 1)
        free[0] = memory_size.FreeMemory(8 << 30, 0)
        assert store._automatic is not None
        store._automatic.check()
        stats = store.stats()
        assert (stats["memory_capacity"], stats["device_capacity"], stats["device_sessions"]) == (0, 0, 0)
        assert all(buffer() is None for buffer in buffers)
        again = AttentionStoreCache(model, "alice", store)
        prompt = follow_up(made, 9, seed=1)
        turn(model, prompt, again)
        assert_loaded(again, prompt, made.shape[1] - 1)
        assert sessions_on_device(store) == 0
        free[0] = memory_size.FreeMemory(8 << 30, 6 << 30)
        store._automatic.check()
        assert store.stats()["device_capacity"] == 512 << 20


def test_a_chat_keeps_its_own(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    with AttentionStore(tmp_path / "store", block_size=BLOCK) as store:
        chat = ChatSession(model, tokenizer, store, "a", max_new_tokens=6)
        for number in range(3):
            store.drop_memory()
            chat.send(f"the old prince looked at the letter and said {'nothing ' * number}")
            assert chat.stats is not None
            assert chat.stats.cache.loaded_bytes == 0
            assert bool(chat.stats.cache.reused_tokens) == bool(number)


def test_after_a_restart_the_same_is_loaded(tmp_path: Path) -> None:
    model, reference = make_model(), Reference(make_model())
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device="64MiB") as store:
        first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
        assert sessions_on_device(store) == 1
        tier = store.device_tier
    assert (len(tier), tier.used) == (0, 0)
    reference.turn(tokens(40))
    prompt = follow_up(first.sequences, 9, seed=1)
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device="64MiB") as store:
        cache = AttentionStoreCache(model, "alice", store)
        assert_same(turn(model, prompt, cache), reference.turn(prompt))
        assert_loaded(cache, prompt, 45)


def test_a_store_that_keeps_nothing_else_keeps_it_on_the_device(tmp_path: Path) -> None:
    model, reference = make_model(), Reference(make_model())
    with AttentionStore(tmp_path / "store", block_size=BLOCK, memory=0, disk=0, on_device="64MiB") as store:
        prompt, held = tokens(40), 0
        for number in range(3):
            cache = AttentionStoreCache(model, "alice", store)
            ours = turn(model, prompt, cache)
            assert_same(ours, reference.turn(prompt))
            if number:
                assert_from_device(cache, prompt, held)
            held = ours.sequences.shape[1] - 1
            prompt = follow_up(ours.sequences, 9, seed=number)


# prompts that differ


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_an_edited_message_keeps_what_comes_before_it(family: str, store: AttentionStore) -> None:
    model, plain = make_model(family), make_model(family)
    first = turn(model, tokens(50), AttentionStoreCache(model, "alice", store))
    edited = first.sequences.clone()
    edited[0, 33] = (edited[0, 33] - 2) % 98 + 3
    cache = AttentionStoreCache(model, "alice", store)
    ours = turn(model, edited, cache)
    assert torch.equal(ours.sequences, turn(plain, edited, None).sequences)
    assert_reused(cache, edited, 33)
    if family == "llama-gqa":
        assert_from_device(cache, edited, 33)
    back = follow_up(first.sequences, 3, seed=3)  # what was cropped away is in the store
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, back, cache).sequences, turn(plain, back, None).sequences)
    assert_reused(cache, back, 55)
    assert cache.stats.blocks_from["device"] == 3
    assert cache.stats.loaded_bytes > 0


def test_a_prompt_that_has_nothing_in_common_loads_nothing_and_takes_the_place(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    turn(model, tokens(50), AttentionStoreCache(model, "alice", store))
    other = tokens(30, seed=9)
    other[0, 0] = (tokens(50)[0, 0] - 2) % 98 + 3
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, other, cache).sequences, turn(plain, other, None).sequences)
    assert_reused(cache, other, 0)
    assert cache.stats.blocks_from == {}
    assert sessions_on_device(store) == 1


def test_what_another_store_object_added_is_loaded_on_top(tmp_path: Path) -> None:
    model, plain = make_model(), make_model()
    settings: dict[str, Any] = {"block_size": BLOCK, "on_device": "64MiB"}
    with AttentionStore(tmp_path / "s", **settings) as here, AttentionStore(tmp_path / "s", **settings) as there:
        first = turn(model, tokens(40), AttentionStoreCache(model, "alice", here))
        here.flush()
        second = turn(
            model, follow_up(first.sequences, 40, seed=1), AttentionStoreCache(model, "alice", there, wait=10)
        )
        there.flush()
        prompt = follow_up(second.sequences, 5, seed=2)
        cache = AttentionStoreCache(model, "alice", here, wait=10)
        ours = turn(model, prompt, cache)
        assert torch.equal(ours.sequences, turn(plain, prompt, None).sequences)
        assert_reused(cache, prompt, second.sequences.shape[1] - 1)
        assert cache.stats.blocks_from["device"] == 3  # the 45 tokens that were here
        assert cache.stats.loaded_bytes > 0
        there.delete("alice")
        prompt = follow_up(ours.sequences, 5, seed=3)
        cache = AttentionStoreCache(model, "alice", here, wait=10)
        ours = turn(model, prompt, cache)
        assert torch.equal(ours.sequences, turn(plain, prompt, None).sequences)
        here.flush()
        assert here.tokens("alice") == ours.sequences[0, :-1].tolist()  # all of it was saved anew


# objects that somebody still has


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("edited", [False, True])
def test_an_object_whose_layers_were_taken_over_shows_what_it_showed(
    family: str, edited: bool, store: AttentionStore
) -> None:
    model, plain = make_model(family), make_model(family)
    old = AttentionStoreCache(model, "alice", store)
    first = turn(model, tokens(50), old, max_new_tokens=4)
    before = snapshot(old)
    prompt = follow_up(first.sequences, 5, seed=1)
    if edited:
        prompt = torch.cat([prompt[:, :33], tokens(9, seed=2)], dim=1)
    for number in range(3):
        cache = AttentionStoreCache(model, "alice", store)
        ours = turn(model, prompt, cache, max_new_tokens=4)
        assert torch.equal(ours.sequences, turn(plain, prompt, None, max_new_tokens=4).sequences)
        assert cache.stats.blocks_from.get("device")
        assert_equal(shown(old), before)
        assert old.get_seq_length() == 53
        prompt = follow_up(ours.sequences[:, : -3 * number - 1], 5, seed=number)
    # and it can be gone on with
    elsewhere = follow_up(first.sequences, 7, seed=8)
    ours = turn(model, elsewhere, old)
    assert torch.equal(ours.sequences, turn(plain, elsewhere, None).sequences)
    # beside its own 53, the token that it had made last, which those after it were given
    assert_reused(old, elsewhere, 53 if edited else 54)
    newer = AttentionStoreCache(model, "alice", store)
    turn(model, prompt, newer)
    assert torch.equal(turn(model, prompt, None).sequences, turn(plain, prompt, None).sequences)


def test_the_object_of_two_turns_ago_is_not_written_over_either(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    oldest = AttentionStoreCache(model, "alice", store)
    prompt = turn(model, tokens(30), oldest, max_new_tokens=3).sequences
    before = snapshot(oldest)
    for number in range(2):  # objects that nobody keeps
        cache = AttentionStoreCache(model, "alice", store)
        prompt = turn(model, follow_up(prompt, 4, seed=number), cache, max_new_tokens=3).sequences
    del cache
    back = torch.cat([prompt[:, :20], tokens(20, seed=5)], dim=1)
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, back, cache).sequences, turn(plain, back, None).sequences)
    assert_from_device(cache, back, 20)
    assert_equal(shown(oldest), before)


@pytest.mark.parametrize("family", ["llama-gqa", "glm_moe_dsa", "qwen3_next"])
def test_views_of_an_object_that_is_gone_are_not_written_over(family: str, store: AttentionStore) -> None:
    model = make_model(family) if family == "llama-gqa" else built(family)
    cache = AttentionStoreCache(model, "alice", store, checkpoint_every=5)
    first = turn(model, tokens(50).clamp_min(8), cache)
    views = [value for layer in cache.layers for value in _visible(layer)]
    before = [view.clone() for view in views]
    del cache
    gc.collect()
    back = torch.cat([first.sequences[:, :40], tokens(9, seed=5).clamp_min(8)], dim=1)
    cache = AttentionStoreCache(model, "alice", store, checkpoint_every=5)
    ours = turn(model, back, cache)
    assert cache.stats.blocks_from.get("device")
    assert torch.equal(ours.sequences, turn(model, back, None).sequences)
    assert all(torch.equal(view, copy) for view, copy in zip(views, before, strict=True))
    detach(model)


def _visible(layer: Any) -> list[torch.Tensor]:
    found = [getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return [value for value in (*found, *states) if isinstance(value, torch.Tensor)]


def test_where_nobody_can_say_who_has_views_everything_is_taken_for_watched(
    store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_uses", None)
    model, reference = make_model(), Reference(make_model())
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    reference.turn(tokens(40))
    prompt = follow_up(first.sequences, 9, seed=1)
    cache = AttentionStoreCache(model, "alice", store)
    assert_same(turn(model, prompt, cache), reference.turn(prompt))
    assert_from_device(cache, prompt, 45)


def test_tensors_that_were_written_to_from_outside_are_not_used(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model, reference = make_model(), Reference(make_model())
    old = AttentionStoreCache(model, "alice", store)
    first = turn(model, tokens(40), old)
    reference.turn(tokens(40))
    with torch.inference_mode():
        old.layers[1].values[0, 0, 3].zero_()
    prompt = follow_up(first.sequences, 9, seed=1)
    cache = AttentionStoreCache(model, "alice", store)
    assert_same(turn(model, prompt, cache), reference.turn(prompt))
    assert_reused(cache, prompt, 45)
    assert cache.stats.loaded_bytes > 0
    assert "device" not in cache.stats.blocks_from
    assert "written to from outside" in log.text


def test_an_object_that_was_cropped_or_copied_after_its_turn_leaves_what_it_parked_alone(store: AttentionStore) -> None:
    model, reference = make_model(), Reference(make_model())
    old = AttentionStoreCache(model, "alice", store)
    first = turn(model, tokens(40), old)
    reference.turn(tokens(40))
    old.batch_repeat_interleave(2)
    old.layers[0].crop(-7)
    prompt = follow_up(first.sequences, 9, seed=1)
    cache = AttentionStoreCache(model, "alice", store)
    assert_same(turn(model, prompt, cache), reference.turn(prompt))
    assert_from_device(cache, prompt, 45)


# the cap


def _bytes_of(store: AttentionStore) -> int:
    return int(store.stats()["device_bytes"])


def test_the_cap_counts_what_is_allocated_and_the_session_unused_for_longest_goes(tmp_path: Path) -> None:
    model, plain = make_model(), make_model()
    with AttentionStore(tmp_path / "one", block_size=BLOCK, on_device="64MiB") as store:
        cache = AttentionStoreCache(model, "x", store)
        turn(model, tokens(40), cache)
        one = _bytes_of(store)
        buffers = {layer.keys.untyped_storage().data_ptr(): layer.keys for layer in cache.layers}
        buffers |= {layer.values.untyped_storage().data_ptr(): layer.values for layer in cache.layers}
        assert one == sum(b.untyped_storage().nbytes() for b in buffers.values())
        assert one > sum(b.nbytes for b in buffers.values())  # there is room in them for more
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device=2 * one) as store:
        history = {}
        for number, name in enumerate("abc"):
            history[name] = turn(model, tokens(40, seed=number), AttentionStoreCache(model, name, store)).sequences
            assert _bytes_of(store) <= 2 * one
        assert (sessions_on_device(store), store.stats()["evicted_from_device"]) == (2, 1)
        for name, there in (("b", True), ("a", False), ("b", True), ("c", False)):
            prompt = follow_up(history[name], 5, seed=ord(name))
            cache = AttentionStoreCache(model, name, store)
            ours = turn(model, prompt, cache, max_new_tokens=4)
            assert torch.equal(ours.sequences, turn(plain, prompt, None, max_new_tokens=4).sequences)
            (assert_from_device if there else assert_loaded)(cache, prompt, history[name].shape[1] - 1)
            history[name] = ours.sequences
            assert _bytes_of(store) <= 2 * one


def test_sessions_that_come_next_keep_their_place(tmp_path: Path) -> None:
    """Three in turn with room for two: who goes by use alone always drops the one that comes next."""
    model, plain = make_model(), make_model()
    with AttentionStore(tmp_path / "one", block_size=BLOCK, on_device="64MiB") as store:
        turn(model, tokens(40), AttentionStoreCache(model, "x", store))
        one = _bytes_of(store)
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device=2 * one) as store:
        history = {name: tokens(35, seed=ord(name)) for name in "abc"}
        on_device = []
        for name, following in zip("abcabcabc", ("bca", "cab", "abc") * 3, strict=True):
            store.schedule(list(following))
            prompt = follow_up(history[name], 1, seed=len(on_device))
            cache = AttentionStoreCache(model, name, store)
            ours = turn(model, prompt, cache, max_new_tokens=1)
            assert torch.equal(ours.sequences, turn(plain, prompt, None, max_new_tokens=1).sequences)
            on_device.append("device" in cache.stats.blocks_from)
            history[name] = ours.sequences
            assert _bytes_of(store) <= 2 * one
        assert on_device[:3] == [False] * 3
        assert sum(on_device[3:]) == 4
        assert store.stats()["evicted_from_device"] == 0


def test_what_is_larger_than_the_tier_evicts_nothing(tmp_path: Path) -> None:
    model = make_model()
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device="40KB") as store:
        turn(model, tokens(30), AttentionStoreCache(model, "small", store))
        assert sessions_on_device(store) == 1
        first = turn(model, tokens(200), AttentionStoreCache(model, "large", store))
        assert sessions_on_device(store) == 1
        cache = AttentionStoreCache(model, "large", store)
        prompt = follow_up(first.sequences, 3, seed=1)
        turn(model, prompt, cache)
        assert_loaded(cache, prompt, 205)


def test_what_is_evicted_is_freed(tmp_path: Path) -> None:
    model = make_model()
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device="64MiB") as store:
        cache = AttentionStoreCache(model, "alice", store)
        turn(model, tokens(40), cache)
        buffers = [weakref.ref(buffer) for layer in cache.layers for buffer in layer._buffers.values()]
        del cache
        gc.collect()
        assert all(buffer() is not None for buffer in buffers)
        store.device_tier.resize(0)
        assert all(buffer() is None for buffer in buffers)
        assert (_bytes_of(store), sessions_on_device(store)) == (0, 0)


# when it must not be used


def test_changed_weights_are_noticed(store: AttentionStore, log: pytest.LogCaptureFixture) -> None:
    model, other = make_model(), make_model()
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    for changed in (model, other):
        with torch.no_grad():
            changed.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    prompt = follow_up(first.sequences, 9, seed=1)
    cache = AttentionStoreCache(model, "alice", store)
    ours = turn(model, prompt, cache)
    assert_same(ours, turn(other, prompt, DynamicCache(config=other.config)))
    assert_reused(cache, prompt, 0)
    assert "other weights or settings" in log.text
    assert sessions_on_device(store) == 1  # that of the model as it is now


def test_two_models_do_not_take_each_others(store: AttentionStore) -> None:
    model, other = make_model(), make_model(seed=1)
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    prompt = follow_up(first.sequences, 9, seed=1)
    cache = AttentionStoreCache(other, "alice", store)
    assert_same(turn(other, prompt, cache), turn(make_model(seed=1), prompt, None))
    assert_reused(cache, prompt, 0)


def test_deleted_forked_and_renamed_sessions(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    prompt = follow_up(first.sequences, 9, seed=1)
    expected = turn(plain, prompt, None).sequences
    store.rename("alice", "anna")
    store.fork("anna", "bob")
    cache = AttentionStoreCache(model, "anna", store)
    assert torch.equal(turn(model, prompt, cache).sequences, expected)
    assert_from_device(cache, prompt, 45)
    cache = AttentionStoreCache(model, "bob", store)
    assert torch.equal(turn(model, prompt, cache).sequences, expected)
    assert_loaded(cache, prompt, prompt.shape[1] - 1)  # what is on the device is the other's
    assert sessions_on_device(store) == 2
    store.delete("bob")
    assert sessions_on_device(store) == 1
    store.delete("anna")
    assert (sessions_on_device(store), _bytes_of(store)) == (0, 0)
    del cache
    cache = AttentionStoreCache(model, "anna", store)
    assert torch.equal(turn(model, prompt, cache).sequences, expected)
    assert_reused(cache, prompt, 0)


def test_a_session_deleted_while_it_is_read_does_not_come_back(store: AttentionStore) -> None:
    model = make_model()
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    reading = AttentionStoreCache(model, "alice", store, save=False)
    with torch.no_grad():
        reading.match(follow_up(first.sequences, 1, seed=1))
    assert reading.stats.blocks_from == {"device": 3}
    store.delete("alice")
    reading.save()
    assert sessions_on_device(store) == 0


def test_dropping_memory_and_collecting_garbage_reach_the_device(store: AttentionStore) -> None:
    model = make_model()
    turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    turn(model, tokens(40, seed=5), AttentionStoreCache(model, None, store))
    assert sessions_on_device(store) == 2
    store.collect_garbage(unowned=True, dry_run=True)
    assert sessions_on_device(store) == 2
    store.collect_garbage(unowned=True)
    assert sessions_on_device(store) == 1
    store.drop_memory()
    assert sessions_on_device(store) == 0


def test_nothing_stays_of_a_model_that_is_detached_or_gone(store: AttentionStore) -> None:
    model, other = make_model(), make_model(seed=1)
    turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    turn(other, tokens(40), AttentionStoreCache(other, "bob", store))
    assert sessions_on_device(store) == 2
    detach(model)
    assert sessions_on_device(store) == 1
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert (sessions_on_device(store), _bytes_of(store)) == (0, 0)


def test_a_model_that_was_moved_is_not_given_tensors_of_elsewhere(
    store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = make_model(), Reference(make_model())
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    reference.turn(tokens(40))
    prompt = follow_up(first.sequences, 9, seed=1)
    for elsewhere in (False, True):
        (entry,) = store.device_tier.entries(model._attnstore_attachment.parked, "alice")
        if elsewhere:
            entry.content.places = frozenset({torch.device("cuda:7")})
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # the same weights somewhere else, on this device or from another
        cache = AttentionStoreCache(model, "alice", store)
        expected = reference.turn(prompt)
        assert_same(turn(model, prompt, cache), expected)
        assert_reused(cache, prompt, prompt.shape[1] - 9 - 1)
        assert (cache.stats.loaded_bytes > 0) == elsewhere
        prompt = follow_up(expected.sequences, 9, seed=2)


def test_a_turn_that_nothing_identifies_parks_nothing_and_takes_nothing(store: AttentionStore) -> None:
    model = make_model()
    turn(model, tokens(40), AttentionStoreCache(model, "alice", store))
    embeds = model.get_input_embeddings()(tokens(20)).detach()
    cache = AttentionStoreCache(model, "alice", store)
    model.train()
    with torch.no_grad():
        model(input_ids=tokens(40), past_key_values=cache)
    cache.save()
    model.eval()
    assert cache.unidentified
    assert embeds.shape[1] == 20
    cache = AttentionStoreCache(model, "alice", store)
    turn(model, tokens(40), cache)
    assert cache.stats.blocks_from == {"device": 3}


# who only reads


def test_reading_takes_and_gives_back_but_leaves_nothing_new(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store), max_new_tokens=4)
    prompt = follow_up(first.sequences, 5, seed=1)
    expected = turn(plain, prompt, None).sequences
    for _ in range(3):
        cache = AttentionStoreCache(model, "alice", store, save=False)
        assert torch.equal(turn(model, prompt, cache).sequences, expected)
        assert_from_device(cache, prompt, 43)  # not what the turn before computed without saving
        assert sessions_on_device(store) == 1
    before = snapshot(cache)
    again = AttentionStoreCache(model, "alice", store, save=False)
    other = follow_up(first.sequences, 30, seed=2)
    assert torch.equal(turn(model, other, again).sequences, turn(plain, other, None).sequences)
    assert_from_device(again, other, 43)
    assert_equal(shown(cache), before)


def test_what_was_computed_without_saving_is_not_parked(store: AttentionStore) -> None:
    model = make_model()
    turn(model, tokens(40), AttentionStoreCache(model, "alice", store, save=False))
    assert sessions_on_device(store) == 0


# without a name, and other ways to run turns


def test_conversations_without_a_name_are_told_apart_by_their_ids(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    attach(model, store)
    begin = tokens(20)  # a system prompt that all of them share
    history = {}
    for number in range(3):
        prompt = follow_up(begin, 30, seed=20 + number)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
        history[number] = out
    assert sessions_on_device(store) == 3
    for number in (1, 0, 2, 0):
        prompt = follow_up(history[number], 6, seed=number)
        loads = store.stats()["loaded_bytes"]
        reused = store.stats()["reused_tokens"]
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
        expected = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
        assert torch.equal(out, expected)
        assert store.stats()["loaded_bytes"] == loads
        assert store.stats()["reused_tokens"] - reused == history[number].shape[1] - 1
        assert sessions_on_device(store) == 3
        history[number] = out
    detach(model)
    assert sessions_on_device(store) == 0


def test_a_loop_of_ones_own_parks_and_takes(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    with torch.no_grad():
        cache = AttentionStoreCache(model, "alice", store)
        model(input_ids=tokens(40), past_key_values=cache)
        cache.save()
        assert sessions_on_device(store) == 1
        cache = AttentionStoreCache(model, "alice", store)
        prompt = follow_up(tokens(40), 7, seed=1)
        assert cache.match(prompt) == 40
        ours = model(input_ids=prompt[:, 40:], past_key_values=cache).logits
        assert_from_device(cache, prompt, 40)
        kept = DynamicCache(config=plain.config)
        plain(input_ids=tokens(40), past_key_values=kept)
        assert torch.equal(ours, plain(input_ids=prompt[:, 40:], past_key_values=kept).logits)
        cache.crop(-3)
        cache.save()
        cache = AttentionStoreCache(model, "alice", store)
        assert torch.equal(cache.resume(), prompt[:, :44])
        assert cache.stats.blocks_from == {"device": 3}


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_all_ways_to_generate(family: str, settings: dict[str, Any], store: AttentionStore) -> None:
    model, plain = make_model(family), make_model(family)
    prompt = tokens(40)
    for number in range(4):
        torch.manual_seed(number)
        ours = turn(model, prompt, AttentionStoreCache(model, "alice", store), **settings).sequences
        torch.manual_seed(number)
        assert torch.equal(ours, turn(plain, prompt, DynamicCache(config=plain.config), **settings).sequences)
        prompt = follow_up(ours, 6, seed=number)
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(plain, prompt, None).sequences)
    assert cache.reused_tokens > 0


def test_an_interrupted_turn_parks_what_is_complete(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()

    class Interrupt:
        count = 0

        def put(self, value: torch.Tensor) -> None:
            self.count += 1
            if self.count == 4:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        turn(model, tokens(40), AttentionStoreCache(model, "alice", store), streamer=Interrupt())
    whole = turn(plain, tokens(40), None).sequences
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, tokens(40), cache).sequences, whole)
    assert_from_device(cache, tokens(40), 39)


def test_past_the_window_the_view_goes_with_it(store: AttentionStore, other_store: AttentionStore) -> None:
    model = make_model()
    one = AttentionStoreCache(model, "one object", other_store, window=64)
    prompt = tokens(40)
    dropped = hits = 0
    for number in range(12):
        expected = turn(model, prompt, one, max_new_tokens=4)
        cache = AttentionStoreCache(model, "alice", store, window=64)
        ours = turn(model, prompt, cache, max_new_tokens=4)
        assert_same(ours, expected)
        assert (cache.reused_tokens, cache.stats.dropped_tokens) == (one.reused_tokens, one.stats.dropped_tokens)
        assert cache.stats.loaded_bytes == one.stats.loaded_bytes
        assert ("device" in cache.stats.blocks_from) == (number > 0 and cache.stats.dropped_tokens == dropped)
        hits += bool(dropped and "device" in cache.stats.blocks_from)
        dropped = cache.stats.dropped_tokens
        prompt = follow_up(ours.sequences, 9, seed=number)
    assert hits > 2  # of turns that saw no more than a part of their conversation


def test_a_turn_that_does_not_fit_into_the_window_leaves_the_session_where_it_is(store: AttentionStore) -> None:
    model = make_model()
    first = turn(model, tokens(30), AttentionStoreCache(model, "alice", store, window=64), max_new_tokens=4)
    with pytest.raises(ContextWindowError):
        turn(model, follow_up(first.sequences, 70, seed=1), AttentionStoreCache(model, "alice", store, window=64))
    cache = AttentionStoreCache(model, "alice", store, window=64)
    prompt = follow_up(first.sequences, 5, seed=1)
    turn(model, prompt, cache, max_new_tokens=4)
    assert_from_device(cache, prompt, 33)


def test_batches_neither_park_nor_take(store: AttentionStore) -> None:
    model = built("llama")
    first = turn(model, tokens(30).clamp_min(8), AttentionStoreCache(model, "alice", store))
    ids = torch.cat([follow_up(first.sequences, 4, seed=1), tokens(first.sequences.shape[1] + 4, seed=2)]).clamp_min(8)
    cache = AttentionStoreCache(model, ["alice", "bob"], store, wait=10)
    ours = turn(model, ids, cache)
    assert torch.equal(ours.sequences, turn(model, ids, None).sequences)
    assert sessions_on_device(store) == 1
    prompt = follow_up(ours.sequences[:1], 5, seed=3)
    cache = AttentionStoreCache(model, "alice", store, wait=10)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(model, prompt, None).sequences)
    assert_reused(cache, prompt, ours.sequences.shape[1] - 1)
    assert set(cache.stats.blocks_from) >= {"device"}
    detach(model)


def test_encoder_decoders_park_nothing(store: AttentionStore) -> None:
    model = make_seq2seq("t5")
    inputs = encoder_input("t5")
    for number in range(2):
        cache = AttentionStoreCache(model, "alice", store)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, make_seq2seq("t5").generate(**inputs, max_new_tokens=4, do_sample=False))
        assert bool(cache.stats.loaded_bytes) == bool(number)
    assert sessions_on_device(store) == 0


def test_a_chat_leaves_its_kv_to_the_tier(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device="64MiB") as store:
        chats = [ChatSession(model, tokenizer, store, name, max_new_tokens=6) for name in "ab"]
        for number in range(3):
            for chat in chats:
                chat.send(f"{chat.session}: the old prince looked at the letter and said {'nothing ' * number}")
                assert chat.stats is not None
                if number:
                    assert set(chat.stats.cache.blocks_from) == {"device"}
                    assert chat.stats.cache.loaded_bytes == 0
        assert sessions_on_device(store) == 2
        store.device_tier.resize(0)  # nothing else keeps it there
        chats[0].send("and the mother")
        assert chats[0].stats is not None
        assert chats[0].stats.cache.loaded_bytes > 0


# at once


def test_threads_with_few_places_on_the_device(tmp_path: Path) -> None:
    model, plain = make_model(), make_model()
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device="80KB") as store:
        over: list[int] = []

        def talk(name: str) -> tuple[list[torch.Tensor], int]:
            sequence, heard, hits = tokens(5, seed=ord(name)), [], 0
            for number in range(5):
                prompt = follow_up(sequence, 11, seed=100 * ord(name) + number)
                cache = AttentionStoreCache(model, name, store)
                sequence = turn(model, prompt, cache, max_new_tokens=3).sequences
                assert cache.prefilled_tokens == 11 + (1 if number else 5)
                hits += "device" in cache.stats.blocks_from
                if _bytes_of(store) > 80_000:
                    over.append(_bytes_of(store))
                heard.append(sequence)
            return heard, hits

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(talk, "abcd"))
        assert not over
        for heard, _ in results:
            for sequence in heard:
                prompt = sequence[:, :-3]
                assert torch.equal(sequence, turn(plain, prompt, None, max_new_tokens=3).sequences)


def test_readers_of_one_session_at_once_never_share_it(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store), max_new_tokens=4)
    prompts = [follow_up(first.sequences, 5 + number, seed=number) for number in range(4)]
    expected = [turn(plain, prompt, None).sequences for prompt in prompts]

    def read(number: int) -> bool:
        rng = random.Random(number)
        for _ in range(4):
            which = rng.randrange(4)
            cache = AttentionStoreCache(model, "alice", store, save=False)
            if not torch.equal(turn(model, prompts[which], cache).sequences, expected[which]):
                return False
            assert cache.reused_tokens == 43
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_copied_and_memory_is_freed(tmp_path: Path) -> None:
    model, plain = make_model().cuda(), make_model().cuda()
    with AttentionStore(tmp_path / "store", block_size=BLOCK, on_device="64MiB") as store:
        reference = Reference(plain)
        prompt, held = tokens(40).cuda(), 0
        for number in range(3):
            cache = AttentionStoreCache(model, "alice", store)
            with torch.cuda.stream(torch.cuda.Stream()):
                ours = turn(model, prompt, cache)
            torch.cuda.synchronize()
            assert_same(ours, reference.turn(prompt))
            if number:
                assert_from_device(cache, prompt, held)
            held = ours.sequences.shape[1] - 1
            prompt = follow_up(ours.sequences, 9, seed=number)
        del cache
        before = torch.cuda.memory_allocated()
        freed = _bytes_of(store)
        store.device_tier.resize(0)
        assert torch.cuda.memory_allocated() <= before - freed
