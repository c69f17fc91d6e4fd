"""What token ids do not identify is computed rightly, and neither reused nor stored; the log and the stats say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import make_llama, make_model, tokens
from support.turns import GREEDY, assert_reused, follow_up, turn
from torch import nn
from transformers import DynamicCache, StaticCache

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, GradientError, attach

FAMILIES = ("llama-gqa", "gemma3")


class Sees(nn.Module):
    """Adds what an image would add to the embeddings, whatever form it comes in."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.forward_of_model, self.model = model.forward, model

    def forward(self, *args: Any, picture: Any = None, **kwargs: Any) -> Any:
        if picture is None:
            return self.forward_of_model(*args, **kwargs)
        value = picture.get("pixels") if isinstance(picture, dict) else picture
        shift = float(torch.as_tensor(np.asarray(value, dtype=np.float32)).sum())
        embeds = self.model.get_input_embeddings()(kwargs.pop("input_ids")) + 0.01 * shift
        return self.forward_of_model(*args, inputs_embeds=embeds, **kwargs)


def left_padded(model: Any) -> dict[str, Any]:
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, :5] = 0
    return {"input_ids": tokens(40), "attention_mask": mask}


def hole(model: Any) -> dict[str, Any]:
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, 20:25] = 0
    return {"input_ids": tokens(40), "attention_mask": mask}


INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a batch of inputs_embeds": lambda model: {
        "inputs_embeds": model.get_input_embeddings()(torch.cat([tokens(40), tokens(40)])) * 1.1
    },
    "left padding": left_padded,
    "a hole in the mask": hole,
    "pad tokens without a mask": lambda model: {
        "input_ids": torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens(36)], dim=1),
        "pad_token_id": 0,
    },
    "positions of one's own": lambda model: {
        "input_ids": tokens(40),
        "attention_mask": torch.ones(1, 40, dtype=torch.long),
        "position_ids": torch.arange(40)[None] * 2,
    },
    "a batch": lambda model: {"input_ids": torch.cat([tokens(40), tokens(40, 2)])},
    "a batch of equal rows": lambda model: {"input_ids": torch.cat([tokens(40), tokens(40)])},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", INPUTS)
