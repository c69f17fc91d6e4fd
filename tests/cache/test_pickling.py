"""Pickling: an attached model comes back as a plain one; a cache says what to do instead."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, tokens
from support.turns import assert_reused, follow_up, layer_hooks, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, attach, detach


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [pickled, saved])
def test_an_attached_model_comes_back_as_a_plain_one(through: Any, store: AttentionStore, tmp_path: Path) -> None:
    model = make_model()
    attach(model, store)
    first = turn(model, tokens(50), None).sequences
    twin = through(model)
    prompt = follow_up(first, 6, 2)
    before = store.totals()["reused_tokens"]
    theirs = turn(twin, prompt, None)
    assert store.totals()["reused_tokens"] == before, "nothing is attached to it"
    cache = AttentionStoreCache(twin, "alice", store)
    assert torch.equal(turn(twin, prompt, cache).sequences, theirs.sequences)
    assert_reused(cache, prompt, 55)
    attached = make_model()
    attach(attached, store)
    count = [len(names["_forward_hooks"]) for names in layer_hooks(attached)]
    assert [len(names["_forward_hooks"]) for names in layer_hooks(twin)] == count, "one set of hooks"
    detach(twin)
    assert layer_hooks(twin) == layer_hooks(make_model())
    assert store.totals()["reused_tokens"] >= before


def test_a_model_that_was_pickled_while_attached_can_be_detached(store: AttentionStore) -> None:
    model = make_model()
    attach(model, store)
    twin = pickled(model)
    detach(twin)
    assert layer_hooks(twin) == layer_hooks(make_model())


def test_a_cache_says_what_to_do_instead(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    turn(model, tokens(50), cache)
    with pytest.raises(CacheUseError, match=r"AttentionStoreCache\(model, session=.*copy\.deepcopy"):
        pickle.dumps(cache)
    assert copy.deepcopy(cache).get_seq_length() == cache.get_seq_length() == 55
