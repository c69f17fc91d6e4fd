"""Turns of a conversation, with the store and without it, and what a turn must have reused and loaded."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin

from hf_attnstore import AttentionStoreCache
from hf_attnstore.cache.identity import fingerprint, samples, watch
from hf_attnstore.cache.layers.by_token import SlidingLayer

from .tiny_models import BLOCK, tokens

CHUNKS_CONTINUE = "past_length = 0" not in inspect.getsource(GenerationMixin._prefill)
"""Whether this transformers prefills in chunks from where the cache ends; older ones begin at the beginning."""

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def turn(model: Any, ids: torch.Tensor, cache: Cache | None, **settings: Any) -> Any:
    """One greedy `generate` on the whole conversation `ids`; returns sequences and raw logits."""
    settings = {**GREEDY, **settings}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


class Reference:
    """The conversation as it goes with a `DynamicCache` kept in memory, on a model that no store touches."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)

    def turn(self, ids: torch.Tensor, **settings: Any) -> Any:
        return turn(self.model, ids, self.cache, **settings)


def assert_same(ours: Any, theirs: Any) -> None:
    """Tokens and logits are equal, bit for bit."""
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == len(theirs.logits)
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert torch.equal(a, b), f"the logits of step {step} differ by up to {(a - b).abs().max()}"


def follow_up(sequence: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The conversation so far and `count` new tokens."""
    return torch.cat([sequence.cpu(), tokens(count, seed)], dim=1).to(sequence.device)


def bytes_per_token(cache: Cache) -> list[int]:
    """Bytes of one token's keys and values, by layer."""
    return [
        sum(math.prod(t.shape) // t.shape[-2] * t.element_size() for t in (layer.keys, layer.values))
        for layer in cache.layers
    ]


def expected_load(cache: AttentionStoreCache, reference: Cache, length: int, block: int = BLOCK) -> int:
    """Bytes that a fresh cache has to load to go on at `length`: everything in full layers, in sliding layers only
    the last window, or the block that is to be continued if that begins earlier."""
    total = 0
    for ours, size in zip(cache.layers, bytes_per_token(reference), strict=True):
        first = 0
        if isinstance(ours, SlidingLayer):
            assert ours.window is not None
            first = max(0, min(length - ours.window + 1, length - length % block))
        total += (length - first) * size
    return total


def assert_reused(cache: AttentionStoreCache, prompt: torch.Tensor, reused: int) -> None:
    """The turn reused so much, and computed the rest of the prompt and nothing else."""
    assert cache.reused_tokens == reused
    assert cache.prefilled_tokens == prompt.shape[1] - reused
    assert cache.stats.prompt_tokens == prompt.shape[1]


def layer_hooks(model: nn.Module) -> list[dict[str, list[tuple[int, Any]]]]:
    """Every hook dictionary of every module, and the instance attributes of the model itself."""
    state = []
    for module in model.modules():
        names = [name for name in vars(module) if name.endswith("hooks") or "_hooks_" in name]
        state.append({name: list(vars(module)[name].items()) for name in names})
    return state


def count_values_read(monkeypatch: pytest.MonkeyPatch, read: list[int]) -> None:
    """From now on `read` gets the number of values that fingerprints read of weights, step by step."""
    raw_bytes, through = samples.raw_bytes, samples.seen_through

    def counted(values: torch.Tensor) -> bytes:
        read.append(values.numel())
        return raw_bytes(values)

    def counted_through(holes: list[np.ndarray]) -> list[bytes]:
        read.extend(map(len, holes))
        return through(holes)

    monkeypatch.setattr(fingerprint, "raw_bytes", counted)
    monkeypatch.setattr(watch, "raw_bytes", counted)
    monkeypatch.setattr(watch, "seen_through", counted_through)
