"""KV with NaN or infinity in it serves the turn that made it, and no other; stores that have some are set right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, tokens

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.lab.families.tiny import build
from hf_attnstore.store.blocks import block as blocks
from hf_attnstore.store.blocks.block import Block, BlockMeta, is_finite
from hf_attnstore.store.blocks.keys import block_key, encode_tokens
from hf_attnstore.store.store import repair_store

BAD = 7
"""A token whose embedding is not finite."""
SETTINGS: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def _broken(model: Any, value: float) -> Any:
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = value
    return model


def _good(count: int = 30, seed: int = 1) -> torch.Tensor:
    return tokens(count, seed).clamp_min(BAD + 1)


def _bad() -> torch.Tensor:
    """What `_good` is, and more after it. What is computed together is all bad: NaN times a weight of 0 is NaN."""
    ids = _good(40)
    ids[0, 33] = BAD
    return ids


def _answer(model: Any, cache: AttentionStoreCache, prompt: torch.Tensor) -> Any:
    output = model.generate(prompt, past_key_values=cache, **SETTINGS)
    cache.store.flush()  # type: ignore[union-attr]
    return output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_finite_is_told_for_every_dtype(value: float) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2):
        tensor = torch.full((3, 50_000), 7.0).to(dtype)
        assert is_finite(tensor)
        tensor[2, -1] = torch.tensor(value).to(dtype)
        assert not is_finite(tensor)
    assert is_finite(torch.full((2, 3), torch.finfo(torch.float16).max, dtype=torch.float16))
    assert is_finite(torch.full((2, 3), -1))
    assert is_finite(torch.empty(0, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_block_with_nan_is_never_handed_to_the_store(
    value: float, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = _broken(make_model(), value)
    _answer(model, AttentionStoreCache(model, "a", store), _good())
    for _ in range(2):
        cache = AttentionStoreCache(model, "a", store)
        _answer(model, cache, _bad())
        assert cache.reused_tokens == 30
        assert "NaN or infinity" in cache.stats.recomputed
        assert len(store.tokens("a")) <= 32
    assert log.text.count("NaN or infinity") == 1
    assert not store.verify().problems
    # what comes after on the same object is as right as ever
    good = torch.cat([_good(), _good(9, 5)], dim=1)
    assert torch.equal(_answer(model, cache, good), model.generate(good, **SETTINGS))
    assert cache.reused_tokens == 30
    assert not cache.stats.recomputed
    assert len(store.tokens("a")) == good.shape[1] + 2


def test_it_is_not_left_in_the_device_tier_either(tmp_path: Path) -> None:
    model = _broken(make_model(), float("nan"))
    with AttentionStore(tmp_path / "store", block_size=16, on_device=1 << 24) as store:
        _answer(model, AttentionStoreCache(model, "a", store), _good())
        cache = AttentionStoreCache(model, "a", store)
        _answer(model, cache, _bad())
        assert cache.stats.blocks_from == {"device": 2}
        again = AttentionStoreCache(model, "a", store)
        _answer(model, again, _bad())
        assert again.reused_tokens == 30
        assert "device" not in again.stats.blocks_from


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
def test_running_states_with_nan_are_not_kept(family: str, store: AttentionStore) -> None:
    model = _broken(build(family), float("nan"))
    _answer(model, AttentionStoreCache(model, "a", store), _good())
    for _ in range(2):
        cache = AttentionStoreCache(model, "a", store)
        _answer(model, cache, _bad())
        assert cache.reused_tokens == 29
        assert cache.stats.checkpoints == 0
        assert "NaN or infinity" in cache.stats.recomputed
    assert not store.verify().problems


def test_rows_of_a_batch_are_looked_at_one_by_one(store: AttentionStore) -> None:
    model = _broken(make_model(), float("nan"))
    prompts = torch.cat([_bad(), _good(40, 2)])
    cache = AttentionStoreCache(model, ["a", "b"], store)
    _answer(model, cache, prompts)
    assert [(info.name, info.tokens) for info in store.sessions()] == [("b", 42)]
    assert "NaN or infinity" in cache.stats.recomputed


class _Event:
    """As of an accelerator that has copied everything."""

    def synchronize(self) -> None:
        pass


def test_what_arrives_from_an_accelerator_is_looked_at_when_it_is_there(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    key = block_key(store.root("f" * 16), encode_tokens(range(16)))
    meta = BlockMeta(key, store.root("f" * 16), "f" * 16, 0, encode_tokens(range(16)))
    for value in (float("nan"), 1.0):
        block = Block(meta, {"0.keys": torch.full((1, 16, 4), value)}, [_Event()])  # type: ignore[list-item]
        assert store.reserve(block.nbytes)
        store.put(block)
        store.flush()
        assert store.has(key) == (value == 1.0)
    assert log.text.count("NaN or infinity") == 1


def test_stores_that_have_some_are_found_and_set_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _broken(make_model(), float("nan"))
    with monkeypatch.context() as unseen, AttentionStore(tmp_path / "store", block_size=16) as store:
        unseen.setattr(blocks, "is_finite", lambda tensor: True)  # as of older versions
        _answer(model, AttentionStoreCache(model, "a", store), _good())
        _answer(model, AttentionStoreCache(model, "a", store), _bad())
        _answer(model, AttentionStoreCache(model, "b", store), _good(30, 3))
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        assert len(store.tokens("a")) == 42
        found = store.verify().problems
        assert [problem.kind for problem in found] == ["damaged block"] * 2
        assert all("NaN or infinity" in problem.detail for problem in found)
    repair_store(tmp_path / "store")
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        assert not store.verify().problems
        assert len(store.tokens("b")) == 32
        cache = AttentionStoreCache(model, "a", store)
        _answer(model, cache, _bad())
        assert cache.reused_tokens == 30  # of the block that the first turn made
