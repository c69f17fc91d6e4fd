"""Which models go on from what is kept: those whose tokens see only what came before, whatever head they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from hf_attnstore import AttentionStore, AttentionStoreCache, attach
from hf_attnstore.cache.model.argument import as_forward_takes, as_generate_takes
from hf_attnstore.cache.probing.continuing import is_verified, looks_ahead, probe_continuing
from hf_attnstore.lab.families.feeding import some_ids
from hf_attnstore.lab.families.tiny import build, families, of_class

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
HISTORY, NEW = 40, 9


def made(family: str, **changes: Any) -> Any:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    return build(family, **changes)


def said(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """What a model says of the tokens that it is fed, whatever it is for."""
    with torch.no_grad():
        output = model(input_ids=ids, **({**as_forward_takes(model, cache), "use_cache": True} if cache else {}))
    for name in ("logits", "last_hidden_state"):
        if (found := getattr(output, name, None)) is not None:
            return found
    return torch.stack([output.start_logits, output.end_logits], dim=-1)


def loop(model: Any, ids: torch.Tensor, store: AttentionStore) -> tuple[torch.Tensor, AttentionStoreCache]:
    """A turn of one's own: what is said after the last of `ids`, of which what is known is not fed."""
    cache = AttentionStoreCache(model, "alice", store)
    done = cache.match(ids)
    output = said(model, ids[:, done:], cache)
    cache.save()
    return output, cache


def uncausal(family: str) -> Any:
    """transformers' own switch, on a model that was made as ever."""
    model = made(family)
    for part in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
        part.is_causal = False
    return model


def uncausal_modules() -> Any:
    """As people make encoders of decoders: each layer is told."""
    model = made("llama")
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    del model.config.is_causal
    model.config._attn_implementation = "sdpa"
    return model


SEEING_AHEAD: dict[str, Callable[[], Any]] = {
    "llama, is_causal": lambda: uncausal("llama"),
    "qwen3, is_causal": lambda: uncausal("qwen3"),
    "mistral, is_causal": lambda: uncausal("mistral"),
    "llama, by layers": uncausal_modules,
    "gemma": lambda: made("gemma", use_bidirectional_attention=True),
    "gemma3_text": lambda: made("gemma3_text", use_bidirectional_attention=True),
    "gemma4_text": lambda: made("gemma4_text", use_bidirectional_attention="all"),
    **{
        family: (lambda family=family: made(family, is_decoder=False))  # type: ignore[misc]
        for family in ("bert", "roberta", "electra", "rembert", "roformer", "megatron-bert", "big_bird")
    },
}
HEADS = {
    "Gemma3TextModel": lambda: of_class("gemma3_text", "Gemma3TextModel", use_bidirectional_attention=True),
    "BertModel": lambda: of_class("bert", "BertModel", is_decoder=False),
    "RobertaModel": lambda: of_class("roberta", "RobertaModel", is_decoder=False),
    "Qwen2ForSequenceClassification": lambda: told(of_class("qwen2", "Qwen2ForSequenceClassification")),
    "Qwen3ForSequenceClassification": lambda: told(of_class("qwen3", "Qwen3ForSequenceClassification")),
}


def told(model: Any) -> Any:
    model.config.is_causal = False
    return model


@pytest.mark.parametrize("which", SEEING_AHEAD)
def test_models_that_look_ahead_generate_as_without_a_store(which: str, store: AttentionStore) -> None:
    model, twin = SEEING_AHEAD[which](), SEEING_AHEAD[which]()
    later = torch.cat([some_ids(20, 1), some_ids(10, 3)], dim=1)
    assert not torch.allclose(said(twin, later, None)[:, :20], said(twin, later[:, :20], None), atol=1e-3)
    attach(model, store)
    ids = some_ids(30, 1)
    for _ in range(3):
        theirs = twin.generate(ids, output_logits=True, return_dict_in_generate=True, **GREEDY)
        ours = model.generate(ids, output_logits=True, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
        ids = torch.cat([theirs.sequences, some_ids(NEW, 2)], dim=1)
    store.flush()
    assert store.stats()["disk_blocks"] == 0


@pytest.mark.parametrize("which", HEADS)
def test_heads_that_look_ahead_are_given_all_of_the_text(which: str, store: AttentionStore) -> None:
    model, twin = HEADS[which](), HEADS[which]()
    ids = some_ids(HISTORY + NEW, 1)
    for count in (HISTORY, HISTORY + NEW):
        ours, cache = loop(model, ids[:, :count], store)
        assert torch.equal(ours, said(twin, ids[:, :count], None))
        assert cache.reused_tokens == 0
        assert cache.prefilled_tokens == count
        assert "no cache continues" in cache.stats.recomputed
    store.flush()
    assert store.stats()["disk_blocks"] == 0


def test_a_model_that_is_told_to_look_ahead_is_asked_anew(store: AttentionStore) -> None:
    model, ids = made("llama"), some_ids(30, 1)
    cache = AttentionStoreCache(model, "alice", store)
    ids = model.generate(ids, **as_generate_takes(model, cache), **GREEDY)
    assert torch.equal(ids, made("llama").generate(some_ids(30, 1), **GREEDY))
    model.config.is_causal = False
    for _ in range(2):
        theirs = uncausal("llama").generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, **as_generate_takes(model, cache), **GREEDY), theirs)
        assert cache.reused_tokens == 0
    del model.config.is_causal
    again = AttentionStoreCache(model, "alice", store)
    assert torch.equal(
        model.generate(ids, **as_generate_takes(model, again), **GREEDY), made("llama").generate(ids, **GREEDY)
    )
    assert again.reused_tokens == 35


