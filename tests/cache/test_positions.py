"""Moving keys to other positions, against rotations written independently of the package."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from support.tiny_models import make_llama, make_model, tokens
from support.turns import layer_hooks, turn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_attnstore.cache.inspection import describe
from hf_attnstore.cache.positions.geometry import Geometry, LayerGeometry, Rotation
from hf_attnstore.cache.probing.positions import probe

DIM = 16
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}


def scaled(kind: str, width: int) -> tuple[torch.Tensor, float]:
    """Frequencies `[pairs]` and attention factor of a scaling, as transformers makes them."""
    if kind == "default":
        return 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width), 1.0
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS[kind]}
    config = LlamaConfig(
        hidden_size=width, num_attention_heads=1, head_dim=width, max_position_embeddings=512, rope_parameters=rope
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.double(), float(factor)


def oracle(
    keys: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, offset: int, interleaved: bool
) -> torch.Tensor:
    """Keys `[heads, tokens, dim]` turned to their positions, by 2 × 2 matrices in float64."""
    out = keys.double().clone()
    pairs = len(frequencies)
    for token, position in enumerate(positions.tolist()):
        for pair, frequency in enumerate(frequencies.tolist()):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
            a, b = a + offset, b + offset
            c, s = math.cos(position * frequency), math.sin(position * frequency)
            x, y = keys[:, token, a].double(), keys[:, token, b].double()
            out[:, token, a], out[:, token, b] = c * x - s * y, s * x + c * y
    return out


def random_keys(count: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, count, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "offset"), [(DIM, 0), (8, 0), (8, 4), (8, DIM - 8)])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_turned_then_cut_equals_cut_then_turned(kind: str, interleaved: bool, width: int, offset: int) -> None:
    frequencies, factor = scaled(kind, width)
    keys = random_keys() * factor
    at = torch.arange(100, 124)
    stored = oracle(keys, at, frequencies, offset, interleaved).float()
    for dropped in (1, 37, 100):
        moved = stored[:, 5:].clone()
        Rotation(frequencies, offset, interleaved).rotate_(moved, -dropped)
        expected = oracle(keys[:, 5:], at[5:] - dropped, frequencies, offset, interleaved)
        torch.testing.assert_close(moved.double(), expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(moved.norm(dim=-1), stored[:, 5:].norm(dim=-1))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_after_100_truncations_the_error_is_that_of_one_rotation(interleaved: bool) -> None:
    frequencies, _ = scaled("default", DIM)
    rotation = Rotation(frequencies, 0, interleaved)
    keys = random_keys()
    at = torch.arange(4000, 4024)
    exact = oracle(keys, at, frequencies, 0, interleaved)
    stored = exact.float()
    steps = exact.to(torch.bfloat16)
    shift = 0
    for number in range(100):
        shift -= 17 + number % 5
        moved = stored.clone()
        rotation.rotate_(moved, shift)
        expected = oracle(keys, at + shift, frequencies, 0, interleaved)
        assert float((moved - expected).norm() / expected.norm()) <= 1e-5
        rotation.rotate_(steps, -(17 + number % 5))
    once = exact.to(torch.bfloat16)
    rotation.rotate_(once, shift)
    error_once, error_steps = (float((found - expected).norm() / expected.norm()) for found in (once, steps))
    assert error_once < 6e-3
    assert error_steps > 3 * error_once


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_strides_dtypes_and_modes(interleaved: bool, dtype: torch.dtype) -> None:
    frequencies, _ = scaled("default", 8)
    rotation = Rotation(frequencies, 4, interleaved)
    whole = torch.randn(2, 40, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    part = whole[:, 7:30]
    expected = oracle(part, torch.full((23,), -9), frequencies, 4, interleaved).to(dtype)
    around = whole.clone()
    rotation.rotate_(part, -9)
    torch.testing.assert_close(part, expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6)
    assert torch.equal(whole[:, :7], around[:, :7])
    assert torch.equal(whole[:, 30:], around[:, 30:])
    assert torch.equal(part[..., :4], around[:, 7:30, :4])
    with torch.inference_mode():
        made_there = around[:, 7:30].clone()
        rotation.rotate_(made_there, -9)
        rotation.rotate_(around[:, 7:30], -9)
    assert torch.equal(made_there, part)
    assert torch.equal(around, whole)
    before = whole.clone()
    rotation.rotate_(whole, 0)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize(("dim", "offset"), [(DIM, 3), (DIM + 1, 4), (DIM + 1, 5)])
def test_pairs_may_lie_at_odd_places(dim: int, offset: int, interleaved: bool, dtype: torch.dtype) -> None:
    frequencies, _ = scaled("default", 8)
    states = torch.randn(2, 9, dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = oracle(states, torch.full((9,), 31), frequencies, offset, interleaved).to(dtype)
    Rotation(frequencies, offset, interleaved).rotate_(states, 31)
    torch.testing.assert_close(states, expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6)


def test_a_geometry_survives_json_and_is_readable() -> None:
    frequencies, _ = scaled("default", 8)
    turns, none = LayerGeometry(Rotation(frequencies, 4, True), None), LayerGeometry(None, None)
    geometry = Geometry((turns, turns, none, turns))
    again = Geometry.from_json(json.loads(json.dumps(geometry.to_json())))
    assert again.describe() == geometry.describe()
    assert again.layers[0].keys is not None
    assert torch.equal(again.layers[0].keys.frequencies, frequencies)
    assert "layers 0–1, 3: keys RoPE, interleaved, channels 4–12" in geometry.describe()
    assert "layer 2: no positions" in geometry.describe()
    refused = Geometry.from_json(Geometry((), "it moves in mysterious ways").to_json())
    assert not refused.movable
    assert "mysterious" in refused.describe()


def test_gemma3_has_two_bases() -> None:
    geometry = probe(make_model("gemma3"))
    periods = [float(layer.keys.frequencies.min()) for layer in geometry.layers if layer.keys is not None]
    assert periods[0] == periods[2]
    assert periods[1] < periods[0] / 10


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "deepseek-v3", "gpt2"])
def test_probing_leaves_the_model_and_the_random_state_as_they_were(family: str) -> None:
    model, untouched = make_model(family), make_model(family)
    hooks, state = layer_hooks(model), torch.get_rng_state()
    versions = [p._version for p in model.parameters()]
    probe(model)
    assert layer_hooks(model) == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert [p._version for p in model.parameters()] == versions
    assert not model.training
    mine, theirs = dict(model.named_buffers()), dict(untouched.named_buffers())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    ours, plain = turn(model, tokens(30), None), turn(untouched, tokens(30), None)
    assert torch.equal(ours.sequences, plain.sequences)


def test_threads_may_probe_one_model_at_once() -> None:
    model = make_model()
    expected = probe(model).describe()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(probe(model).describe())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_a_model_in_training_or_that_fails_is_refused() -> None:
    assert "training" in probe(make_model().train()).refused
    model = make_model()

    def fails(*_: Any) -> None:
        raise RuntimeError("out of order")

    model.model.layers[1].register_forward_hook(fails)
    assert "out of order" in probe(model).refused


def test_a_model_that_does_not_go_by_its_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    rotary = model.model.rotary_emb
    forward = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: forward(x, position_ids**2 % 7))
    assert not probe(model).movable


@pytest.mark.parametrize("positions", [1, 2, 3, 7])
def test_a_model_with_too_few_positions_to_tell_is_refused(positions: int) -> None:
    assert "too few positions" in probe(make_llama(max_position_embeddings=positions)).refused


def test_few_positions_are_enough() -> None:
    geometry = probe(make_llama(max_position_embeddings=8))
    assert geometry.layers[0].keys is not None
    assert geometry.layers[0].keys.width == 12


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 0.0005), (torch.float16, 0.0005), (torch.bfloat16, 0.002)], ids=str
)
def test_weak_learned_positions_are_refused_in_words(dtype: torch.dtype, scale: float) -> None:
    model: Any = make_model("gpt2", dtype)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(scale)
    assert "learned positions" in probe(model).refused


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek-v3"])
@pytest.mark.parametrize("buffers", [False, True], ids=["weights", "weights and buffers"])
def test_offloaded_models_are_probed_like_others(family: str, buffers: bool) -> None:
    expected = probe(make_model(family)).describe()
    offloaded = cpu_offload(make_model(family), execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert probe(offloaded).describe() == expected


def test_the_description_of_a_model_says_what_happens_to_it() -> None:
    text = describe(make_model())
    assert "2 × full_attention" in text
    assert "512 tokens" in text
    assert "rotated to their new places" in text
    assert "channels 0–12" in text
    text = describe(make_model("gpt2"))
    assert "computed again" in text
    assert "learned positions" in text
