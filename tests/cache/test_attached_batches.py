"""Plain `generate` of an attached model with batches and padding: served by content where it can be, never an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, tokens
from transformers import DynamicCache, GenerationConfig

from hf_attnstore import AttentionStore, attach, detach
from hf_attnstore.lab.families.tiny import build, families

PAD = 0
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}


@pytest.fixture(params=["llama", "gemma3_text", "lfm2"])
def model(request: pytest.FixtureRequest, store: AttentionStore) -> Iterator[Any]:
    if request.param not in families():
        pytest.skip(f"this transformers has no {request.param}")
    made = build(request.param)
    attach(made, store)
    yield made
    detach(made)


def _rows(lengths: tuple[int, ...], seed: int = 1, width: int = 0, side: str = "left") -> dict[str, torch.Tensor]:
    width = width or max(lengths)
    prompts = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(prompts)
    for number, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        prompts[number, place] = tokens(length, seed + number).clamp_min(8)[0]
        mask[number, place] = 1
    return {"input_ids": prompts, "attention_mask": mask}


def _plain(model: Any, **arguments: Any) -> Any:
    """What the model gives without us."""
    wrapper = model.__dict__.pop("generate")
    try:
        return model.generate(**arguments)
    finally:
        model.__dict__["generate"] = wrapper


def _check(model: Any, store: AttentionStore, **arguments: Any) -> tuple[int, int]:
    """One call, compared with plain generate. Returns the tokens reused, and those of the prompt."""
    before = store.stats()
    ours = model.generate(**arguments, **SETTINGS)
    store.flush()
    theirs = _plain(model, **arguments, **SETTINGS)
    assert torch.equal(ours, theirs)
    after = store.stats()
    return tuple(int(after[name] - before[name]) for name in ("reused_tokens", "prompt_tokens"))  # type: ignore[return-value]


def test_batches_and_padded_prompts_are_kept_by_content(
    model: Any, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    for inputs in (_rows((40, 33, 40)), _rows((36,), 7, width=48), _rows((40, 40), 11)):
        count = int(inputs["attention_mask"].sum())
        assert _check(model, store, **inputs) == (0, count)
        reused, prompt = _check(model, store, **inputs)
        assert prompt == count
        assert reused >= count - 8 * len(inputs["input_ids"])  # rows are fed the same columns
    assert "neither" not in log.text
    alone = tokens(40, 1).clamp_min(8)  # the first row of all, by itself
    assert _check(model, store, input_ids=alone)[0] == 39
    assert not store.verify().problems


def test_what_can_not_be_served_runs_as_without_and_is_said_once(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    attach(model, store)
    left, right = _rows((30, 20)), _rows((30, 20), side="right")
    one = {"input_ids": tokens(20, 3).clamp_min(8)}
    calls: dict[str, dict[str, Any]] = {
        "left alone (mask)": {**_rows((20,), width=24, side="right")},
        "left alone (batch)": right,
        "left alone (use_cache)": {**one, "use_cache": False},
        "left alone (cache_implementation)": {**one, "cache_implementation": "static"},
        "left alone (positions)": {**one, "position_ids": torch.arange(3, 23)[None]},
    }
    for kind, arguments in calls.items():
        for _ in range(2):
            assert _check(model, store, **arguments) == (0, arguments["input_ids"].numel())
        assert store.stats()[f"missed: {kind}"] == 2
    for _ in range(2):
        ours = model.generate(**one, past_key_values=DynamicCache(config=model.config), **SETTINGS)
        assert torch.equal(ours, _plain(model, **one, **SETTINGS))
    assert sum("neither reused nor kept" in line for line in log.messages) == len(calls) + 1
    assert _check(model, store, **left)[1] == 50  # and goes on serving what it can
    ids = tokens(20, 9).clamp_min(8).expand(2, -1).clone()
    ids[1, 4] = PAD  # no mask, and something that may be padding
    assert _check(model, store, input_ids=ids)[0] == 0
    detach(model)


@pytest.mark.parametrize("where", ["model", "call"])
def test_hybrid_which_generate_takes_for_the_default_is_kept(where: str, store: AttentionStore) -> None:
    model = make_model("gemma3")
    hybrid: dict[str, Any] = {}
    if where == "model":
        model.generation_config = GenerationConfig(cache_implementation="hybrid", pad_token_id=PAD)
    else:
        hybrid = {"generation_config": GenerationConfig(cache_implementation="hybrid", pad_token_id=PAD)}
    attach(model, store)
    prompt = tokens(40, 1).clamp_min(8)
    assert _check(model, store, input_ids=prompt, **hybrid) == (0, 40)
    assert _check(model, store, input_ids=prompt, **hybrid) == (39, 40)
    detach(model)