def test_what_sees_ahead_in_long_texts_only_is_not_asked_with_short_ones(store: AttentionStore) -> None:
    def bird() -> Any:
        settings = {"block_size": 16, "num_random_blocks": 1, "max_position_embeddings": 512}
        return made("big_bird", attention_type="block_sparse", **settings)

    model, twin = bird(), bird()
    attach(model, store)
    assert "see those that come later" in looks_ahead(model)
    ids = some_ids(300, 1)
    long = ids.clone()
    long[:, 280:] = some_ids(20, 2)
    before = said(twin, ids, None)[:, :200]
    assert not torch.allclose(before, said(twin, long, None)[:, :200], atol=1e-3)
    assert torch.equal(said(model, ids, None)[:, :200], before)
    for _ in range(2):  # a step of one token makes it attend fully, for good
        assert torch.equal(model.generate(ids, **GREEDY), twin.generate(ids, **GREEDY))
        assert not looks_ahead(model)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaModel"),
        ("llama", "LlamaForSequenceClassification"),
        ("llama", "LlamaForQuestionAnswering"),
        ("llama", "LlamaForTokenClassification"),
        ("gemma3_text", "Gemma3TextModel"),
        ("gpt2", "GPT2ForSequenceClassification"),
        ("qwen3_next", "Qwen3NextModel"),
        ("qwen3_next", "Qwen3NextForQuestionAnswering"),
        ("mamba2", "Mamba2Model"),
        ("lfm2", "Lfm2Model"),
        ("falcon_h1", "FalconH1Model"),
        ("bert", "BertModel"),
    ],
)
def test_a_head_of_any_kind_is_continued_bit_for_bit(family: str, name: str, store: AttentionStore) -> None:
    if family not in families() or not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    model, twin = of_class(family, name), of_class(family, name)
    ids = some_ids(HISTORY + NEW, 1)
    loop(model, ids[:, :HISTORY], store)
    ours, cache = loop(model, ids, store)
    assert cache.reused_tokens == HISTORY
    assert cache.prefilled_tokens == NEW
    assert cache.stats.recomputed == ""
    kept = DynamicCache(config=twin.config)
    said(twin, ids[:, :HISTORY], kept)
    assert torch.equal(ours, said(twin, ids[:, HISTORY:], kept))
    whole = said(twin, ids, None)
    assert torch.allclose(ours[:, -1:], whole[:, -1:], atol=1e-3)


def test_a_model_that_can_not_be_asked_says_so(store: AttentionStore) -> None:
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, past_key_values: Any = None, cache: Any = None, **kwargs: Any) -> Any:
            if input_ids is not None and input_ids.shape[1] == 27:
                raise ValueError("not 27 tokens")
            return super().forward(input_ids=input_ids, **as_forward_takes(super(), past_key_values or cache), **kwargs)

    model = made("llama")
    model.__class__ = Odd
    found = probe_continuing(model, "past_key_values")
    assert found.how == ""
    assert "can't be asked" in found.problem
    assert "not 27 tokens" in found.problem


def test_only_what_was_tried_need_not_be_asked() -> None:
    model = made("llama")
    assert is_verified(model, 2)
    assert not is_verified(of_class("llama", "LlamaModel"), 2)
    assert not is_verified(uncausal("llama"), 2)
    assert not is_verified(uncausal_modules(), 2)
    assert is_verified(made("bert"), 2)
    for family in ("bert", "rembert", "roformer", "megatron-bert"):
        assert not is_verified(made(family, is_decoder=False), 2), family
    assert not is_verified(made("big_bird", attention_type="block_sparse"), 2)
