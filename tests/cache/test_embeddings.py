"""Embeddings given instead of ids: reused where their rows are the same, from the first on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import make_model, tokens
from support.turns import GREEDY
from torch import nn
from transformers import DynamicCache

from hf_attnstore import AttentionStore, AttentionStoreCache, attach

FAMILIES = ("llama-gqa", "gemma3")
CALL: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}


def embedded(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What no ids would be looked up as: a soft prompt."""
    embeds: torch.Tensor = model.get_input_embeddings()(ids) * 1.25
    return embeds.detach()


def ask(model: Any, cache: Any, embeds: torch.Tensor, reused: int | None, **settings: Any) -> Any:
    """A turn, compared with one from nothing."""
    inputs = {"inputs_embeds": embeds, **settings}
    ours = model.generate(**inputs, past_key_values=cache, **CALL)
    theirs = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **CALL)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if reused is not None:
        assert cache.reused_tokens == reused
        assert cache.prefilled_tokens == embeds.shape[1] - reused
    return ours


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("restarted", [False, True], ids=["same object", "restart"])
def test_rows_that_were_computed_are_reused(family: str, restarted: bool, store: AttentionStore) -> None:
    model = make_model(family)
    cache = AttentionStoreCache(model, "alice", store)
    ids = tokens(80)
    # the last group of a prompt takes in what does not fill one, and a prompt's last token is never reused
    for length, reused in ((40, 0), (57, 40), (75, 52), (75, 68)):
        ask(model, cache, embedded(model, ids[:, :length]), reused)
        if restarted:
            store.drop_memory()
            model = make_model(family)
            cache = AttentionStoreCache(model, "alice", store)
    assert not cache.stats.recomputed


@pytest.mark.parametrize("place", [0, 1, 15, 16, 21, 39])
def test_a_row_that_differs_ends_the_reuse_at_its_group(place: int, store: AttentionStore) -> None:
    model = make_model()
    embeds = embedded(model, tokens(40))
    ask(model, AttentionStoreCache(model, "alice", store), embeds, 0)
    other = embeds.clone()
    other[0, place, -1] += 1e-3
    ask(model, AttentionStoreCache(model, "bob", store), other, place // 4 * 4)


def test_what_is_generated_after_rows_goes_on_by_ids(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    answer = ask(model, cache, embedded(model, tokens(42)), 0).sequences
    known = store.tokens("alice")
    assert all(number >= 2**31 for number in known[:42])
    assert known[42:] == answer[0, :-1].tolist()
    new = torch.cat([answer[:, -1:], tokens(5, 2)], dim=1)
    fresh = AttentionStoreCache(model, "alice", store, save=False)
    assert fresh.resume().tolist() == [known]
    with torch.no_grad():
        ours = model(input_ids=new, past_key_values=fresh).logits
        embeds = torch.cat([embedded(model, tokens(42)), model.get_input_embeddings()(answer[:, :-1])], dim=1)
        plain = DynamicCache(config=model.config)
        model(inputs_embeds=embeds, past_key_values=plain)
        theirs = model(input_ids=new, past_key_values=plain).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    mask = torch.ones(1, len(known) + 6, dtype=torch.long)
    cache = AttentionStoreCache(model, "alice", store)
    cache.resume()
    out = model.generate(new, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert cache.reused_tokens == len(known)
    assert torch.equal(out[:, 6], ours[:, -1].argmax(-1))


def test_rows_beside_ids(store: AttentionStore) -> None:
    model = make_model()
    embeds = embedded(model, tokens(44))
    for session, ids, reused in (("a", tokens(44), 0), ("b", tokens(44), 40), ("c", tokens(44, 2), 0)):
        ask(model, AttentionStoreCache(model, session, store), embeds, reused, input_ids=ids)


def test_ids_are_never_taken_for_rows(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    model.generate(tokens(40), past_key_values=cache, **CALL)
    assert len(store.tokens("alice")) == 45
    ask(model, AttentionStoreCache(model, "alice", store), model.get_input_embeddings()(tokens(40)).detach(), 0)


def test_an_attached_model_reuses_rows(store: AttentionStore) -> None:
    model = make_model()
    embeds = embedded(model, tokens(40))
    attach(model, store)
    for reused in (0, 36):
        out = model.generate(inputs_embeds=embeds, **CALL)
        assert out.past_key_values.reused_tokens == reused


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_rows_in_several_copies(settings: dict[str, Any], store: AttentionStore) -> None:
    model, other = make_model(), make_model()
    for reused in (0, 36):
        cache = AttentionStoreCache(model, "alice", store)
        embeds = embedded(model, tokens(40))
        ours = model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=6, **settings)
        theirs = other.generate(inputs_embeds=embeds, max_new_tokens=6, **settings)
        assert torch.equal(ours, theirs)
        assert cache.reused_tokens == reused


def test_too_few_rows_are_not_kept(store: AttentionStore, log: pytest.LogCaptureFixture) -> None:
    model = make_model()
    ask(model, AttentionStoreCache(model, "alice", store), embedded(model, tokens(3)), 0)
    assert "fewer than 4" in log.text
    assert store.stats()["saved_blocks"] == 0


def test_a_loop_of_ones_own(store: AttentionStore) -> None:
    model = make_model()
    embeds = embedded(model, tokens(40))
    for reused in (0, 36):
        cache = AttentionStoreCache(model, "alice", store)
        assert cache.match(torch.zeros(1, 40, dtype=torch.long), inputs_embeds=embeds) == reused
        plain = DynamicCache(config=model.config)
        with torch.no_grad():
            ours = model(past_key_values=cache, inputs_embeds=cache.remaining_inputs()["inputs_embeds"]).logits
            theirs = model(past_key_values=plain, inputs_embeds=embeds).logits
        torch.testing.assert_close(ours, theirs[:, reused:], rtol=1e-4, atol=1e-4)
        cache.save()
        assert not cache.stats.recomputed
