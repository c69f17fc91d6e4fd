"""`generate` keeps the contract of transformers' own: what it returns does not depend on what the store holds, and what
a cache object holds goes on, pictures included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.picture_models import FAMILIES as PICTURE_FAMILIES
from support.picture_models import PICTURE, VIDEO, make_picture_model, prompt, text
from support.tiny_models import tokens
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, GenerationConfig

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, attach
from hf_attnstore.lab.families.tiny import build

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [94, VIDEO, PICTURE]}
FULL: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
NAMES = {"output_hidden_states": "hidden_states", "output_attentions": "attentions"}
ASKED = tuple(NAMES)
BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
        return
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_equal(a, b)


def ids(count: int, seed: int = 1) -> torch.Tensor:
    """Ordinary ids `[1, count]`: the tiny models' end-of-text and padding are the lowest ones."""
    return tokens(count, seed).clamp_min(8)


@pytest.mark.parametrize("where", ["call", "given config", "model's generation config"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "mamba2"])
def test_who_asks_for_hidden_states_and_attentions_gets_those_of_all_tokens_every_time(
    family: str, where: str, store: AttentionStore
) -> None:
    model, other = build(family), build(family)
    asked = ASKED[:1] if family == "mamba2" else ASKED
    kwargs: dict[str, Any] = {**FULL, **dict.fromkeys(asked, True)}
    for one in (model, other):
        if family != "mamba2":
            one.set_attn_implementation("eager")
        if where == "model's generation config":
            one.generation_config.update(**dict.fromkeys(asked, True))
            kwargs = FULL
    if where == "given config":
        kwargs = {"generation_config": GenerationConfig(**kwargs)}
    prompt = ids(50)
    theirs = other.generate(prompt, **kwargs)
    attach(model, store)
    for _ in range(3):
        ours = model.generate(prompt, **kwargs)
        assert_equal([getattr(ours, NAMES[name]) for name in asked], [getattr(theirs, NAMES[name]) for name in asked])
        assert_equal(ours.logits, theirs.logits)
    assert store.stats()["saved_blocks"] > 0
    cache = AttentionStoreCache(model, "alice", store)
    model.generate(prompt, **kwargs, past_key_values=cache)
    assert (cache.reused_tokens, cache.prefilled_tokens) == (0, 50)
    assert cache.stats.missed == "hidden states asked for"


def test_who_can_not_see_hidden_states_has_his_prompt_reused(store: AttentionStore) -> None:
    model = build("llama")
    cache = AttentionStoreCache(model, "alice", store)
    for _ in range(2):
        model.generate(ids(50), **GREEDY, output_hidden_states=True, past_key_values=cache)
    assert cache.reused_tokens == 49


def test_rows_of_a_batch_have_hidden_states_of_all_columns(store: AttentionStore) -> None:
    model, other = build("llama"), build("llama")
    prompt = torch.cat([ids(40), ids(40, 2)])
    kwargs = {**FULL, "output_hidden_states": True, "attention_mask": torch.ones_like(prompt)}
    theirs = other.generate(prompt, **kwargs)
    for _ in range(2):
        model.generate(prompt, **FULL, past_key_values=AttentionStoreCache(model, ["a", "b"], store))
        ours = model.generate(prompt, **kwargs, past_key_values=AttentionStoreCache(model, ["a", "b"], store))
        assert_equal(ours.hidden_states, theirs.hidden_states)


def test_an_encoder_decoder_gives_hidden_states_of_all_tokens_every_time(store: AttentionStore) -> None:
    model, other = make_bart(), make_bart()
    inputs = {"input_ids": ids(30) % 90 + 5, "decoder_input_ids": ids(20, 2) % 90 + 5}
    kwargs = {**FULL, **dict.fromkeys(ASKED, True)}
    for one in (model, other):
        one.set_attn_implementation("eager")
    theirs = other.generate(**inputs, **kwargs)
    attach(model, store)
    names = ("encoder_hidden_states", "decoder_hidden_states", "decoder_attentions", "cross_attentions")
    for _ in range(2):
        ours = model.generate(**inputs, **kwargs)
        assert_equal([getattr(ours, name) for name in names], [getattr(theirs, name) for name in names])
        assert torch.equal(ours.sequences, theirs.sequences)


