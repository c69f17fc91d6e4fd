"""Pictures in every way to use a cache: ways to generate, loops of one's own, other conversations beside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.picture_models import FAMILIES, PICTURE, VIDEO, Picture, make_picture_model, prompt, text
from test_pictures import GREEDY, Chat, assert_same, features_encoded, lengths
from transformers import DynamicCache, GenerationMixin

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, ContextWindowError, attach

ENCODES_BEFORE = hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
SPATIAL = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
SOME = ("llava", "gemma3", "qwen2.5-vl", "qwen2-audio")


def begin(family: str, store: AttentionStore, session: str | None = "alice", seed: int = 1) -> Chat:
    chat = Chat(family, store, session)
    chat.say(text(21, seed), FAMILIES[family].picture(seed), text(9, seed + 1))
    return chat


def video(frames: int, seed: int) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[frames, 4, 4]])
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(16 * frames, 3 * 2 * 4 * 4, dtype=torch.float64, generator=generator)
    return {"pixel_values_videos": values, "video_grid_thw": grid}


VIDEOS: dict[str, list[int]] = {
    "qwen2-vl": [VIDEO] * 12,
    "qwen2.5-vl": [VIDEO] * 12,
    "qwen3-vl": ([VIDEO] * 4 + [5, 6]) * 2 + [VIDEO] * 4,  # frames have a time between them
}


@pytest.mark.parametrize("family", SPATIAL)
def test_positions_are_those_of_this_conversation_whatever_the_model_saw_last(
    family: str, store: AttentionStore
) -> None:
    """The model remembers how far the text of its last conversation is off; here every turn follows another one."""
    chats = [begin(family, store, name, seed) for name, seed in (("alice", 1), ("bob", 2))]
    words = Chat(family, store, "carol")
    words.say(text(30, 7))
    model = chats[0].model
    for chat in (*chats, words):
        chat.model, chat.cache = model, AttentionStoreCache(model, chat.session, store)
    for seed in (0, 3, 4):
        for chat in (*chats, words):
            known = chat.tokens if seed else 0
            chat.say(text(5, seed))
            chat.ask(reused=known)


@pytest.mark.parametrize("family", SPATIAL)
def test_words_outgrow_the_window_of_a_model_that_saw_a_picture(family: str, store: AttentionStore) -> None:
    saw = begin(family, store, "picture")
    saw.ask(reused=0)
    answers = []
    for name, model in (("alice", saw.model), ("bob", make_picture_model(family))):
        cache = AttentionStoreCache(model, name, store, window=60)
        ids = torch.tensor([text(40, 8)])
        for seed in (2, 3):
            out = model.generate(ids, past_key_values=cache, **GREEDY)
            ids = torch.cat([out.sequences, torch.tensor([text(12, seed)])], dim=1)
        assert cache.stats.dropped_tokens > 0
        answers.append(out)
        store.delete(name)  # with its blocks: the other model is to compute its own
        assert store.tokens("picture")
    assert_same(*answers)


@pytest.mark.parametrize("family", SPATIAL)
def test_a_video_is_reused_like_a_picture(family: str, store: AttentionStore) -> None:
    chat = Chat(family, store)
    picture = FAMILIES[family].picture(1)
    chat.say(text(11, 1), picture, text(4, 2), Picture(tuple(VIDEOS[family]), video(3, 5)), text(6, 3))
    chat.ask(reused=0)
    known = chat.tokens
    chat.restart()
    chat.say(text(5, 4), FAMILIES[family].picture(2), text(5, 5))
    chat.ask(reused=known)
    other = Chat(family, store, "bob")
    other.say(text(11, 1), picture, text(4, 2), Picture(tuple(VIDEOS[family]), video(3, 6)), text(6, 3))
    # the words between its frames are within it: it is reused as a whole or not at all
    other.ask(reused=lengths(other.parts)[2])


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_pictures_that_follow_each_other_without_words(family: str, store: AttentionStore) -> None:
    one, two, three = (FAMILIES[family].picture(seed) for seed in (1, 3, 5))
    for session, second in (("alice", two), ("bob", three)):
        chat = Chat(family, store, session)
        chat.say(text(10, 1), one, second, text(7, 2))
        # Gemma's see each other, so that the first is another one beside another second
        chat.ask(reused=0 if session == "alice" else 10 if family == "gemma3" else 10 + len(one.ids))


MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", SOME)
def test_ways_to_generate_with_a_known_and_a_new_picture(family: str, mode: str, store: AttentionStore) -> None:
    chat = begin(family, store)
    chat.ask(reused=0)
    known = chat.tokens
    chat.say(text(4, 5), FAMILIES[family].picture(3), text(6, 6))
    inputs = prompt(family, chat.parts)
    settings = {**GREEDY, **MODES[mode]}
    torch.manual_seed(0)
    ours = chat.model.generate(**inputs, past_key_values=chat.cache, **settings)
    torch.manual_seed(0)
    theirs = chat.other.generate(**inputs, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    # several rows have their pictures handed out by counting all of the prompt's, lookup feeds all of the prompt
    assert chat.cache.reused_tokens == (0 if mode == "prompt lookup" else 21)
    chat.parts.append(ours.sequences[0, inputs["input_ids"].shape[1] :].tolist())
    chat.restart()
    chat.say(text(5, 7))
    inputs = prompt(family, chat.parts)
    assert_same(
        chat.model.generate(**inputs, past_key_values=chat.cache, **GREEDY), chat.other.generate(**inputs, **GREEDY)
    )
    # `generate` gives the rows each other's sounds, and pictures where it does not encode them before
    mixed_up = "lookup" not in mode and (family == "qwen2-audio" or not ENCODES_BEFORE)
    assert chat.cache.reused_tokens == known if mixed_up else chat.cache.reused_tokens > known


@pytest.mark.parametrize("family", SOME)
def test_beams_reuse_where_every_picture_is_known(family: str, store: AttentionStore) -> None:
    chat = begin(family, store)
    chat.ask(reused=0)
    known = chat.tokens
    chat.say(text(4, 5))
    inputs = prompt(family, chat.parts)
    settings = {**GREEDY, "num_beams": 3}
    ours = chat.model.generate(**inputs, past_key_values=chat.cache, **settings)
    assert torch.equal(ours.sequences, chat.other.generate(**inputs, **settings).sequences)
    assert chat.cache.reused_tokens == known


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_generate_on_an_attached_model(family: str, store: AttentionStore) -> None:
    chat = begin(family, store)
    attach(chat.model, store)
    reused = 0
    for seed in (3, 5):
        inputs = prompt(family, chat.parts)
        ours = chat.model.generate(**inputs, **GREEDY)
        assert_same(ours, chat.other.generate(**inputs, **GREEDY))
        assert ours.past_key_values.reused_tokens == reused
        chat.parts.append(ours.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        reused = chat.tokens
        chat.say(text(4, seed), FAMILIES[family].picture(seed), text(3, seed))


def forward(model: Any, cache: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(past_key_values=cache, use_cache=True, **inputs).logits
    return logits


def fed(inputs: dict[str, Any], start: int) -> dict[str, Any]:
    return {"input_ids": inputs["input_ids"][:, start:]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_of_ones_own(family: str, store: AttentionStore) -> None:
    """Against a `DynamicCache` that was kept in memory and fed in the same forwards."""
    chat = begin(family, store)
    first = prompt(family, chat.parts)
    del first["attention_mask"]
    cache, plain = chat.cache, DynamicCache(config=chat.other.config)
    ours, theirs = forward(chat.model, cache, **first), forward(chat.other, plain, **first)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for number in (7, 8, 9):
        step = torch.tensor([[number]])
        ours, theirs = forward(chat.model, cache, input_ids=step), forward(chat.other, plain, input_ids=step)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    cache.save()
    # on with words alone
    more = torch.tensor([text(6, 5)])
    ours, theirs = forward(chat.model, cache, input_ids=more), forward(chat.other, plain, input_ids=more)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    cache.save()
    assert not cache.stats.recomputed
    # in another process, with a second picture
    chat.say([7, 8, 9], text(6, 5))
    known = lengths(chat.parts)[-1]
    chat.say(FAMILIES[family].picture(3), text(5, 6))
    chat.restart()
    inputs = prompt(family, chat.parts)
    del inputs["attention_mask"]
    ids = inputs.pop("input_ids")
    assert chat.cache.match(ids, **inputs) == known
    rest = chat.cache.remaining_inputs()
    with features_encoded(chat.model) as encoded:
        ours = forward(chat.model, chat.cache, input_ids=ids[:, known:], **rest)
    assert len(encoded) == 1
    theirs = forward(chat.other, DynamicCache(config=chat.other.config), input_ids=ids, **inputs)
    torch.testing.assert_close(ours, theirs[:, known:], rtol=1e-7, atol=1e-7)
    chat.cache.save()
    assert not chat.cache.stats.recomputed
    step = torch.tensor([[5]])
    chat.cache.match(torch.cat([ids, step], dim=1), **{n: grown(v, ids, n) for n, v in inputs.items()})
    assert chat.cache.reused_tokens == ids.shape[1]


def grown(value: torch.Tensor, ids: torch.Tensor, name: str) -> torch.Tensor:
    """Token types of a prompt with one more word."""
    return torch.cat([value, value.new_zeros(1, 1)], dim=1) if "token_type" in name else value


@pytest.mark.parametrize("family", SOME)
def test_a_loop_that_feeds_other_pictures_than_it_asked_for(
    family: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    chat = begin(family, store)
    inputs = prompt(family, chat.parts)
    ids = inputs.pop("input_ids")
    del inputs["attention_mask"]
    chat.cache.match(ids, **inputs)
    other = prompt(family, [text(21, 1), FAMILIES[family].picture(3), text(9, 2)])
    del other["attention_mask"]
    ours = forward(chat.model, chat.cache, **other)
    torch.testing.assert_close(ours, forward(chat.other, None, **other), rtol=0, atol=0)
    chat.cache.save()
    assert "not identified" in log.text
    assert store.stats()["saved_blocks"] == 0


def test_a_session_with_a_picture_is_resumed(store: AttentionStore) -> None:
    chat = begin("llava", store)
    chat.ask(reused=0)
    tokens = store.tokens("alice")
    assert [number < 2**31 for number in tokens] == [not 21 <= place < 37 for place in range(len(tokens))]
    chat.restart()
    ids = chat.cache.resume()
    assert ids[0].tolist() == chat.cache.token_ids == tokens
    rest = torch.tensor([[*chat.parts[-1][-1:], *text(5, 4)]])
    ours = forward(chat.model, chat.cache, input_ids=rest)
    chat.say(text(5, 4))
    theirs = forward(chat.other, None, **prompt("llava", chat.parts))
    torch.testing.assert_close(ours, theirs[:, len(tokens) :], rtol=1e-7, atol=1e-7)
    chat.cache.save()
    assert len(store.tokens("alice")) == len(tokens) + 6


def test_without_its_pictures_a_model_that_places_them_in_space_is_not_resumed_wrongly(store: AttentionStore) -> None:
    chat = begin("qwen2-vl", store)
    chat.ask(reused=0)
    chat.restart()
    chat.cache.resume()
    with pytest.raises(CacheUseError, match=r"match\(\)"):
        forward(chat.model, chat.cache, input_ids=torch.tensor([[5]]))


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_prompt_of_new_words_alone(family: str, store: AttentionStore) -> None:
    chat = begin(family, store)
    chat.ask(reused=0)
    known = chat.tokens
    new = torch.tensor([[*chat.parts[-1][-1:], *text(5, 4)]])
    mask = torch.ones(1, known + 6, dtype=torch.long)
    call = {"input_ids": new, "attention_mask": mask, "past_key_values": chat.cache}
    ours = chat.model.generate(**call, **GREEDY)
    chat.say(text(5, 4))
    theirs = chat.other.generate(**prompt(family, chat.parts), **GREEDY)
    assert torch.equal(ours.sequences[:, 6:], theirs.sequences[:, known + 6 :])
    assert chat.cache.reused_tokens == known
    with pytest.raises(CacheUseError, match="whole conversation"):
        chat.model.generate(**{**prompt(family, chat.parts[1:]), **call}, **GREEDY)


@pytest.mark.parametrize("family", SOME)
def test_a_conversation_with_pictures_that_outgrows_its_window(family: str, store: AttentionStore) -> None:
    chat = begin(family, store)
    cache = AttentionStoreCache(chat.model, "alice", store, window=30)
    with pytest.raises(ContextWindowError, match="pictures"):
        chat.model.generate(**prompt(family, chat.parts), past_key_values=cache, **GREEDY)
    chat.ask(reused=0)  # the session is free


@pytest.mark.parametrize("family", SOME)
def test_a_damaged_block_has_its_picture_computed_again(family: str, store: AttentionStore) -> None:
    chat = begin(family, store)
    chat.ask(reused=0)
    store.flush()
    name = chat.cache._held.chain.key(1).hex()  # which holds the picture's beginning
    (path,) = store.path.glob(f"blocks/*/*/{name}.*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    store.drop_memory()
    chat.restart()
    chat.say(text(4, 3))
    inputs = prompt(family, chat.parts)
    ours = chat.model.generate(**inputs, past_key_values=chat.cache, **GREEDY)
    assert_same(ours, chat.other.generate(**inputs, **GREEDY))
    assert "load failed" in chat.cache.stats.recomputed
    assert chat.cache.prefilled_tokens == inputs["input_ids"].shape[1] - chat.cache.reused_tokens
    assert chat.cache.reused_tokens <= 21


@pytest.mark.parametrize("family", SOME)
def test_going_back_into_a_picture_reuses_what_is_before_it(family: str, store: AttentionStore) -> None:
    chat = begin(family, store)
    parts = list(chat.parts)
    inputs = prompt(family, parts)
    cache = AttentionStoreCache(chat.model, "alice", store, save=False)
    chat.cache = cache
    chat.ask(reused=0)
    cache.crop(23 - cache.get_seq_length())
    chat.parts = parts
    chat.ask(reused=21)
    assert inputs["input_ids"][0, 22] == PICTURE


def test_a_copy_goes_on_by_itself(store: AttentionStore) -> None:
    chat = begin("qwen2-vl", store)
    chat.ask(reused=0)
    known = chat.tokens
    twin = copy.deepcopy(chat.cache)
    chat.say(text(5, 3))
    inputs = prompt("qwen2-vl", chat.parts)
    ours = chat.model.generate(**inputs, past_key_values=twin, **GREEDY)
    assert_same(ours, chat.other.generate(**inputs, **GREEDY))
    assert twin.reused_tokens == known
