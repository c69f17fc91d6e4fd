"""The exact ids of a conversation, kept beside its messages."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat_fixtures import APPEND_ONLY, FORGETFUL, TEXT, TRIMMING, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_attnstore.chat.transcript import Prompt, Transcript, decode, encode
from hf_attnstore.session.segments import same_beginning, same_text


def render(tokenizer: PreTrainedTokenizerFast, transcript: Transcript, text: str) -> str:
    messages = [*transcript.messages, {"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def say(
    tokenizer: PreTrainedTokenizerFast, transcript: Transcript, text: str, answer: tuple[int, ...]
) -> tuple[Transcript, Prompt]:
    prompt = transcript.prompt(render(tokenizer, transcript, text), tokenizer)
    return transcript.answered(text, prompt, answer, tokenizer), prompt


def spelled(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """The ids of `text` one character at a time, which is not how the tokenizer would merge it."""
    return tuple(i for character in text for i in encode(tokenizer, character))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(APPEND_ONLY)


def test_first_prompt_is_the_template_tokenised(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Transcript().prompt(render(tokenizer, Transcript(), "the letter"), tokenizer)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the letter"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert list(prompt.ids) == expected


def test_answer_that_tokenises_otherwise_keeps_its_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = (*spelled(tokenizer, "the other"), tokenizer.eos_token_id)
    transcript, first = say(tokenizer, Transcript(), "the letter", answer)
    rendered = render(tokenizer, transcript, "and then")
    following = transcript.prompt(rendered, tokenizer)
    assert following.ids[: len(transcript.ids)] == first.ids + answer
    assert following.ids != encode(tokenizer, rendered)  # the case is real: tokenising anew gives other ids
    assert decode(tokenizer, following.ids) == rendered


def test_answer_cut_before_its_end_is_closed_by_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    transcript, _ = say(tokenizer, Transcript(), "the letter", spelled(tokenizer, "the other"))
    following = transcript.prompt(render(tokenizer, transcript, "more"), tokenizer)
    assert following.ids[: len(transcript.ids)] == transcript.ids
    assert following.ids[len(transcript.ids)] == tokenizer.eos_token_id


def test_template_that_drops_part_of_an_answer_keeps_the_ids_before() -> None:
    tokenizer = tiny_tokenizer(FORGETFUL)
    transcript, first = say(
        tokenizer, Transcript(), "the letter", (*spelled(tokenizer, "the other"), tokenizer.eos_token_id)
    )
    rendered = render(tokenizer, transcript, "and then")
    following = transcript.prompt(rendered, tokenizer)
    assert following.ids[: len(first.ids) + 4] == transcript.ids[: len(first.ids) + 4]  # "the ", letter by letter
    assert following.ids[len(first.ids) + 4] == tokenizer.eos_token_id
    assert following.ids != encode(tokenizer, rendered)
    assert decode(tokenizer, following.ids) == rendered


@pytest.mark.parametrize("template", [TRIMMING, FORGETFUL])
def test_a_rewritten_end_does_not_touch_answers_before_it(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    transcript = Transcript()
    for turn in range(4):
        answer = (*spelled(tokenizer, "the other officer  "), tokenizer.eos_token_id)
        before = transcript
        transcript, prompt = say(tokenizer, transcript, ("the letter", "and then", "more", "so")[turn], answer)
        kept = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before.ids, prompt.ids, strict=False))))
        assert turn == 0 or kept > len(before.ids) - len(answer)
        assert decode(tokenizer, prompt.ids) == prompt.text
    assert len(transcript.marks) == 4


def test_a_message_that_was_edited_keeps_the_ids_before_it(tokenizer: PreTrainedTokenizerFast) -> None:
    first, _ = say(tokenizer, Transcript(), "the letter", (*spelled(tokenizer, "the other"), tokenizer.eos_token_id))
    second, _ = say(tokenizer, first, "and then", spelled(tokenizer, "nothing"))
    edited = replace(second, messages=(*second.messages[:2], {"role": "user", "content": "and so"}))
    prompt = second.prompt(render(tokenizer, edited, "more"), tokenizer)
    assert prompt.ids[: len(first.ids)] == first.ids != encode(tokenizer, first.text)
    assert decode(tokenizer, prompt.ids) == prompt.text


def test_special_token_in_the_middle_of_an_answer_ends_what_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    answer = (*spelled(tokenizer, "the"), user, *spelled(tokenizer, "other"))
    transcript, first = say(tokenizer, Transcript(), "the letter", answer)
    assert transcript.messages[-1]["content"] == "theother"
    following = transcript.prompt(render(tokenizer, transcript, "more"), tokenizer)
    assert following.ids[: len(first.ids) + 3] == transcript.ids[: len(first.ids) + 3]
    assert following.ids[len(first.ids) + 3] != user
    assert decode(tokenizer, following.ids) == following.text


def test_text_that_is_spelled_like_a_special_token_is_not_that_token() -> None:
    tokenizer = tiny_tokenizer(all_bytes=True)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    pieces = spelled(tokenizer, "<") + spelled(tokenizer, "|end|>")
    assert decode(tokenizer, pieces) == decode(tokenizer, (end,))
    assert same_beginning(tokenizer, (7, *pieces), (7, end)) == (1, 1)
    assert same_beginning(tokenizer, (7, end, 8), (7, end, 9)) == (2, 2)


def test_answers_keep_their_ids_where_text_has_to_be_tokenised_as_a_whole() -> None:
    """SentencePiece writes a space before a text, so what is added can't be tokenised by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    bpe.train_from_iterator(TEXT * 4, trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    tokenizer.chat_template = "{%- for m in messages -%}{{ m['content'] + ',' }}{%- endfor -%}"
    letters: Any = tokenizer.convert_tokens_to_ids(["t", "h", "e", "▁", "o", "t", "h", "e", "r"])
    transcript, _ = say(tokenizer, Transcript(), "letter", tuple(letters))
    following = transcript.prompt(render(tokenizer, transcript, "prince"), tokenizer)
    assert following.ids[: len(transcript.ids)] == transcript.ids
    assert decode(tokenizer, following.ids) == decode(tokenizer, encode(tokenizer, following.text))
    assert following.ids != encode(tokenizer, following.text)


