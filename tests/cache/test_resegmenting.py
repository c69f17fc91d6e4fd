"""resegment=True: a conversation that comes back as text, which the tokenizer cuts otherwise than the model did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import plain_answer, saying, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM, TextStreamer

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, attach, detach
from hf_attnstore.session.segments import same_beginning

TOKENIZER: Any = tiny_tokenizer()
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
LETTERS = [TOKENIZER.encode(letter)[0] for letter in "theotherprince"] + [TOKENIZER.eos_token_id]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AttentionStore]:
    with AttentionStore(tmp_path / "store", block_size=16) as opened:
        yield opened


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model(TOKENIZER)


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    return tiny_model(TOKENIZER)


def talk(model: Any, cache: AttentionStoreCache | None, text: str, **kwargs: Any) -> list[int]:
    """What follows a text, which is tokenised as a whole, as servers and pipelines do."""
    prompt = torch.tensor([TOKENIZER.encode(text)])
    given = {"past_key_values": cache} if cache is not None else {}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **given, **{**GREEDY, **kwargs})
    assert output[0, : prompt.shape[1]].tolist() == prompt[0].tolist()
    return output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("session", ["alice", None])
def test_an_answer_that_comes_back_as_text_is_reused(
    session: str | None, model: LlamaForCausalLM, plain: LlamaForCausalLM, store: AttentionStore
) -> None:
    text, fed = "the letter and nothing", TOKENIZER.encode("the letter and nothing")
    new = TOKENIZER.encode(" and then")
    for turn in range(4):
        cache = AttentionStoreCache(model, session, store, resegment=True, tokenizer=TOKENIZER)
        said = talk(model, cache, text, **saying(LETTERS))
        assert said == LETTERS
        assert cache.stats.prompt_tokens == len(fed)
        assert cache.stats.reused_tokens == (len(fed) - len(new) - 1 if turn else 0)
        assert cache.stats.resegmented_tokens >= 5 or not turn
        text, fed = text + TOKENIZER.decode(said) + " and then", fed + said + new
        assert len(TOKENIZER.encode(text)) < len(fed)  # by itself, the text has other ids
    cache = AttentionStoreCache(model, session, store, resegment=True, tokenizer=TOKENIZER)
    assert talk(model, cache, text) == plain_answer(plain, fed, **GREEDY)
    assert cache.stats.prefilled_tokens == len(new) + 1
    without = AttentionStoreCache(model, session, store, save=False)
    assert talk(model, without, text) == plain_answer(plain, TOKENIZER.encode(text), **GREEDY)
    assert without.stats.prefilled_tokens > 30


def test_plain_generate_of_an_attached_model_does_so_too(
    model: LlamaForCausalLM, plain: LlamaForCausalLM, store: AttentionStore
) -> None:
    attach(model, store, resegment=True, tokenizer=TOKENIZER)
    try:
        first = TOKENIZER.encode("the letter")
        said = talk(model, None, "the letter", **saying(LETTERS))
        text = "the letter" + TOKENIZER.decode(said) + " and then"
        before = store.stats()["reused_tokens"]
        answer = talk(model, None, text, max_length=len(TOKENIZER.encode(text)) + 6, max_new_tokens=None)
    finally:
        detach(model)
    assert store.stats()["reused_tokens"] - before == len(first) + len(LETTERS) - 1
    assert answer == plain_answer(plain, first + said + TOKENIZER.encode(" and then"), **GREEDY)


def test_the_streamer_is_given_the_prompt_that_was_passed(model: LlamaForCausalLM, store: AttentionStore) -> None:
    talk(model, AttentionStoreCache(model, "alice", store), "the letter", **saying(LETTERS))
    streamed: list[str] = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            streamed.append(text)

    text = "the lettertheotherprince<|end|> and then"
    cache = AttentionStoreCache(model, "alice", store, resegment=True, tokenizer=TOKENIZER)
    said = talk(model, cache, text, streamer=Streamer(TOKENIZER))
    assert cache.stats.reused_tokens == len(LETTERS) + 1
    assert "".join(streamed) == text + TOKENIZER.decode(said)


def test_text_that_differs_is_left_alone(
    model: LlamaForCausalLM, plain: LlamaForCausalLM, store: AttentionStore
) -> None:
    talk(model, AttentionStoreCache(model, "alice", store), "the letter", **saying(LETTERS))
    cache = AttentionStoreCache(model, "alice", store, resegment=True, tokenizer=TOKENIZER)
    text = "the lettertheofficer"
    known = TOKENIZER.encode("the letter") + LETTERS
    ours, theirs = same_beginning(TOKENIZER, known, TOKENIZER.encode(text))
    expected = known[:ours] + TOKENIZER.encode(text)[theirs:]
    assert TOKENIZER.decode(expected) == text
    assert talk(model, cache, text) == plain_answer(plain, expected, **GREEDY)


def test_what_can_not_be_resegmented_says_so(model: LlamaForCausalLM, store: AttentionStore) -> None:
    with pytest.raises(CacheUseError, match="tokenizer=…"):
        AttentionStoreCache(model, "alice", store, resegment=True)
    with pytest.raises(CacheUseError, match="tokenizer=…"):
        attach(model, store, resegment=True)
    with pytest.raises(CacheUseError, match="one prompt"):
        AttentionStoreCache(model, ["alice", "bob"], store, resegment=True, tokenizer=TOKENIZER)
