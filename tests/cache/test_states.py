"""Layers that keep a running state: what is reused ends at a checkpoint, and nothing of it is ever guessed."""

from __future__ import annotations

import copy
import importlib
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tokens
from support.turns import follow_up, turn
from torch import nn
from transformers import DynamicCache, cache_utils
from transformers.generation.streamers import BaseStreamer

from hf_attnstore import AttentionStore, AttentionStoreCache, attach, detach
from hf_attnstore.cache.layers import kinds
from hf_attnstore.cache.pauses import NEAR
from hf_attnstore.cache.probing.continuing import CONTINUING, Continuing
from hf_attnstore.errors import CacheUseError
from hf_attnstore.lab.families.tiny import build, families
from hf_attnstore.store.records.files import tree_bytes

attaching = importlib.import_module("hf_attnstore.cache.hooks")

pytestmark = pytest.mark.usefixtures("left_alone")

FAMILIES = ("mamba2", "qwen3_next", "lfm2", "falcon_h1", "deepseek_v4")
"""A running state alone; beside full attention in other layers; convolutions; in every layer; a kind of its own."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return _built(request.param)


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return _built("qwen3_next")


def _built(family: str) -> Any:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    return build(family)


def prompt(count: int, seed: int = 0) -> torch.Tensor:
    """Ordinary ids: the tiny models' end-of-text and padding are the lowest ones."""
    return tokens(count, seed).clamp_min(8)


def test_a_prompt_and_a_turn_end_with_a_checkpoint(model: Any, store: AttentionStore) -> None:
    cache = AttentionStoreCache(model, "alice", store)
    first = turn(model, prompt(50), cache)
    assert cache.granularity == "checkpoint"
    assert (cache.reused_tokens, cache.prefilled_tokens, cache.stats.checkpoints) == (0, 50, 2)
    longer = follow_up(first.sequences, 9, seed=1)
    again = AttentionStoreCache(model, "alice", store)
    turn(model, longer, again)
    assert again.reused_tokens == 55  # 50 and 6 generated, of which the last was never fed
    assert again.prefilled_tokens == longer.shape[1] - 55
    assert again.stats.loaded_bytes > 0


def test_the_same_prompt_again_is_reused_up_to_its_last_token(model: Any, tmp_path: Path) -> None:
    ids = prompt(41)
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        cache = AttentionStoreCache(model, "alice", store)
        first = turn(model, ids, cache)
        same_object = turn(model, ids, cache)
        assert (cache.reused_tokens, cache.prefilled_tokens) == (40, 1)
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        cache = AttentionStoreCache(model, "bob", store)
        restarted = turn(model, ids, cache)
        assert (cache.reused_tokens, cache.prefilled_tokens) == (40, 1)
    for other in (same_object, restarted):
        assert torch.equal(other.sequences, first.sequences)
        for a, b in zip(other.logits, first.logits, strict=True):
            assert torch.equal(a, b)  # fed in the same parts, so the same to the bit


def test_reuse_ends_at_the_longest_checkpoint_that_the_prompt_agrees_with(hybrid: Any, store: AttentionStore) -> None:
    cache = AttentionStoreCache(hybrid, "alice", store, checkpoint_every=10)
    first = turn(hybrid, prompt(45), cache)
    edited = first.sequences.clone()
    edited[0, 33] = (edited[0, 33] + 1) % 90 + 8
    cache = AttentionStoreCache(hybrid, "alice", store, checkpoint_every=10)
    ours = turn(hybrid, edited, cache)
    assert (cache.stats.matched_tokens, cache.reused_tokens) == (33, 30)
    assert cache.prefilled_tokens == edited.shape[1] - 30
    assert torch.equal(ours.sequences, turn(hybrid, edited, None).sequences)


def test_checkpoints_at_every_so_many_tokens_are_taken_while_generating_too(hybrid: Any, store: AttentionStore) -> None:
    cache = AttentionStoreCache(hybrid, "alice", store, checkpoint_every=4)
    ours = turn(hybrid, prompt(9), cache, max_new_tokens=10, min_new_tokens=10)
    assert cache.stats.checkpoints == 5  # 4, 8 (also the prompt's), 12, 16, and 18 at the end
    shorter = ours.sequences[:, :15]
    again = AttentionStoreCache(hybrid, "alice", store)
    turn(hybrid, shorter, again)
    assert again.reused_tokens == 12


def test_checkpoint_every_must_be_a_number_of_tokens(hybrid: Any, store: AttentionStore) -> None:
    with pytest.raises(CacheUseError, match="checkpoint_every"):
        AttentionStoreCache(hybrid, "alice", store, checkpoint_every=0)