PIECES = st.lists(st.text("ab", max_size=3), max_size=8)


@given(PIECES, PIECES)
def test_same_text_is_the_longest_in_whole_tokens_of_both(a: list[str], b: list[str]) -> None:
    both = [(i, j) for i in range(len(a) + 1) for j in range(len(b) + 1) if "".join(a[:i]) == "".join(b[:j])]
    i, j = same_text(a, b)
    assert (i, j) in both
    assert len("".join(a[:i])) == max(len("".join(a[:n])) for n, _ in both)


@pytest.mark.parametrize(("template", "enough"), [(APPEND_ONLY, 45), (TRIMMING, 45), (FORGETFUL, 0)])
def test_prompt_always_stands_for_the_rendering_whatever_the_model_wrote(template: str, enough: int) -> None:
    tokenizer = tiny_tokenizer(template, all_bytes=True)
    rng = random.Random(1)
    kept = 0
    for _ in range(30):
        transcript = Transcript()
        for turn in range(3):
            answer = tuple(rng.randrange(len(tokenizer)) for _ in range(6))
            transcript, _ = say(tokenizer, transcript, f"turn {turn}: é and the letter", answer)
            rendered = render(tokenizer, transcript, "then")
            prompt = transcript.prompt(rendered, tokenizer)
            assert decode(tokenizer, prompt.ids) == rendered
            kept += prompt.ids[: len(transcript.ids)] == transcript.ids
    assert kept > enough or not enough  # half of 90: answers of broken characters keep their ids as well


def test_undo_gives_back_exactly_what_was_before(tokenizer: PreTrainedTokenizerFast) -> None:
    first, _ = say(tokenizer, Transcript().with_system("a prince"), "the letter", spelled(tokenizer, "the other"))
    second, _ = say(tokenizer, first, "and then", spelled(tokenizer, "nothing"))
    undone, text = second.undone()
    assert (undone, text) == (first, "and then")
    empty, text = undone.undone()
    assert (empty.messages, empty.ids, empty.text, text) == (
        ({"role": "system", "content": "a prince"},),
        (),
        "",
        "the letter",
    )
    with pytest.raises(ValueError, match="no turn"):
        empty.undone()


def test_undo_after_the_template_rewrote_the_past_keeps_the_ids_before_that() -> None:
    tokenizer = tiny_tokenizer(FORGETFUL)
    first, prompt = say(tokenizer, Transcript(), "the letter", spelled(tokenizer, "the other"))
    second, _ = say(tokenizer, first, "and then", spelled(tokenizer, "nothing"))
    undone, _ = second.undone()
    assert undone.messages == first.messages
    assert undone.ids == first.ids[: len(prompt.ids) + 4]
    following = undone.prompt(render(tokenizer, undone, "more"), tokenizer)
    assert following.ids[: len(undone.ids)] == undone.ids
    assert decode(tokenizer, following.ids) == following.text


def test_json_and_back(tokenizer: PreTrainedTokenizerFast) -> None:
    transcript, _ = say(tokenizer, Transcript().with_system("a prince"), "the letter", spelled(tokenizer, "the other"))
    assert Transcript.from_json(json.loads(json.dumps(transcript.to_json(tokenizer))), tokenizer) == transcript


@pytest.mark.parametrize(
    "other", [tiny_tokenizer(vocabulary=100), tiny_tokenizer(all_bytes=True)], ids=["smaller", "larger"]
)
def test_ids_of_another_tokenizer_are_left_behind(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    transcript, _ = say(
        tokenizer, Transcript(), "the letter and nothing", (len(tokenizer) - 1, *spelled(tokenizer, "the"))
    )
    loaded = Transcript.from_json(transcript.to_json(tokenizer), other)
    assert loaded.messages == transcript.messages
    assert (loaded.ids, loaded.text, loaded.marks) == ((), "", ())


def test_unknown_format_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="format 99"):
        Transcript.from_json({**Transcript().to_json(tokenizer), "format": 99}, tokenizer)


def test_system_message_is_set_replaced_and_left() -> None:
    one = Transcript(({"role": "user", "content": "a"},)).with_system("first")
    assert [m["content"] for m in one.messages] == ["first", "a"]
    assert [m["content"] for m in one.with_system("second").messages] == ["second", "a"]
    assert one.with_system(None) is one
