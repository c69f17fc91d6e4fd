"""Layers that lie together in host memory: they get what they got one by one, in fewer steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import make_llama, tokens
from support.truncating import TruncatingReference
from support.turns import Reference, assert_reused, assert_same, follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.layers.by_token import FullLayer, KeptLayer, SlidingLayer
from hf_attnstore.cache.transfer import coalesced as joining
from hf_attnstore.cache.transfer.coalesced import make_rooms
from hf_attnstore.store.blocks.block import TensorSpec
from hf_attnstore.store.transfer.stages import Joint

LAYERS = 9
TOGETHER = ["layers 0 to 1", "layers 2 to 3", "layers 4 to 5", "layers 6 to 7", "layer 8"]


def llama() -> Any:
    return make_llama(num_hidden_layers=LAYERS)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether blocks in memory could be copied as one, each time."""
    found: list[bool] = []
    join = Joint.join

    def seen(self: Joint, runs: Any) -> bool:
        found.append(join(self, runs))
        return found[-1]

    monkeypatch.setattr(Joint, "join", seen)
    return found


def loaded_parts(cache: AttentionStoreCache) -> list[str]:
    return [event.name for event in cache.timeline if event.track == "load"]


@pytest.mark.parametrize("tier", ["memory", "disk", "both", "memory again"])
def test_layers_that_lie_together_hold_what_a_kept_cache_holds(
    tier: str, store: AttentionStore, joined: list[bool]
) -> None:
    model, reference = llama(), Reference(llama())
    sequence = reference.turn(tokens(70)).sequences
    turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
    store.flush()
    if tier == "both":  # the first two of five blocks
        store.drop_memory()
        cache = AttentionStoreCache(model, "bob", store, save=False)
        turn(model, tokens(70)[:, :33], cache, max_new_tokens=1)
        store.flush()
        assert store.stats()["memory_blocks"] == 2
    elif tier != "memory":
        store.drop_memory()
    if tier == "memory again":
        turn(model, sequence, AttentionStoreCache(model, "alice", store, save=False), max_new_tokens=1)
        store.flush()
    joined.clear()
    prompt = follow_up(sequence, 9, 2)
    cache = AttentionStoreCache(model, "alice", store, record=True)
    ours, theirs = turn(model, prompt, cache), reference.turn(prompt)
    assert_same(ours, theirs)
    assert_reused(cache, prompt, sequence.shape[1] - 1)
    assert cache.stats.blocks_from == {"both": {"memory": 2, "disk": 3}, "disk": {"disk": 5}}.get(tier, {"memory": 5})
    assert loaded_parts(cache) == TOGETHER
    assert joined == [True] * 5
    for own, kept in zip(cache.layers, reference.cache.layers, strict=True):
        assert torch.equal(own.keys, kept.keys)
        assert torch.equal(own.values, kept.values)


def test_keys_that_lie_together_are_moved_each_once(store: AttentionStore, joined: list[bool]) -> None:
    model, window = llama(), 80
    reference = TruncatingReference(llama(), window)
    sequence = tokens(0)
    rotated = 0
    for number in range(9):
        prompt = follow_up(sequence, 17, seed=number)
        theirs = reference.turn(prompt, 5)
        cache = AttentionStoreCache(model, "alice", store, window=window)
        ours = turn(model, prompt, cache, max_new_tokens=5)
        for a, b in zip(ours.logits, theirs.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
        rotated += cache.stats.rotated_tokens
        sequence = torch.cat([prompt, theirs.sequences[:, -5:]], dim=1)
    assert reference.dropped
    assert rotated
    assert joined
    assert all(joined)


def test_blocks_whose_tensors_lie_apart_are_copied_one_by_one(store: AttentionStore, joined: list[bool]) -> None:
    model, reference = llama(), Reference(llama())
    sequence = reference.turn(tokens(70)).sequences
    turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
    for block in store._memory._blocks.values():
        block.tensors = {name: tensor.clone() for name, tensor in block.tensors.items()}
    prompt = follow_up(sequence, 9, 2)
    cache = AttentionStoreCache(model, "alice", store, record=True)
    assert_same(turn(model, prompt, cache), reference.turn(prompt))
    assert cache.stats.blocks_from == {"memory": 5}
    assert joined == [False] * 5
    assert loaded_parts(cache) == TOGETHER


# which layers


def spec(number: int, name: str, heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(f"layers.{number}.{name}", dtype, (heads, 16, dim))


def groups(layers: list[KeptLayer], specs: dict[int, dict[str, TensorSpec]]) -> list[tuple[int, int]]:
    """First layer, and number of layers, of all that lie together; checks that the buffers are what was asked for."""
    found = []
    for number, room in make_rooms(layers, specs, 100).items():
        assert {name: b.shape[1::2] for name, b in room.buffers.items()} == {
            name: (s.shape[0], s.shape[2]) for name, s in specs[number].items()
        }
        for name, buffer in room.buffers.items():
            assert buffer.dtype == specs[number][name].dtype
            assert buffer.shape[0] == 1
            assert buffer.shape[2] >= max(100, layers[number].expected)
        if room.joint is not None:
            found.append((number, room.joint.stages))
            names = [s.name for n in range(number, number + room.joint.stages) for s in specs[n].values()]
            assert room.joint.names == tuple(names)
            assert room.joint.target.shape[1] == 100
            assert room.joint.target.data_ptr() == next(iter(room.buffers.values())).data_ptr()
    return found


def test_a_quarter_of_the_layers_lies_together_at_most() -> None:
    for count, wanted in ((1, [1]), (3, [1] * 3), (7, [1] * 7), (8, [2] * 4), (13, [3] * 4 + [1])):
        layers: list[KeptLayer] = [FullLayer() for _ in range(count)]
        layers[-1].expected = 1000
        specs = {n: {name: spec(n, name) for name in ("keys", "values")} for n in range(count)}
        assert [stages for _, stages in groups(layers, specs)] == wanted


def test_no_more_lie_together_than_are_copied_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_ENOUGH", 2 * 2 * 16 * 8 * 4 + 1)
    layers: list[KeptLayer] = [FullLayer() for _ in range(12)]
    specs = {n: {name: spec(n, name) for name in ("keys", "values")} for n in range(12)}
    assert groups(layers, specs) == [(n, 2) for n in range(0, 12, 2)]


def test_only_neighbours_of_one_kind_and_shape_lie_together() -> None:
    class Other(FullLayer):
        pass

    layers: list[KeptLayer] = [FullLayer() for _ in range(16)]
    layers[2], layers[5] = SlidingLayer(32), Other()
    specs = {n: {name: spec(n, name) for name in ("keys", "values")} for n in range(16) if n != 8}
    specs[10] = {name: spec(10, name, dim=4) for name in ("keys", "values")}
    specs[12] = {name: spec(12, name, dtype=torch.bfloat16) for name in ("keys", "values")}
    specs[13] = {"keys": spec(13, "keys", dim=4), "values": spec(13, "values")}
    specs[14] = {"keys": spec(14, "keys", heads=3), "values": spec(14, "values")}
    assert groups(layers, specs) == [(0, 2), (3, 2), (6, 2), (9, 1), (10, 1), (11, 1), (12, 1), (14, 2)]
    assert not {2, 5, 8, 13} & make_rooms(layers, specs, 100).keys()