class OddBart(BartForConditionalGeneration):
    """Names none of the encoder's arguments in its forward."""

    def forward(self, decoder_input_ids: Any, **kwargs: Any) -> Any:
        return super().forward(decoder_input_ids=decoder_input_ids, **kwargs)


def make_bart(kind: type = BartForConditionalGeneration) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART.items()}
        config = BartConfig(vocab_size=101, d_model=32, max_position_embeddings=128, **sizes, eos_token_id=2)
        return kind(config).eval()


def test_a_model_whose_forward_does_not_name_what_its_encoder_gives_is_served_without_leaving_it_out(
    store: AttentionStore,
) -> None:
    model = make_bart(OddBart)
    inputs = {"input_ids": ids(30) % 90 + 5}
    theirs = make_bart(OddBart).generate(**inputs, **GREEDY)
    attach(model, store)
    for _ in range(3):
        assert torch.equal(model.generate(**inputs, **GREEDY), theirs)
    assert store.stats()["saved_blocks"] > 0


pictures = pytest.mark.parametrize("family", PICTURE_FAMILIES)


def with_picture(family: str) -> dict[str, Any]:
    return prompt(family, [text(21, 1), PICTURE_FAMILIES[family].picture(1), text(9, 2)])


def continued(sequence: torch.Tensor, *parts: list[int]) -> dict[str, Any]:
    """Ids alone: what there was, and more."""
    whole = torch.cat([sequence, *(torch.tensor([part]) for part in parts)], dim=1)
    return {"input_ids": whole, "attention_mask": torch.ones_like(whole)}


@pictures
@pytest.mark.parametrize("way", ["whole conversation", "new ids alone"])
def test_ids_alone_go_on_after_the_picture_that_a_cache_object_holds(
    family: str, way: str, store: AttentionStore
) -> None:
    model, other = make_picture_model(family), make_picture_model(family)
    cache, kept = AttentionStoreCache(model, "alice", store), DynamicCache(config=other.config)
    first = with_picture(family)
    ours = model.generate(**first, **FULL, past_key_values=cache).sequences
    theirs = other.generate(**first, **FULL, past_key_values=kept).sequences
    assert torch.equal(ours, theirs)
    length = first["input_ids"].shape[1]
    for seed in (3, 4):
        inputs = continued(ours, text(5, seed))
        known = ours.shape[1] - 1
        if way == "new ids alone":
            inputs["input_ids"] = inputs["input_ids"][:, known:]
        a = model.generate(**inputs, **FULL, past_key_values=cache)
        b = other.generate(**continued(theirs, text(5, seed)), **FULL, past_key_values=kept)
        for one, two in zip(a.logits, b.logits, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)
        begin = inputs["input_ids"].shape[1]
        ours = torch.cat([continued(ours, text(5, seed))["input_ids"], a.sequences[:, begin:]], dim=1)
        theirs = b.sequences
        assert torch.equal(ours, theirs)
        assert (cache.reused_tokens, cache.prefilled_tokens) == (known, 6)
    again = AttentionStoreCache(make_picture_model(family), "bob", store)
    again.model.generate(**first, **FULL, past_key_values=again)  # what was saved is of the picture
    assert again.reused_tokens == length - 1


@pictures
def test_a_loop_of_ones_own_goes_on_after_the_picture_that_its_cache_holds(family: str, store: AttentionStore) -> None:
    model = make_picture_model(family)
    cache = AttentionStoreCache(model, "alice", store)
    sequence = model.generate(**with_picture(family), **GREEDY, past_key_values=cache)
    whole = continued(sequence, text(5, 3))["input_ids"]
    assert cache.match(whole) == sequence.shape[1] - 1


@pictures
def test_places_without_pictures_are_an_error_where_the_text_before_them_is_another(
    family: str, store: AttentionStore
) -> None:
    model = make_picture_model(family)
    cache = AttentionStoreCache(model, "alice", store)
    first = with_picture(family)
    sequence = model.generate(**first, **GREEDY, past_key_values=cache)
    edited = continued(sequence, text(5, 3))
    edited["input_ids"][0, 3] += 1
    with pytest.raises(CacheUseError, match="pass these too"):
        model.generate(**edited, **GREEDY, past_key_values=cache)
    with pytest.raises(CacheUseError, match="pass these too"):
        cache.match(edited["input_ids"])
    edited = continued(sequence, text(5, 3))
    edited["input_ids"][0, -8] += 1  # after the picture: what comes before it is held
    theirs = make_picture_model(family).generate(
        **{**first, **edited, **types_of(family, first, edited["input_ids"])}, **GREEDY
    )
    assert torch.equal(model.generate(**edited, **GREEDY, past_key_values=cache), theirs)
    assert cache.reused_tokens == edited["input_ids"].shape[1] - 8
    words = continued(torch.tensor([text(30, 7)]))  # no picture in it: another conversation
    assert torch.equal(
        model.generate(**words, **GREEDY, past_key_values=cache), make_picture_model(family).generate(**words, **GREEDY)
    )


