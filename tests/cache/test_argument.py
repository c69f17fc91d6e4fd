"""The names under which transformers takes a cache: ours may be passed under each of them, in every version."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, tokens
from support.turns import GREEDY, assert_reused, follow_up, turn
from transformers import DynamicCache

from hf_attnstore import AttentionStore, AttentionStoreCache, TurnQueue, attach
from hf_attnstore.cache.hooks import attachment_of
from hf_attnstore.cache.model.argument import (
    CACHE_NAMES,
    as_forward_takes,
    as_generate_takes,
    cache_in,
    cache_name,
    take_cache,
)
from hf_attnstore.errors import TurnQueueError


@pytest.fixture(params=CACHE_NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_generate_takes_a_cache_under_every_name(name: str, store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    prompt = tokens(40)
    for known in (0, 45):
        cache = AttentionStoreCache(model, "alice", store)
        ours = model.generate(prompt, **{name: cache}, **GREEDY)
        assert torch.equal(ours, plain.generate(prompt, **GREEDY))
        assert_reused(cache, prompt, known)
        prompt = follow_up(ours, 5, 2)


def test_the_one_liner_takes_a_cache_under_every_name(name: str, store: AttentionStore) -> None:
    prompt = tokens(40)
    expected = make_model().generate(prompt, **GREEDY)
    for _ in range(2):  # a new model each time: nothing is attached when `generate` is looked up
        model = make_model()
        assert torch.equal(
            model.generate(prompt, **{name: AttentionStoreCache(model, "alice", store)}, **GREEDY), expected
        )
        store.flush()
    assert store.stats()["reused_tokens"] == 39


def test_a_loop_of_ones_own_takes_a_cache_under_every_name(name: str, store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    ids, kept = tokens(50), DynamicCache(config=model.config)
    with torch.no_grad():
        cache = AttentionStoreCache(model, "alice", store)
        assert torch.equal(
            model(ids[:, :40], **{name: cache}).logits, plain(ids[:, :40], **as_forward_takes(plain, kept)).logits
        )
        cache.save()
        cache = AttentionStoreCache(model, "alice", store)
        assert cache.match(ids) == 40
        ours = model(input_ids=ids[:, 40:], **{name: cache}).logits
        assert torch.equal(ours, plain(ids[:, 40:], **as_forward_takes(plain, kept)).logits)
        assert cache.get_seq_length() == 50
        cache.save()
    assert (cache.reused_tokens, cache.prefilled_tokens) == (40, 10)


def test_somebody_elses_cache_under_every_name_is_left_alone(name: str, store: AttentionStore) -> None:
    model = make_model()
    attach(model, store)
    cache = DynamicCache(config=model.config)
    ours = model.generate(tokens(40), **{name: cache}, **GREEDY)
    assert torch.equal(ours, make_model().generate(tokens(40), **GREEDY))
    assert cache.get_seq_length() == 45
    assert store.sessions() == []
    assert store.stats()["reused_tokens"] == 0


def test_nothing_of_ours_uses_a_name_that_warns(store: AttentionStore) -> None:
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        turn(model, tokens(40), AttentionStoreCache(model, "alice", store, window=64))
        attach(model, store)
        model.generate(tokens(40), **GREEDY)
        make_model().generate(tokens(40), **as_generate_takes(model, DynamicCache(config=model.config)), **GREEDY)


def test_a_queue_refuses_a_cache_under_every_name(name: str, store: AttentionStore) -> None:
    model = make_model()
    with TurnQueue(model, store) as queue, pytest.raises(TurnQueueError, match="leave it out"):
        queue.submit("alice", input_ids=tokens(8), **{name: DynamicCache(config=model.config)})


def test_names_are_found_and_taken() -> None:
    arguments: dict[str, Any] = {"past_key_values": None, "cache_params": "held", "use_cache": True}
    assert cache_in(arguments, str) == "held"
    assert cache_in(arguments, int) is None
    assert take_cache(arguments) == "held"
    assert arguments == {"use_cache": True}
    assert take_cache(arguments) is None
    assert cache_name(["input_ids", "cache", "past_key_values"]) == "cache"
    assert cache_name(["input_ids"]) is None


def test_the_name_is_that_of_the_models_forward(store: AttentionStore) -> None:
    model = make_model()
    attach(model, store)
    attachment = attachment_of(model)
    assert attachment is not None
    with torch.no_grad():
        assert model(tokens(8), **{attachment.cache_name: DynamicCache(config=model.config)}).logits.shape[1] == 8