def checkpoint_files(store: AttentionStore) -> list[Path]:
    """The files of checkpoints: their headers say so."""
    assert store.path is not None
    return [path for path in store.path.rglob("*.safetensors") if b'"state":' in path.read_bytes()[:4096]]


@pytest.mark.parametrize("damage", ["missing", "altered", "cut"])
def test_a_checkpoint_that_is_lost_or_damaged_is_done_without(
    model: Any, tmp_path: Path, damage: str, log: pytest.LogCaptureFixture
) -> None:
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        first = turn(model, prompt(45), AttentionStoreCache(model, "alice", store))
    longer = follow_up(first.sequences, 7, seed=3)
    expected = turn(model, longer, None).sequences
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        files = checkpoint_files(store)
        assert len(files) == 2
        for path in files:
            content = bytearray(path.read_bytes())
            if damage == "missing":
                path.unlink()
            else:
                (header,) = struct.unpack_from("<Q", content)
                content[8 + header + 5] ^= 4
                path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
        cache = AttentionStoreCache(model, "alice", store)
        ours = turn(model, longer, cache)
        assert torch.equal(ours.sequences, expected)
        assert cache.reused_tokens == 0
        assert cache.prefilled_tokens == longer.shape[1]
        assert "recomputed" in log.text or "computed again" in log.text
        again = AttentionStoreCache(model, "alice", store)
        turn(model, longer, again)
        ends = [n + 1 for n, token in enumerate(longer[0].tolist()) if token == model.config.eos_token_id]
        near = [n for n in ends if n > longer.shape[1] - NEAR]  # where an answer ended is as good as the last token
        assert again.reused_tokens == (near[-1] if near else longer.shape[1] - 1)


class _Stops(BaseStreamer):  # type: ignore[misc]
    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("enough")

    def end(self) -> None: ...


