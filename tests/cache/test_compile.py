"""Compiled models: graphs may break at the cache, results may not."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.tiny_models import make_llama, make_model, tokens
from support.turns import assert_reused, follow_up, turn
from transformers import DynamicCache

from hf_attnstore import AttentionStore, AttentionStoreCache, attach, detach
from hf_attnstore.cache.identity.fingerprint import fingerprint_of


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    logging.getLogger("torch.__trace").setLevel(logging.ERROR)  # what pytest captures, the compiler writes
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):  # after which a function runs as it is: saves time
        yield
    torch._dynamo.reset()


def tiny() -> Any:
    """One layer: compiling takes long enough."""
    return make_llama(num_hidden_layers=1)


def in_place(model: Any, **settings: Any) -> Any:
    model.compile(**settings)
    return model


def forward(model: Any, **settings: Any) -> Any:
    model.forward = torch.compile(model.forward, **settings)
    return model


def layers(model: Any, **settings: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(**settings)
    return model


def wrapped_layers(model: Any, **settings: Any) -> Any:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, **settings)
    return model


WAYS: dict[str, Callable[..., Any]] = {
    "the model in place": in_place,
    "its forward": forward,
    "each layer": layers,
    "each layer wrapped": wrapped_layers,
}


SLOW = ("its forward", "each layer wrapped")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] if way in SLOW else []) for way in WAYS])
def test_a_compiled_model_goes_on_where_a_plain_one_would(way: str, store: AttentionStore) -> None:
    plain, model = tiny(), tiny()
    early = way == "each layer"  # hooks that come before the compiler, and after it
    if early:
        AttentionStoreCache(model, None, store)
    model = WAYS[way](model, backend="eager")
    sequence = tokens(40)
    for number, reused in enumerate((0, 41)):
        cache = AttentionStoreCache(model, "alice", store)
        prompt = sequence if number == 0 else follow_up(sequence, 6, 2)
        ours = turn(model, prompt, cache, max_new_tokens=2)
        theirs = turn(plain, prompt, AttentionStoreCache(plain, "bob", store, save=False), max_new_tokens=2)
        assert torch.equal(ours.sequences, theirs.sequences)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
        assert_reused(cache, prompt, reused)
        assert bool(cache.stats.loaded_bytes) == bool(reused)
        assert not cache.is_compileable  # or `generate` would compile by itself
        sequence = ours.sequences
    assert len(store.tokens("alice")) == 49


def test_a_number_that_is_changed_in_a_wrapped_layer_is_noticed() -> None:
    model = wrapped_layers(tiny(), backend="eager")
    fingerprint = fingerprint_of(model)
    before = fingerprint.current()
    reads = fingerprint.computing.reads
    assert (fingerprint.current(), fingerprint.computing.reads) == (before, reads)
    model.model.layers[0].self_attn.scaling *= 2
    assert fingerprint.current() != before


def test_the_wrapper_that_compile_returns_is_the_model(store: AttentionStore) -> None:
    plain, inner = tiny(), tiny()
    model: Any = torch.compile(inner, backend="eager")
    with torch.no_grad():
        model(input_ids=tokens(10), past_key_values=DynamicCache(config=inner.config))  # compiled before the hooks
        past = DynamicCache(config=plain.config)
        cache = AttentionStoreCache(model, "alice", store)
        assert cache.model is inner
        ours = model(input_ids=tokens(40), past_key_values=cache).logits
        torch.testing.assert_close(ours, plain(input_ids=tokens(40), past_key_values=past).logits)
        cache.save()
        cache = AttentionStoreCache(model, "alice", store)
        assert cache.match(follow_up(tokens(40), 5, 2)) == 40
        ours = model(input_ids=tokens(5, 2), past_key_values=cache).logits
        torch.testing.assert_close(ours, plain(input_ids=tokens(5, 2), past_key_values=past).logits)
    cache.save()
    prompt = follow_up(tokens(40), 10, 2)
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(plain, prompt, None).sequences)
    attach(model, store)
    assert torch.equal(turn(model, prompt, None).sequences, turn(plain, prompt, None).sequences)
    detach(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens(7)).logits, plain(input_ids=tokens(7)).logits)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("clang") is None, reason="needs a C compiler")
def test_layers_that_were_really_compiled(store: AttentionStore) -> None:
    plain, model = make_model(), layers(make_model(), backend="inductor")
    try:
        sequence = turn(model, tokens(40), AttentionStoreCache(model, "alice", store), max_new_tokens=2).sequences
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"this machine can't compile: {error}")
    prompt = follow_up(sequence, 6, 2)
    cache = AttentionStoreCache(model, "alice", store)
    ours, theirs = (turn(m, prompt, past, max_new_tokens=2) for m, past in ((model, cache), (plain, None)))
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-3, atol=1e-3)
    assert_reused(cache, prompt, 41)
