"""What the probe says of architectures, against a table written by hand."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from support.architectures import HALF, INTERLEAVED, TABLE, make_architecture
from transformers import DynamicCache

from hf_attnstore.cache.positions.geometry import Geometry
from hf_attnstore.cache.probing.positions import probe


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = make_architecture(name, dtype)
    if model is None:
        pytest.skip(f"this transformers has no {name}")
    return model


def verdict(geometry: Geometry) -> Any:
    """A geometry in the table's terms."""
    if geometry.refused:
        return geometry.refused
    found = []
    for layer in geometry.layers:
        turning = [(name, r) for name, r in (("keys", layer.keys), ("values", layer.values)) if r is not None]
        assert len(turning) <= 1
        found += [(n, INTERLEAVED if r.interleaved else HALF, r.offset, r.width) for n, r in turning] or [None]
    return found


def states_at(model: Any, token: int, position: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(
            input_ids=torch.tensor([[token]]),
            position_ids=torch.tensor([[position]]),
            past_key_values=cache,
            use_cache=True,
        )
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def test_the_table_has_enough() -> None:
    assert len(TABLE) >= 40


@pytest.mark.parametrize("name", TABLE)
def test_the_verdict_is_that_of_the_modelling_file(name: str) -> None:
    expected = TABLE[name][2]
    geometry = probe(build(name))
    if isinstance(expected, str):
        assert not geometry.movable
        assert expected in geometry.refused
    else:
        assert verdict(geometry) == expected


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if not isinstance(row[2], str)])
def test_states_at_positions_that_were_not_looked_at_are_predicted(name: str) -> None:
    model = build(name)
    geometry = probe(model)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        # one token again and again: attention averages equal values, so that only a key's position may tell
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.full((1, 60), 9), past_key_values=cache, use_cache=True)
        for layer, held in zip(geometry.layers, cache.layers, strict=True):
            assert layer.keys is None
            assert layer.values is None
            torch.testing.assert_close(held.keys, held.keys[:, :, 33:34].expand_as(held.keys))
            torch.testing.assert_close(held.values, held.values[:, :, 33:34].expand_as(held.values))
        return
    worst = 0.0
    for token in (9, 55):
        for here, there in ((6, 219), (88, 31), (201, 3)):
            before, after = states_at(model, token, here), states_at(model, token, there)
            for layer, kv, expected in zip(geometry.layers, before, after, strict=True):
                for rotation, states, wanted in zip((layer.keys, layer.values), kv, expected, strict=True):
                    if rotation is not None:
                        rotation.rotate_(states, there - here)
                    worst = max(worst, float((states - wanted).norm() / wanted.norm()))
    assert worst < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_half_precision_changes_no_verdict(name: str, dtype: torch.dtype) -> None:
    exact, rounded = probe(build(name)), probe(build(name, dtype))
    assert verdict(rounded) == verdict(exact)
    for a, b in zip(exact.layers, rounded.layers, strict=True):
        for one, other in ((a.keys, b.keys), (a.values, b.values)):
            if one is not None and other is not None:
                torch.testing.assert_close(other.frequencies, one.frequencies, rtol=2e-2, atol=1e-4)


def test_axes_of_text_shift_alike() -> None:
    text = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    special = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
        model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    assert verdict(probe(model)) == [("keys", HALF, 0, 16)] * 2