def types_of(family: str, first: dict[str, Any], whole: torch.Tensor) -> dict[str, Any]:
    name = PICTURE_FAMILIES[family].types
    return {name: torch.nn.functional.pad(first[name], (0, whole.shape[1] - first[name].shape[1]))} if name else {}


@pictures
def test_pictures_that_are_not_identified_are_gone_on_after_too(family: str, store: AttentionStore) -> None:
    model, other = make_picture_model(family), make_picture_model(family)
    cache, kept = AttentionStoreCache(model, "alice", store), DynamicCache(config=other.config)
    first = {name: torch.cat([value, value]) for name, value in with_picture(family).items()}  # a batch: not kept
    ours = model.generate(**first, **FULL, past_key_values=cache)
    theirs = other.generate(**first, **FULL, past_key_values=kept)
    assert torch.equal(ours.sequences, theirs.sequences)
    more = torch.tensor([text(5, 3)] * 2)
    whole = torch.cat([ours.sequences, more], dim=1)
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    a = model.generate(**inputs, **FULL, past_key_values=cache)
    b = other.generate(**inputs, **FULL, past_key_values=kept)
    assert_equal(a.logits, b.logits)
    assert (cache.reused_tokens, cache.prefilled_tokens) == (0, 6)
    inputs["input_ids"] = whole.clone()
    inputs["input_ids"][:, 3] += 1
    with pytest.raises(CacheUseError, match="pass all of its inputs"):
        model.generate(**inputs, **FULL, past_key_values=cache)
    assert store.stats()["saved_blocks"] == 0


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llama"])
def test_padding_among_ids_that_go_with_embeddings_is_masked_as_without_the_store(
    family: str, store: AttentionStore
) -> None:
    def make() -> Any:
        return build("llama") if family == "llama" else make_picture_model(family)

    model, other = make(), make()
    whole = torch.tensor([text(40, 1)])
    whole[0, :7] = 1
    with torch.no_grad():
        embeds = model.get_input_embeddings()(whole)
    inputs = {"input_ids": whole, "inputs_embeds": embeds, "pad_token_id": 1, "eos_token_id": -1}
    theirs = other.generate(**inputs, **FULL)
    attach(model, store)
    for _ in range(2):
        assert_equal(model.generate(**inputs, **FULL).logits, theirs.logits)
    assert store.stats()["saved_blocks"] == 0


def test_a_session_that_is_replaced_by_new_ids_alone_deserves_a_word(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = build("llama")
    whole = ids(120)
    model.generate(whole, **GREEDY, past_key_values=AttentionStoreCache(model, "alice", store))
    assert not log.records
    model.generate(ids(13, 2), **GREEDY, past_key_values=AttentionStoreCache(model, "alice", store))
    assert [record.args for record in log.records] == [("alice", 125, 18)]
    again = AttentionStoreCache(model, "bob", store)
    model.generate(whole, **GREEDY, past_key_values=again)
    assert again.reused_tokens == 119  # by its text


def test_a_press_that_replaces_keys_is_refused_with_what_to_do(store: AttentionStore) -> None:
    model = build("llama")
    cache = AttentionStoreCache(model, "alice", store)

    def press(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = cache.layers[0]
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]

    handle = model.model.layers[0].self_attn.register_forward_hook(press, with_kwargs=True)
    with pytest.raises(CacheUseError, match=r"detach\(model\)"):
        model.generate(ids(40), **GREEDY, past_key_values=cache)
    handle.remove()
    again = AttentionStoreCache(model, "alice", store)
    assert torch.equal(
        model.generate(ids(40), **GREEDY, past_key_values=again), build("llama").generate(ids(40), **GREEDY)
    )