def test_such_inputs_give_the_right_output_and_touch_nothing_stored(
    what: str, family: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model, other = make_model(family), make_model(family)
    sequence = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences
    blocks = store.stats()["saved_blocks"]
    inputs = INPUTS[what](model)
    cache = AttentionStoreCache(model, "alice", store)
    ours = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(ours, other.generate(**inputs, **GREEDY))
    assert cache.reused_tokens == 0
    assert cache.prefilled_tokens == 40
    assert cache.stats.recomputed
    assert cache.stats.recomputed in log.text
    store.flush()
    assert store.stats()["saved_blocks"] == blocks
    assert store.tokens("alice") == sequence[0, :-1].tolist()
    # the same object goes on rightly with an ordinary prompt
    prompt = follow_up(sequence, 5, 2)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
    assert_reused(cache, prompt, 45)


PICTURES: dict[str, Callable[[float], Any]] = {
    "tensor": lambda value: torch.full((3, 2), value),
    "array": lambda value: np.full((3, 2), value),
    "list of numbers": lambda value: [value, value],
    "dict": lambda value: {"pixels": [value, value]},
    "tuple of tensors": lambda value: (torch.tensor(value), torch.tensor(value)),
}


@pytest.mark.parametrize("manual", [False, True], ids=["generate", "forward"])
@pytest.mark.parametrize("form", PICTURES)
def test_content_beside_the_ids_is_never_taken_for_other_content(
    form: str, manual: bool, store: AttentionStore
) -> None:
    model = make_model()
    model.forward = Sees(model).forward
    outputs = []
    for value in (1.0, 7.0):
        picture = PICTURES[form](value)
        cache = AttentionStoreCache(model, "alice", store)
        plain = DynamicCache(config=model.config)
        with torch.no_grad():
            if manual:
                assert cache.match(tokens(40)) == 0
                ours = model(input_ids=tokens(40), picture=picture, past_key_values=cache).logits
                theirs = model(input_ids=tokens(40), picture=picture, past_key_values=plain).logits
                cache.save()
            else:
                model._validate_model_kwargs = lambda _: None
                call = {"max_new_tokens": 4, "do_sample": False, "picture": picture}
                ours = model.generate(tokens(40), past_key_values=cache, **call)
                theirs = model.generate(tokens(40), past_key_values=plain, **call)
        assert torch.equal(ours, theirs)
        assert cache.reused_tokens == 0
        assert "picture" in cache.stats.recomputed
        outputs.append(ours)
    assert not torch.equal(*outputs)
    assert store.stats()["saved_blocks"] == 0


def test_token_types_that_are_all_zero_identify_nothing_else(store: AttentionStore) -> None:
    model = make_model()
    for zeros, reused in ((True, 0), (True, 39), (False, 0)):
        cache = AttentionStoreCache(model, "alice", store)
        types = torch.zeros(1, 40, dtype=torch.long) if zeros else torch.ones(1, 40, dtype=torch.long)
        with torch.no_grad():
            cache.begin_turn(tokens(40)[0].numpy(), limit=39)
            start = cache.get_seq_length()
            model(input_ids=tokens(40)[:, start:], token_type_ids=types[:, start:], past_key_values=cache)
        cache.save()
        assert cache.reused_tokens == (reused if zeros else 39)
        assert bool(cache.stats.recomputed) == (not zeros)


def test_what_follows_unidentified_tokens_in_a_manual_loop_is_not_stored_either(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    plain = DynamicCache(config=model.config)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        for past in (cache, plain):
            model(input_ids=tokens(20), attention_mask=mask, past_key_values=past)
        cache.save()
        for seed in (2, 3):
            ours = model(input_ids=tokens(40, seed), past_key_values=cache).logits
            theirs = model(input_ids=tokens(40, seed), past_key_values=plain).logits
            assert torch.equal(ours, theirs)
            cache.save()
    assert store.stats()["saved_blocks"] == 0
    fresh = AttentionStoreCache(model, "bob", store)
    assert torch.equal(turn(model, tokens(40, 2), fresh).sequences, turn(make_model(), tokens(40, 2), None).sequences)
    assert fresh.reused_tokens == 0


def test_tokens_before_the_unidentified_ones_of_a_manual_loop_are_kept(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    with torch.no_grad():
        model(input_ids=tokens(20), past_key_values=cache)
        model(inputs_embeds=model.get_input_embeddings()(tokens(20, 2)), past_key_values=cache)
        model(input_ids=tokens(20, 3), past_key_values=cache)
    assert store.flush() is None
    assert store.tokens("alice") == tokens(20)[0].tolist()
    assert cache.get_seq_length() == 60


def test_a_model_in_training_mode_stores_nothing(store: AttentionStore, log: pytest.LogCaptureFixture) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    sequence = turn(model, tokens(40), cache).sequences
    blocks = store.stats()["saved_blocks"]
    model.train()
    prompt = follow_up(sequence, 40, 2)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(model, prompt, None).sequences)
    assert_reused(cache, prompt, 0)
    assert "training mode" in cache.stats.recomputed
    assert "training mode" in log.text
    model.eval()
    assert store.stats()["saved_blocks"] == blocks
    assert store.tokens("alice") == sequence[0, :-1].tolist()
    turn(model, prompt, cache)
    assert_reused(cache, prompt, 45)


def test_a_manual_loop_goes_on_in_training_mode(store: AttentionStore) -> None:
    model = make_model()
    cache, plain = AttentionStoreCache(model, "alice", store), DynamicCache(config=model.config)
    for number, train in enumerate((False, True, True, False)):
        model.train(train)
        with torch.no_grad():
            ours = model(input_ids=tokens(20, number), past_key_values=cache).logits
            theirs = model(input_ids=tokens(20, number), past_key_values=plain).logits
        assert torch.equal(ours, theirs)
        cache.save()
    assert store.tokens("alice") == tokens(20, 0)[0].tolist()


def test_a_forward_with_gradients_is_a_clear_error_and_leaves_the_cache_usable(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    with pytest.raises(GradientError, match="no_grad"), torch.enable_grad():
        model(input_ids=tokens(20), past_key_values=cache)
    sequence = turn(model, tokens(20), cache).sequences
    with pytest.raises(GradientError), torch.enable_grad():
        model(input_ids=tokens(1), past_key_values=cache)
    prompt = follow_up(sequence, 3, 2)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(make_model(), prompt, None).sequences)
    assert_reused(cache, prompt, 25)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("then", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_inference_mode_and_no_grad_may_alternate(mode: Any, then: Any, store: AttentionStore) -> None:
    model, other = make_model("gemma3"), make_model("gemma3")
    cache = AttentionStoreCache(model, "alice", store)
    with mode():
        sequence = turn(model, tokens(40), cache).sequences
    with then():
        prompt = follow_up(sequence, 30, 2)
        ours = turn(model, prompt, cache).sequences
    assert torch.equal(ours, turn(other, prompt, None).sequences)
    assert_reused(cache, prompt, 45)
    with mode():
        assert torch.equal(turn(model, tokens(40), cache).sequences, sequence)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "short_factor": [1.0] * 6,
            "long_factor": [3.0] * 6,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_rope_that_changes_with_the_length_is_reused_only_below_the_change(
    rope: dict[str, Any], store: AttentionStore
) -> None:
    def make() -> Any:
        return make_llama(rope_parameters=dict(rope), max_position_embeddings=64)

    model = make()
    sequence, lengths = tokens(0), []
    for number, count in enumerate((40, 10, 20, 10)):
        prompt = follow_up(sequence, count, number)
        cache = AttentionStoreCache(model, "alice", store, drop=0)
        # transformers' own cache is wrong here once the frequencies change: compare with a fresh prefill
        ours = turn(model, prompt, cache, max_new_tokens=2).sequences
        assert torch.equal(ours, turn(make(), prompt, None, max_new_tokens=2).sequences)
        lengths.append(cache.reused_tokens)
        sequence = ours
    assert lengths == [0, 41, 0, 0]
    short = AttentionStoreCache(model, "bob", store)
    assert torch.equal(turn(model, sequence[:, :45], short).sequences, turn(make(), sequence[:, :45], None).sequences)
    assert short.reused_tokens == 44


def test_right_padded_batches_on_an_attached_model_pass_through_unchanged(store: AttentionStore) -> None:
    model, other = make_model(), make_model()
    attach(model, store)
    batch = torch.cat([tokens(30), tokens(30, 2)])
    mask = torch.ones_like(batch)
    mask[1, -6:] = 0
    ours = model.generate(batch, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(ours.sequences, other.generate(batch, attention_mask=mask, **GREEDY))
    assert type(ours.past_key_values) is DynamicCache
    assert store.stats()["saved_blocks"] == 0


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=64)])
def test_another_cache_class_passes_through_unchanged(make: Any, store: AttentionStore) -> None:
    model, other = make_model(), make_model()
    attach(model, store)
    cache = make(config=model.config)
    ours = model.generate(tokens(30), past_key_values=cache, disable_compile=True, **GREEDY)
    assert torch.equal(ours, other.generate(tokens(30), **GREEDY))
    assert cache.get_seq_length() == 35
    assert store.stats()["saved_blocks"] == 0


def test_the_cache_of_another_model_is_refused(store: AttentionStore) -> None:
    model, other = make_model(), make_model()
    cache = AttentionStoreCache(model, "alice", store)
    attach(other, store)
    with pytest.raises(CacheUseError, match="another model"):
        turn(other, tokens(20), cache)
    with pytest.raises(CacheUseError, match="another model"), torch.no_grad():
        other(input_ids=tokens(20), past_key_values=cache)


def test_a_part_of_the_model_can_not_fill_the_cache_unseen(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    with pytest.raises(CacheUseError, match="did not see"), torch.no_grad():
        model.model(input_ids=tokens(20), past_key_values=cache)
    assert turn(model, tokens(20), cache).sequences.shape[1] == 26
