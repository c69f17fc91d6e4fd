"""The exact ids of a conversation, kept beside its messages."""

from __future__ import annotations

import json
import random

import pytest
from chat_fixtures import APPEND_ONLY, FORGETFUL, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from hf_attnstore.transcript import Prompt, Transcript, decode, encode


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


def test_template_that_drops_part_of_an_answer_is_tokenised_anew() -> None:
    tokenizer = tiny_tokenizer(FORGETFUL)
    transcript, _ = say(
        tokenizer, Transcript(), "the letter", (*spelled(tokenizer, "the other"), tokenizer.eos_token_id)
    )
    rendered = render(tokenizer, transcript, "and then")
    assert transcript.prompt(rendered, tokenizer).ids == encode(tokenizer, rendered)


def test_special_token_in_the_middle_of_an_answer_is_tokenised_anew(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    answer = (*spelled(tokenizer, "the"), user, *spelled(tokenizer, "other"))
    transcript, _ = say(tokenizer, Transcript(), "the letter", answer)
    assert transcript.messages[-1]["content"] == "theother"
    rendered = render(tokenizer, transcript, "more")
    assert transcript.prompt(rendered, tokenizer).ids == encode(tokenizer, rendered)


def test_prompt_always_stands_for_the_rendering_whatever_the_model_wrote() -> None:
    tokenizer = tiny_tokenizer(all_bytes=True)
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
    assert kept > 45  # half of 90: answers of broken characters keep their ids as well


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


def test_undo_after_the_template_rewrote_the_past_keeps_no_ids_of_it() -> None:
    tokenizer = tiny_tokenizer(FORGETFUL)
    first, _ = say(tokenizer, Transcript(), "the letter", spelled(tokenizer, "the other"))
    second, _ = say(tokenizer, first, "and then", spelled(tokenizer, "nothing"))
    undone, _ = second.undone()
    assert undone.messages == first.messages
    rendered = render(tokenizer, undone, "more")
    assert undone.prompt(rendered, tokenizer).ids == encode(tokenizer, rendered)


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
