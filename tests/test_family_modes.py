"""Every way to generate, on families of every kind of layer: what comes out is what comes out without the store."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import set_seed
from transformers.generation.streamers import BaseStreamer

from hf_attnstore import AttentionStore, AttentionStoreCache, attach, detach
from hf_attnstore.cache.model.argument import CACHE_NAMES
from hf_attnstore.lab.families.feeding import some_ids
from hf_attnstore.lab.families.tiny import build, families

FAMILIES = (
    "llama", "mistral", "gemma3_text", "gemma4_text", "gpt2", "bloom", "deepseek_v3", "glm_moe_dsa", "deepseek_v4",
    "llama4_text", "mamba2", "qwen3_next", "lfm2", "falcon_h1",
)  # fmt: skip
SAMPLE = ("llama", "gemma3_text", "qwen3_next")
"""Families that are tried with every mode by default; the others are slow tests."""


def _ours(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A decoding loop of a user's own, for `custom_generate`: greedy, ten tokens."""
    name = next(name for name in CACHE_NAMES if name in kwargs)
    cache = kwargs.pop(name, None)
    ids = input_ids
    for _ in range(6):
        inputs = model.prepare_inputs_for_generation(
            ids,
            **{name: cache},
            attention_mask=torch.ones_like(ids),
            use_cache=cache is not None,
            next_sequence_length=ids.shape[1] - cache.get_seq_length() if cache is not None else None,
        )
        logits = model(**inputs, return_dict=True).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "beams": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
    "assisted": {"assistant_model": "itself"},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "stop strings": {"stop_strings": ["q"], "tokenizer": "letters"},
    "repetition penalty": {"repetition_penalty": 1.7},
    "custom loop": {"custom_generate": _ours},
}


class Letters:
    """As much of a tokenizer as stop strings need: every id is a letter or a space."""

    name_or_path = "letters"

    def get_vocab(self) -> dict[str, int]:
        return {f"{chr(97 + number % 26)}{number}": number for number in range(128)}

    def __len__(self) -> int:
        return 128

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 97 for letter in text]}


def cases() -> list[Any]:
    return [
        pytest.param(family, mode, marks=() if family in SAMPLE or mode == "greedy" else pytest.mark.slow)
        for family in FAMILIES
        for mode in MODES
    ]


def _model(family: str) -> Any:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    return build(family)


def conversation(model: Any, store: AttentionStore) -> torch.Tensor:
    """A first turn in session alice, and a prompt for the next that repeats itself, so that lookup finds something."""
    cache = AttentionStoreCache(model, "alice", store)
    first = model.generate(some_ids(40, 1), past_key_values=cache, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return torch.cat([first, first[:, 20:27], some_ids(4, 2)], dim=1)


@pytest.mark.parametrize(("family", "mode"), cases())
def test_a_way_to_generate(family: str, mode: str, store: AttentionStore) -> None:
    model, untouched = _model(family), _model(family)
    ids = conversation(model, store)
    settings = {"max_new_tokens": 6, "do_sample": False, **MODES[mode]}
    if settings.get("tokenizer"):
        settings["tokenizer"] = Letters()
    ours_too = dict(settings)
    if settings.get("assistant_model"):
        settings["assistant_model"], ours_too["assistant_model"] = _model(family), _model(family)
    set_seed(3)
    try:
        theirs = untouched.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    except Exception as error:
        pytest.skip(f"transformers itself refuses: {error}")
    cache = AttentionStoreCache(model, "alice", store)
    set_seed(3)
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **ours_too)
    assert torch.equal(ours, theirs)
    assert cache.stats.prompt_tokens == ids.shape[1]
    assert cache.reused_tokens + cache.prefilled_tokens == ids.shape[1]
    if mode != "prefill in chunks":  # which older transformers begin at the beginning whatever the cache holds
        assert cache.reused_tokens == 45
        assert cache.stats.loaded_bytes + cache.stats.reused_tokens > 0


class Pieces(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamer_is_given_the_whole_prompt_and_every_token_once(family: str, store: AttentionStore) -> None:
    model = _model(family)
    ids = conversation(model, store)
    streamer = Pieces()
    cache = AttentionStoreCache(model, "alice", store)
    ours = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert cache.reused_tokens == 45
    assert streamer.ids == ours[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_with_sessions_of_their_own(family: str, store: AttentionStore) -> None:
    model, untouched = _model(family), _model(family)
    attach(model, store)
    prompts = {name: some_ids(30 + 3 * number, number) for number, name in enumerate(("a", "b", "c"))}
    found: dict[str, Any] = {}
    few: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

    def talk(name: str) -> None:
        try:
            ids = prompts[name]
            for _ in range(2):
                cache = AttentionStoreCache(model, name, store)
                ids = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **few)
            found[name] = ids, cache.reused_tokens
        except BaseException as error:
            found[name] = error

    threads = [threading.Thread(target=talk, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for name, ids in prompts.items():
        sequence, reused = found[name]
        for _ in range(2):
            ids = untouched.generate(ids, attention_mask=torch.ones_like(ids), **few)
        assert torch.equal(sequence, ids)
        assert reused == prompts[name].shape[1] + 3
    detach(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_as_a_first_turn(family: str, store: AttentionStore) -> None:
    model = _model(family)
    ids = some_ids(30, 4)
    embeds = model.get_input_embeddings()(ids).detach()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "inputs_embeds": embeds}
    try:
        theirs = _model(family).generate(**settings)
    except Exception as error:
        pytest.skip(f"transformers itself refuses: {error}")
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(model.generate(past_key_values=cache, **settings), theirs)
    again = AttentionStoreCache(model, "alice", store)
    ours = model.generate(ids, past_key_values=again, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, _model(family).generate(ids, max_new_tokens=5, do_sample=False))
    assert again.reused_tokens == 0  # ids were never seen: what embeddings mean is not known
