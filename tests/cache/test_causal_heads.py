"""Rerankers, classifiers and embedders on causal models: `match`, then a plain forward of the rest."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.tiny_models import TINY, tokens
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.model.argument import cache_name

DOCUMENTS = [tokens(count, seed)[0].tolist() for count, seed in ((89, 11), (94, 12), (101, 13), (79, 14))]
QUERIES = [tokens(7, seed)[0].tolist() for seed in range(20, 24)]
SETTINGS = {**TINY, "pad_token_id": 0}
HEADS: list[Any] = [
    (LlamaForSequenceClassification, LlamaConfig(**SETTINGS)),
    (MistralForSequenceClassification, MistralConfig(**SETTINGS, sliding_window=128)),
    (Qwen3ForSequenceClassification, Qwen3Config(**SETTINGS, head_dim=12)),
]
BASES: list[Any] = [(LlamaModel, LlamaConfig(**SETTINGS)), (Qwen3Model, Qwen3Config(**SETTINGS, head_dim=12))]


def make(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return cls(config).eval()


def rest(model: Any, cache: Any, ids: list[int], done: int) -> Any:
    """A plain forward of what comes after the tokens that the cache holds."""
    name = cache_name(list(inspect.signature(model.forward).parameters)) or ""
    with torch.no_grad():
        return model(torch.tensor([ids[done:]]), **{name: cache})


@pytest.mark.parametrize(("cls", "config"), HEADS)
def test_a_reranker_reads_each_document_once_and_keeps_no_copies_of_it(
    cls: Any, config: Any, store: AttentionStore
) -> None:
    model, plain = make(cls, config), make(cls, config)
    for document in DOCUMENTS:
        for number, query in enumerate(QUERIES):
            ids = [*document, *query]
            cache = AttentionStoreCache(model, store=store)
            done = cache.match(torch.tensor([ids]), keep=len(document))
            ours = rest(model, cache, ids, done).logits
            cache.save()
            assert done == (len(document) if number else 0)
            kept = DynamicCache(config=config)
            plain = make(cls, config)
            if done:
                rest(plain, kept, document, 0)
            assert torch.allclose(ours, rest(plain, kept, ids, done).logits, rtol=0, atol=1e-6)
    store.flush()
    token = 2 * config.num_key_value_heads * config.head_dim * 4 * config.num_hidden_layers
    distinct = sum(map(len, DOCUMENTS)) * token
    assert store.stats()["memory_bytes"] == distinct


def test_what_comes_after_what_is_worth_keeping_serves_the_object_that_holds_it(store: AttentionStore) -> None:
    cls, config = HEADS[0]
    model, document = make(cls, config), DOCUMENTS[0]
    cache = AttentionStoreCache(model, session="one", store=store)
    for number, query in enumerate(QUERIES):
        ids = [*document, *query]
        done = cache.match(torch.tensor([ids]), keep=len(document))
        assert done == (len(document) if number else 0)
        ours = rest(model, cache, ids, done).logits
        cache.save()
        assert cache.get_seq_length() == len(ids)
        alone = rest(make(cls, config), DynamicCache(config=config), ids, 0).logits
        assert torch.allclose(ours, alone, atol=1e-5)
        assert store.tokens("one") == document
    # without it everything is kept again
    ids = [*document, *QUERIES[0]]
    rest(model, cache, ids, cache.match(torch.tensor([ids])))
    cache.save()
    assert store.tokens("one") == ids


@pytest.mark.parametrize(("cls", "config"), BASES)
def test_the_last_token_embeds_a_text_and_a_mean_over_what_comes_out_would_miss_what_was_reused(
    cls: Any, config: Any, store: AttentionStore
) -> None:
    model = make(cls, config)
    instruction = DOCUMENTS[0]
    for query in QUERIES:
        ids = [*instruction, *query]
        cache = AttentionStoreCache(model, store=store)
        done = cache.match(torch.tensor([ids]), keep=len(instruction))
        ours = rest(model, cache, ids, done).last_hidden_state
        cache.save()
        whole = rest(make(cls, config), DynamicCache(config=config), ids, 0).last_hidden_state
        assert torch.allclose(ours[:, -1], whole[:, -1], atol=1e-5)
        assert ours.shape[1] == len(ids) - done
    assert done == len(instruction)
    assert not torch.allclose(ours.mean(1), whole.mean(1), atol=1e-2)