def test_a_streamer_gets_the_prompt_once_though_a_load_fails_in_a_part_before(
    hybrid: Any, store: AttentionStore
) -> None:
    class Hears(BaseStreamer):
        def __init__(self) -> None:
            self.heard: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.heard.append(value.flatten().tolist())

        def end(self) -> None: ...

    sequence = turn(hybrid, prompt(70), AttentionStoreCache(hybrid, "alice", store)).sequences
    store.drop_memory()
    for path in store.path.glob("blocks/*/*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[int(len(data) * 0.9)] ^= 16  # the tensors, not what is read to find them
        path.write_bytes(bytes(data))
    more, streamer = follow_up(sequence, 20, 7), Hears()
    cache = AttentionStoreCache(hybrid, "alice", store)
    ours = turn(hybrid, more, cache, streamer=streamer).sequences
    assert cache.stats.missed == "load failed"
    assert streamer.heard == [more[0].tolist(), *([token] for token in ours[0, more.shape[1] :].tolist())]


def test_a_turn_that_is_interrupted_between_forwards_keeps_its_state(model: Any, store: AttentionStore) -> None:
    ids = prompt(33)
    with pytest.raises(RuntimeError, match="enough"):
        turn(model, ids, AttentionStoreCache(model, "alice", store), streamer=_Stops(4))
    done = turn(model, ids, None).sequences
    cache = AttentionStoreCache(model, "alice", store)
    ours = turn(model, follow_up(done, 5, seed=2), cache)
    assert cache.reused_tokens == 36  # the prompt, and three tokens that were fed
    assert torch.equal(ours.sequences, turn(model, follow_up(done, 5, seed=2), None).sequences)


def test_a_forward_that_is_interrupted_leaves_no_state_behind(hybrid: Any, store: AttentionStore) -> None:
    ids = prompt(33)
    # the model is asked now whether it continues, where nobody knows it, and not in the forwards that are counted
    turn(hybrid, prompt(5), AttentionStoreCache(hybrid, None, store, save=False))
    cache = AttentionStoreCache(hybrid, "alice", store)
    calls: list[int] = []

    def fails(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = hybrid.model.layers[-1].register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        turn(hybrid, ids, cache)
    handle.remove()
    done = turn(hybrid, ids, None).sequences
    ours = turn(hybrid, done, cache)
    assert cache.stats.matched_tokens == 34  # keys and values of one generated token too
    assert cache.reused_tokens == 32  # but the last state that is known to be right is the prompt's
    assert torch.equal(ours.sequences, turn(hybrid, done, None).sequences)


def test_a_state_does_not_go_back_by_crop_but_to_a_checkpoint(hybrid: Any, store: AttentionStore) -> None:
    cache = AttentionStoreCache(hybrid, "alice", store)
    turn(hybrid, prompt(30), cache)
    assert cache.get_seq_length() == 35
    with pytest.raises(CacheUseError, match="running state"):
        cache.crop(-3)
    cache.reset()
    turn(hybrid, prompt(30), cache)
    cache.crop(-6)  # to 29, where the prompt's checkpoint is
    assert cache.get_seq_length() == 29
    with torch.no_grad():
        ours = hybrid(prompt(30)[:, 29:], past_key_values=cache).logits[:, -1]
    reference = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(prompt(30)[:, :29], past_key_values=reference)
        theirs = hybrid(prompt(30)[:, 29:], past_key_values=reference).logits[:, -1]
    assert torch.equal(ours, theirs)


def test_convolutions_alone_can_go_back_while_the_past_is_recorded(store: AttentionStore) -> None:
    model = _built("lfm2")
    ids = prompt(30)
    cache = AttentionStoreCache(model, "alice", store)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        if not hasattr(cache.layers[0], "record_past"):
            pytest.skip("this transformers records no past of convolutions")
        cache.activate_past_recording()
        model(ids[:, 20:26], past_key_values=cache)
        cache.crop(-4)
        ours = model(ids[:, 22:], past_key_values=cache).logits
        reference = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=reference)
        model(ids[:, 20:22], past_key_values=reference)
        theirs = model(ids[:, 22:], past_key_values=reference).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    detach(model)


def test_a_loop_of_ones_own(model: Any, tmp_path: Path) -> None:
    ids = prompt(40)
    reference = DynamicCache(config=model.config)
    name = "past_key_values"
    with AttentionStore(tmp_path / "store", block_size=16) as store, torch.no_grad():
        cache = AttentionStoreCache(model, "alice", store)
        name = attaching.attachment_of(model).cache_name
        for start, stop in ((0, 25), (25, 26), (26, 27)):
            ours = model(ids[:, start:stop], use_cache=True, **{name: cache}).logits
            theirs = model(ids[:, start:stop], use_cache=True, **{name: reference}).logits
            assert torch.equal(ours, theirs)
        cache.save()
        assert cache.stats.checkpoints == 1
    with AttentionStore(tmp_path / "store", block_size=16) as store, torch.no_grad():
        cache = AttentionStoreCache(model, "alice", store)
        assert cache.match(ids) == 27
        ours = model(ids[:, 27:28], use_cache=True, **{name: cache}).logits
        theirs = model(ids[:, 27:28], use_cache=True, **{name: reference}).logits
        assert torch.equal(ours, theirs)
        cache.save()
        resumed = AttentionStoreCache(model, "alice", store)
        assert torch.equal(resumed.resume(), ids[:, :28])
        assert resumed.get_seq_length() == 28


def test_beams_samples_and_copies(model: Any, store: AttentionStore) -> None:
    ids = prompt(30)
    cache = AttentionStoreCache(model, "alice", store)
    first = turn(model, ids, cache)
    longer = follow_up(first.sequences, 6, seed=4)
    twin = copy.deepcopy(cache)
    assert twin.get_seq_length() == 35
    for settings in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "top_k": 5}):
        torch.manual_seed(5)
        ours = turn(model, longer, AttentionStoreCache(model, "alice", store), **settings)
        torch.manual_seed(5)
        theirs = turn(model, longer, None, **settings)
        assert torch.equal(ours.sequences, theirs.sequences)
    with torch.no_grad():
        name = attaching.attachment_of(model).cache_name
        model(longer[:, 35:36], use_cache=True, **{name: twin})
    assert (twin.get_seq_length(), cache.get_seq_length()) == (36, 35)


def test_plain_generate_on_an_attached_model_reuses_states(model: Any, store: AttentionStore) -> None:
    ids = prompt(37)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    attach(model, store)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), plain)
    store.flush()
    before = store.stats()["reused_tokens"]
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), plain)
    assert store.stats()["reused_tokens"] - before == 36


def test_checkpoints_belong_to_their_session(hybrid: Any, tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        first = turn(hybrid, prompt(45), AttentionStoreCache(hybrid, "alice", store))
        store.flush()
        assert len(checkpoint_files(store)) == 2
        store.fork("alice", "bob")
        store.delete("alice")
        assert len(checkpoint_files(store)) == 2
        cache = AttentionStoreCache(hybrid, "bob", store)
        turn(hybrid, follow_up(first.sequences, 4, seed=6), cache)
        assert cache.reused_tokens == 50
        store.flush()
        assert len(checkpoint_files(store)) == 4
        store.delete("bob")
        assert checkpoint_files(store) == []


def test_checkpoints_survive_the_loss_of_the_index_and_are_verified(hybrid: Any, tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        first = turn(hybrid, prompt(45), AttentionStoreCache(hybrid, "alice", store))
        store.flush()
        assert store.verify().problems == []
    (tmp_path / "store" / "index.sqlite").unlink()
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        assert store.verify().problems == []
        cache = AttentionStoreCache(hybrid, "alice", store)
        turn(hybrid, follow_up(first.sequences, 4, seed=6), cache)
        assert cache.reused_tokens == 50


def test_an_exported_conversation_goes_on_without_its_checkpoints(hybrid: Any, tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        first = turn(hybrid, prompt(45), AttentionStoreCache(hybrid, "alice", store))
        store.flush()
        store.export_session("alice", tmp_path / "alice.attnstore")
    longer = follow_up(first.sequences, 4, seed=6)
    with AttentionStore(tmp_path / "other", block_size=16) as store:
        store.import_session(tmp_path / "alice.attnstore", "alice")
        cache = AttentionStoreCache(hybrid, "alice", store)
        ours = turn(hybrid, longer, cache)
        assert (cache.stats.matched_tokens, cache.reused_tokens) == (50, 0)
        assert torch.equal(ours.sequences, turn(hybrid, longer, None).sequences)


def test_checkpoints_in_an_encrypted_store(hybrid: Any, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = bytes(range(32))
    with AttentionStore(tmp_path / "store", block_size=16, encryption_key=key) as store:
        first = turn(hybrid, prompt(45), AttentionStoreCache(hybrid, "alice", store))
    with AttentionStore(tmp_path / "store", block_size=16, encryption_key=key) as store:
        cache = AttentionStoreCache(hybrid, "alice", store)
        turn(hybrid, follow_up(first.sequences, 4, seed=6), cache)
        assert cache.reused_tokens == 50


def test_states_count_against_the_caps(hybrid: Any, tmp_path: Path) -> None:
    cap = 600_000
    with AttentionStore(tmp_path / "store", block_size=16, memory=200_000, disk=cap) as store:
        for seed in range(12):
            turn(hybrid, prompt(45, seed), AttentionStoreCache(hybrid, f"s{seed}", store))
            assert store.stats()["memory_bytes"] <= 200_000
        store.flush()
        assert tree_bytes(tmp_path / "store") <= cap
    with AttentionStore(memory=1000, disk=0) as store:  # too small for any state: nothing is kept, nothing goes wrong
        ids = prompt(45)
        ours = turn(hybrid, ids, AttentionStoreCache(hybrid, "alice", store))
        assert torch.equal(ours.sequences, turn(hybrid, ids, None).sequences)


def test_what_overflows_the_window_is_computed_again(hybrid: Any, store: AttentionStore) -> None:
    cache = AttentionStoreCache(hybrid, "alice", store, window=64)
    first = turn(hybrid, prompt(45), cache)
    longer = follow_up(first.sequences, 20, seed=7)
    ours = turn(hybrid, longer, cache)
    assert cache.stats.dropped_tokens > 0
    assert cache.stats.truncation == "recomputed"
    shown = torch.cat([longer[:, :4], longer[:, 4 + cache.stats.dropped_tokens :]], dim=1)
    expected = turn(hybrid, shown, None).sequences[:, shown.shape[1] :]
    assert torch.equal(ours.sequences[:, longer.shape[1] :], expected)


def test_a_model_that_goes_on_one_token_at_a_time_is_fed_so(store: AttentionStore) -> None:
    model = _built("mamba")
    ids = prompt(30)
    first = turn(model, ids, AttentionStoreCache(model, "alice", store))
    longer = follow_up(first.sequences, 6, seed=8)
    forwards: list[int] = []
    cache = AttentionStoreCache(model, "alice", store)
    handle = model.backbone.layers[0].register_forward_pre_hook(lambda _, args: forwards.append(args[0].shape[1]))
    ours = turn(model, longer, cache)
    handle.remove()
    assert cache.reused_tokens == 35
    assert set(forwards) == {1}
    theirs = turn(model, longer, None)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), pytest.raises(CacheUseError, match="one token at a time"):
        model(prompt(3), cache_params=cache, use_cache=True)
    detach(model)


def test_states_are_kept_where_a_hook_of_somebody_is_on_the_model(hybrid: Any, store: AttentionStore) -> None:
    ids = prompt(30)
    hybrid.register_forward_pre_hook(lambda module, args: None)
    for reused in (0, 29):
        cache = AttentionStoreCache(hybrid, "alice", store)
        ours = turn(hybrid, ids, cache)
        assert (cache.reused_tokens, cache.prefilled_tokens) == (reused, 30 - reused)
        assert torch.equal(ours.sequences, turn(hybrid, ids, None).sequences)


def test_a_model_that_does_not_go_on_correctly_is_not_continued(
    hybrid: Any, store: AttentionStore, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CONTINUING, "_found", {})
    monkeypatch.setattr(attaching, "probe_continuing", lambda model, name: Continuing("", "it forgets"))
    ids = prompt(30)
    for _ in range(2):
        cache = AttentionStoreCache(hybrid, "alice", store)
        ours = turn(hybrid, ids, cache)
        assert (cache.reused_tokens, cache.stats.saved_bytes) == (0, 0)
        assert torch.equal(ours.sequences, turn(hybrid, ids, None).sequences)
    assert f"no cache continues {type(hybrid).__name__}: it forgets" in log.text


class _Novel(cache_utils.DynamicLayer):  # type: ignore[misc]
    """A kind of layer that nobody has heard of."""


def test_a_kind_of_layer_that_nobody_knows(
    store: AttentionStore, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kinds, "_warned", set())
    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", _Novel)
    model = _built("llama")
    ids = prompt(30)
    expected = turn(model, ids, None).sequences
    for _ in range(3):
        cache = AttentionStoreCache(model, "alice", store)
        assert cache.granularity == "none"
        ours = turn(model, ids, cache)
        assert torch.equal(ours.sequences, expected)
        assert (cache.reused_tokens, cache.prefilled_tokens, cache.stats.saved_bytes) == (0, 30, 0)
        assert "_Novel" in cache.stats.recomputed or "full_attention" in cache.stats.recomputed
        ours = turn(model, ours.sequences, cache)  # the same object again
        assert torch.equal(ours.sequences, turn(model, ours.sequences[:, :36], None).sequences)
    told = [record for record in log.records if "_Novel" in record.getMessage()]
    assert len(told) == 1
    monkeypatch.setitem(kinds._MAKERS, "_Novel", lambda layer: kinds.FullLayer())
    cache = AttentionStoreCache(model, "bob", store)
    turn(model, ids, cache)
    again = AttentionStoreCache(model, "bob", store)
    turn(model, ids, again)
    assert again.reused_tokens == 29
    detach(model)


@pytest.mark.parametrize("family", ["mamba2", "lfm2", "falcon_h1", "zaya"])
def test_layers_are_of_the_kind_that_transformers_takes_them_for(family: str, store: AttentionStore) -> None:
    model = _built(family)
    if family == "zaya":  # with a sliding window in every layer
        model.config.layer_types = ["hybrid_sliding"] * model.config.num_hidden_layers
        model.config.sliding_window = 8
    theirs = DynamicCache(config=model.config)
    for ours in (AttentionStoreCache(model, "alice", store), AttentionStoreCache(model, ["alice", "bob"], store)):
        assert ours.is_linear == theirs.is_linear
        assert ours.is_sliding == theirs.is_sliding
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            for kind in (cache_utils.LinearAttentionLayer, cache_utils.LinearAttentionAndFullAttentionLayer):
                assert isinstance(mine, kind) == isinstance(other, kind)


def test_transformers_own_classes_still_serve_their_kinds(caplog: pytest.LogCaptureFixture) -> None:
    """A class derived from a model's own must not take its place in transformers' list."""
    model = _built("deepseek_v4")
    before = dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)
    with caplog.at_level(logging.WARNING):
        kinds.make_layers(model)
    assert before == cache_utils.DYNAMIC_LAYER_TYPE_MAPPING


def test_a_model_that_keeps_its_state_elsewhere_is_not_kept(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = _built("recurrent_gemma")
    ids = prompt(40)
    for _ in range(3):
        cache = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, ids, cache).sequences, turn(_built("recurrent_gemma"), ids, None).sequences)
        assert (cache.reused_tokens, cache.stats.saved_bytes) == (0, 0)
    store.flush()
    assert store.sessions() == []
    assert not list(store.path.glob("blocks/*/*/*"))
    assert log.text.count("hold [0, ") == 1
    assert "load failed" not in log.text
    detach(model)
