"""ChatSession: what it feeds, what it keeps, and what is left after something went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import (
    APPEND_ONLY,
    FORGETFUL,
    NO_SYSTEM,
    TRIMMING,
    Says,
    plain_answer,
    saying,
    tiny_model,
    tiny_tokenizer,
)
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, set_seed

from hf_attnstore import AttentionStore, AttentionStoreError, ChatSession
from hf_attnstore.chat.session import ChatTemplateError, ContextWindowError
from hf_attnstore.chat.transcript import encode

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
WITH_TOOLS = APPEND_ONLY.replace(
    "'<|' + m['role'] + '|>'", "('<|user|>a tool gave ' if m['role'] == 'tool' else '<|' + m['role'] + '|>')"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(APPEND_ONLY)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def plain(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The same weights in a model that no store ever touches."""
    return tiny_model(tokenizer)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AttentionStore]:
    with AttentionStore(tmp_path / "store", block_size=16) as opened:
        yield opened


@pytest.fixture
def chat(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, store: AttentionStore) -> ChatSession:
    return ChatSession(model, tokenizer, store, "alice", **GREEDY)


def said(chat: ChatSession) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat.history]


class FailsAtOnce(LogitsProcessor):
    """Stands for whatever can go wrong before the first token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")


# what is fed and what comes out


def test_every_turn_prefills_only_what_is_new_and_answers_as_plain_generate(
    chat: ChatSession, plain: LlamaForCausalLM
) -> None:
    for i, text in enumerate(["the old prince looked at the letter", "and then", "what did the mother say", "so"]):
        before, prompt = chat.token_ids, chat.prompt_ids(text)
        answer = chat.send(text)
        turn = chat.stats
        assert turn is not None
        assert (turn.prompt_tokens, turn.generated_tokens) == (len(prompt), 12)
        assert turn.reused_tokens == (len(before) - 1 if i else 0)  # the last token was never fed
        assert turn.prefilled_tokens == len(prompt) - turn.reused_tokens
        expected = plain_answer(plain, prompt, **GREEDY)
        assert chat.token_ids == prompt + expected
        assert answer == chat.tokenizer.decode(expected, skip_special_tokens=True)
        assert said(chat)[-2:] == [("user", text), ("assistant", answer)]


def test_conversation_goes_on_in_a_store_opened_anew(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    histories, tokens = [], []
    for text in ("the letter", "and then", "nothing more"):
        with AttentionStore(tmp_path / "store", block_size=16) as store:
            chat = ChatSession(model, tokenizer, store, "alice", **GREEDY)
            if histories:
                assert (chat.history, chat.token_ids) == (histories[-1], tokens[-1])
            chat.send(text)
            assert chat.stats is not None
            assert chat.stats.reused_tokens == (len(tokens[-1]) - 1 if tokens else 0)
            assert (chat.stats.cache.loaded_bytes > 0) == bool(tokens)
            histories.append(chat.history)
            tokens.append(chat.token_ids)
    assert len(histories[-1]) == 6


def test_answer_that_tokenises_otherwise_is_reused_all_the_same(chat: ChatSession) -> None:
    letters = [encode(chat.tokenizer, letter)[0] for letter in "theotherprince"]
    chat.send("the letter", logits_processor=LogitsProcessorList([Says(letters)]), max_new_tokens=len(letters))
    ids = chat.token_ids
    assert chat.history[-1]["content"] == "theotherprince"
    assert len(encode(chat.tokenizer, chat.tokenizer.decode(ids))) < len(ids)  # by itself, this text has other ids
    chat.send("and then")
    assert chat.stats is not None
    assert chat.stats.reused_tokens == len(ids) - 1


def test_template_that_rewrites_the_past_gives_the_right_tokens(
    model: LlamaForCausalLM, plain: LlamaForCausalLM, store: AttentionStore
) -> None:
    tokenizer = tiny_tokenizer(FORGETFUL)
    chat = ChatSession(model, tokenizer, store, "alice", **GREEDY)
    chat.send("the old prince looked at the letter")
    first = chat.token_ids
    prompt = chat.prompt_ids("and then")
    shared = next(i for i, (a, b) in enumerate(zip(first, prompt, strict=False)) if a != b)
    assert shared < len(first)
    chat.send("and then")
    assert chat.stats is not None
    assert 0 < chat.stats.reused_tokens <= shared
    assert chat.stats.reused_tokens + chat.stats.prefilled_tokens == len(prompt)
    assert chat.token_ids == prompt + plain_answer(plain, prompt, **GREEDY)


@pytest.mark.parametrize("template", [TRIMMING, FORGETFUL])
def test_what_a_template_rewrites_costs_nothing_of_what_comes_before_it(
    model: LlamaForCausalLM, plain: LlamaForCausalLM, store: AttentionStore, template: str
) -> None:
    tokenizer = tiny_tokenizer(template)
    letters = [encode(tokenizer, letter)[0] for letter in "theotherprinceandtheother"]
    space = tokenizer.convert_tokens_to_ids("Ġ")
    for turn, text in enumerate(["the letter", "and then", "what did the mother say", "so"]):
        chat = ChatSession(model, tokenizer, store, "alice", **GREEDY)
        before, prompt = chat.token_ids, chat.prompt_ids(text)
        chat.send(text, **saying([*letters, space, tokenizer.eos_token_id]))
        assert chat.stats is not None
        assert chat.stats.prefilled_tokens == len(prompt) - chat.stats.reused_tokens
        assert turn == 0 or chat.stats.reused_tokens > len(before) - len(letters)
    assert chat.stats.reused_tokens > 60
    text = "and the other"
    prompt = chat.prompt_ids(text)
    chat.send(text)
    assert chat.stats.reused_tokens > 80
    assert chat.token_ids == prompt + plain_answer(plain, prompt, **GREEDY)


def test_retry_and_undo_after_a_rewritten_answer_keep_the_ids_before_it(
    model: LlamaForCausalLM, store: AttentionStore
) -> None:
    tokenizer = tiny_tokenizer(TRIMMING)
    letters = [encode(tokenizer, letter)[0] for letter in "theotherprince"]
    answer = [*letters, tokenizer.convert_tokens_to_ids("Ġ"), tokenizer.eos_token_id]
    chat = ChatSession(model, tokenizer, store, "alice", **GREEDY)
    chat.send("the letter", **saying(answer))
    chat.send("and then", **saying(answer))
    assert chat.stats is not None
    prompt = chat.stats.prompt_tokens
    chat.retry(**saying(answer))
    assert (chat.stats.prompt_tokens, chat.stats.prefilled_tokens) == (prompt, 1)
    chat.undo()
    chat.send("and so", **saying(answer))
    assert chat.stats.reused_tokens > chat.stats.prompt_tokens - 8


# marks that are special tokens


CALLS = "[TOOL_CALLS]"
CALLING = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'tool' -%}{{ '<|user|>[a tool gave] ' + m['content'] + '<|end|>' }}"
    "{%- else -%}{{ '<|' + m['role'] + '|>' + (m['content'] | trim) + '<|end|>' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
REFUSING = (
    "{%- for m in messages if 'TOOL' in m['content'] -%}{{ raise_exception('no marks') }}{%- endfor -%}" + CALLING
)


def calling_tokenizer(template: str) -> Any:
    tokenizer = tiny_tokenizer(template, vocabulary=158)
    tokenizer.add_tokens([CALLS], special_tokens=True)
    return tokenizer


def test_a_mark_that_is_a_special_token_is_there_in_the_next_prompt(store: AttentionStore) -> None:
    tokenizer = calling_tokenizer(CALLING)
    model, plain = tiny_model(tokenizer), tiny_model(tokenizer)
    mark = tokenizer.convert_tokens_to_ids(CALLS)
    call = [mark, *encode(tokenizer, "letter"), tokenizer.eos_token_id]
    pieces: list[str] = []
    chat = ChatSession(model, tokenizer, store, "alice", **GREEDY)
    answer = chat.send("the letter", stream=pieces.append, **saying(call))
    assert answer == "".join(pieces) == "letter"  # people see no marks
    expected = {"role": "assistant", "content": "letter", "written": f"{CALLS}letter"}
    assert chat.history[-1] == expected
    chat = ChatSession(model, tokenizer, store, "alice", **GREEDY)
    assert chat.history[-1] == expected
    before, prompt = chat.token_ids, chat.prompt_ids("nothing", "tool")
    assert prompt[: len(before)] == before
    assert before.count(mark) == 1
    chat.send("nothing", role="tool")
    assert chat.stats is not None
    assert chat.stats.reused_tokens == len(before) - 1
    assert chat.token_ids == prompt + plain_answer(plain, prompt, **GREEDY)
    chat.undo()
    assert chat.token_ids == before


def test_without_its_ids_a_conversation_still_has_its_marks(store: AttentionStore) -> None:
    """As after an edit of the system message: what the template is given makes the same ids again."""
    tokenizer = calling_tokenizer(CALLING)
    chat = ChatSession(tiny_model(tokenizer), tokenizer, store, "alice", **GREEDY)
    mark = tokenizer.convert_tokens_to_ids(CALLS)
    chat.send("the letter", **saying([mark, *encode(tokenizer, "letter"), tokenizer.eos_token_id]))
    other = ChatSession(chat.model, tokenizer, store, "alice", "a prince", **GREEDY)
    assert mark in other.prompt_ids("and then")
    assert tokenizer.decode(other.prompt_ids("and then")).count(CALLS) == 1


def test_a_template_that_refuses_marks_is_given_the_plain_answer(store: AttentionStore) -> None:
    tokenizer = calling_tokenizer(REFUSING)
    chat = ChatSession(tiny_model(tokenizer), tokenizer, store, "alice", **GREEDY)
    mark = tokenizer.convert_tokens_to_ids(CALLS)
    chat.send("the letter", **saying([mark, *encode(tokenizer, "letter"), tokenizer.eos_token_id]))
    assert chat.history[-1] == {"role": "assistant", "content": "letter"}
    assert mark not in chat.prompt_ids("and then")
    chat.send("and then")


def test_marks_of_a_model_are_nothing_to_another_one(store: AttentionStore) -> None:
    tokenizer = calling_tokenizer(CALLING)
    chat = ChatSession(tiny_model(tokenizer), tokenizer, store, "alice", **GREEDY)
    mark = tokenizer.convert_tokens_to_ids(CALLS)
    chat.send("the letter", **saying([mark, *encode(tokenizer, "letter"), tokenizer.eos_token_id]))
    other = tiny_tokenizer(all_bytes=True)
    again = ChatSession(tiny_model(other), other, store, "alice", **GREEDY)
    assert again.history[-1] == {"role": "assistant", "content": "letter"}
    assert CALLS not in other.decode(again.prompt_ids("and then"))


# generation configs


@pytest.mark.parametrize("where", ["the model's", "the call's", "the session's"])
@pytest.mark.parametrize("setting", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_may_be_set_in_a_generation_config(
    tokenizer: PreTrainedTokenizerFast,
    plain: LlamaForCausalLM,
    store: AttentionStore,
    where: str,
    setting: dict[str, int],
) -> None:
    model = tiny_model(tokenizer)
    assert model.generation_config is not None
    config = deepcopy(model.generation_config)
    config.update(**setting)
    given: dict[str, Any] = {} if where == "the model's" else {"generation_config": config}
    if where == "the model's":
        model.generation_config = config
    chat = ChatSession(model, tokenizer, store, "alice", **GREEDY, **(given if where == "the session's" else {}))
    chat.send("the letter", **(given if where == "the call's" else {}))
    prompt = chat.prompt_ids("and then")
    pieces: list[str] = []
    answer = chat.send("and then", stream=pieces.append, **(given if where == "the call's" else {}))
    assert pieces == [answer]
    assert chat.stats is not None
    assert chat.stats.reused_tokens > 0
    assert chat.token_ids == prompt + plain_answer(plain, prompt, num_beams=3, **GREEDY)


def test_of_several_samples_the_first_is_the_answer(tokenizer: PreTrainedTokenizerFast, store: AttentionStore) -> None:
    chat = ChatSession(tiny_model(tokenizer), tokenizer, store, "alice", max_new_tokens=30)
    assert chat.model.generation_config is not None
    chat.model.generation_config.update(do_sample=True, num_return_sequences=3)
    ends = list(range(5, 60))
    set_seed(3)
    for _ in range(4):
        answer = chat.send("the letter", eos_token_id=ends)
        ids = chat.token_ids[-chat.stats.generated_tokens :] if chat.stats is not None else []
        assert tokenizer.pad_token_id not in ids
        assert not set(ids[:-1]) & set(ends)
        assert answer == tokenizer.decode(ids)


def test_strings_to_stop_at_may_be_set_in_a_generation_config(
    tokenizer: PreTrainedTokenizerFast, store: AttentionStore
) -> None:
    chat = ChatSession(tiny_model(tokenizer), tokenizer, store, "alice", **GREEDY)
    assert chat.model.generation_config is not None
    chat.model.generation_config.stop_strings = ["officer"]
    chat.send("the letter", **saying(list(encode(tokenizer, "the officer and the prince"))))
    assert chat.history[-1]["content"] == "the officer"
    chat.send("so", **saying(list(encode(tokenizer, "the officer and the prince"))))
    assert chat.stats is not None
    assert chat.stats.reused_tokens > 0


def test_beam_search_answers_as_plain_generate(chat: ChatSession, plain: LlamaForCausalLM) -> None:
    chat.send("the letter")
    prompt = chat.prompt_ids("and then")
    pieces: list[str] = []
    answer = chat.send("and then", stream=pieces.append, num_beams=3)
    assert chat.stats is not None
    assert chat.stats.reused_tokens > 0
    assert chat.stats.ttft_seconds is None
    assert pieces == [answer]
    assert chat.token_ids == prompt + plain_answer(plain, prompt, num_beams=3, **GREEDY)


# streaming and numbers


def test_streamed_pieces_are_the_answer(chat: ChatSession) -> None:
    pieces: list[str] = []
    answer = chat.send("the old prince", stream=pieces.append, max_new_tokens=60)
    assert "".join(pieces) == answer
    assert len(pieces) > 1


def test_stream_true_writes_the_answer_to_standard_output(
    chat: ChatSession, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = chat.send("the old prince", stream=True)
    assert capsys.readouterr().out == answer + "\n"


def test_stats_say_how_long_and_why_it_ended(chat: ChatSession) -> None:
    assert chat.stats is None
    chat.send("the old prince")
    turn = chat.stats
    assert turn is not None
    assert turn.ttft_seconds is not None
    assert turn.tokens_per_second is not None
    assert 0 < turn.ttft_seconds < turn.seconds
    assert turn.tokens_per_second == pytest.approx(11 / (turn.seconds - turn.ttft_seconds))
    assert turn.finish == "length"
    any_token = list(range(5, len(chat.tokenizer)))
    chat.send("and then", eos_token_id=any_token)
    assert chat.stats is not None
    assert (chat.stats.generated_tokens, chat.stats.finish) == (1, "stopped")
    chat.send("and then", logits_processor=LogitsProcessorList([Says([chat.tokenizer.eos_token_id])]))
    assert (chat.stats.generated_tokens, chat.stats.finish) == (1, "eos")
    assert chat.history[-1] == {"role": "assistant", "content": ""}


# interruptions


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_interrupted_answer_is_kept_as_far_as_it_came(
    chat: ChatSession, plain: LlamaForCausalLM, interruption: type[BaseException]
) -> None:
    chat.send("the letter")
    prompt = chat.prompt_ids("and then")
    pieces: list[str] = []

    def stop_after_two(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise interruption

    with pytest.raises(interruption):
        chat.send("and then", stream=stop_after_two, max_new_tokens=60)
    assert chat.stats is not None
    assert chat.stats.finish == "interrupted"
    produced = chat.token_ids[len(prompt) :]
    assert 0 < len(produced) < 60
    assert produced == plain_answer(plain, prompt, max_new_tokens=60, do_sample=False)[: len(produced)]
    assert said(chat)[-2:] == [("user", "and then"), ("assistant", chat.tokenizer.decode(produced))]

    following = chat.prompt_ids("so")
    assert following[: len(prompt) + len(produced)] == prompt + produced
    chat.send("so")
    assert chat.stats.reused_tokens >= len(prompt)
    assert chat.token_ids == following + plain_answer(plain, following, **GREEDY)


def test_message_without_any_answer_is_dropped(chat: ChatSession, store: AttentionStore) -> None:
    chat.send("the letter")
    history, ids, turn = chat.history, chat.token_ids, chat.stats
    with pytest.raises(RuntimeError, match="out of memory"):
        chat.send("and then", logits_processor=LogitsProcessorList([FailsAtOnce()]))
    assert (chat.history, chat.token_ids, chat.stats) == (history, ids, turn)
    assert ChatSession(chat.model, chat.tokenizer, store, "alice").history == history
    chat.send("and then")
    assert chat.stats is not None
    assert chat.stats.reused_tokens >= len(ids) - 1


def test_retry_that_fails_leaves_the_old_answer(chat: ChatSession) -> None:
    chat.send("the letter")
    history = chat.history
    with pytest.raises(RuntimeError, match="out of memory"):
        chat.retry(logits_processor=LogitsProcessorList([FailsAtOnce()]))
    assert chat.history == history


# the context window


def test_answer_is_cut_where_the_context_window_ends(tokenizer: PreTrainedTokenizerFast, store: AttentionStore) -> None:
    chat = ChatSession(tiny_model(tokenizer, window=64), tokenizer, store, "alice", max_new_tokens=500)
    chat.send("the old prince looked at the letter")
    assert chat.stats is not None
    assert (len(chat.token_ids), chat.stats.finish) == (64, "window")


def test_conversation_too_long_for_the_window_is_an_error_that_harms_nothing(
    tokenizer: PreTrainedTokenizerFast, store: AttentionStore
) -> None:
    model = tiny_model(tokenizer, window=64)
    chat = ChatSession(model, tokenizer, store, "alice", **GREEDY)
    chat.send("the letter")
    history, ids = chat.history, chat.token_ids
    long = "nothing " * 60
    count = len(chat.prompt_ids(long))
    with pytest.raises(ContextWindowError, match=f"'alice'.* {count} tokens.* window of 64"):
        chat.send(long)
    assert (chat.history, chat.token_ids) == (history, ids)
    chat.send("and then")
    assert chat.stats is not None
    assert chat.stats.reused_tokens == len(ids) - 1


def test_a_chat_outlives_its_window(tokenizer: PreTrainedTokenizerFast, store: AttentionStore) -> None:
    model = tiny_model(tokenizer, window=96)
    chat = ChatSession(model, tokenizer, store, "alice", system="the prince", keep_first="system", **GREEDY)
    first = chat.prompt_ids("")
    dropped = 0
    for number in range(14):
        if number % 4 == 3:
            chat = ChatSession(model, tokenizer, store, "alice", keep_first="system", **GREEDY)
        known = len(chat.token_ids)
        chat.send("the letter and then")
        assert chat.stats is not None
        cache = chat.stats.cache
        assert chat.stats.prompt_tokens == cache.reused_tokens + cache.prefilled_tokens + cache.dropped_tokens
        assert chat.stats.finish == "length"
        if number:
            assert cache.prefilled_tokens == chat.stats.prompt_tokens - known + 1  # the last token was never fed
        assert cache.dropped_tokens >= dropped
        dropped = cache.dropped_tokens
    assert len(chat.history) == 29
    assert dropped > 96
    assert chat.token_ids[: len(first) // 2] == first[: len(first) // 2]
    held = store.tokens("alice")
    assert len(held) < 96
    system = tokenizer.apply_chat_template([{"role": "system", "content": "the prince"}], tokenize=False)
    ids = tokenizer.encode(system, add_special_tokens=False)
    assert held[: len(ids)] == ids
    answer = chat.history[-1]["content"]
    assert chat.retry() == answer
    assert chat.stats is not None
    assert chat.stats.prefilled_tokens == 1


@pytest.mark.parametrize("system", ["the prince", None])
def test_a_chat_keeps_its_beginning_without_being_told(
    system: str | None, tokenizer: PreTrainedTokenizerFast, store: AttentionStore
) -> None:
    chat = ChatSession(tiny_model(tokenizer, window=96), tokenizer, store, "alice", system=system, **GREEDY)
    for _ in range(6):
        chat.send("the letter and then")
    assert chat.stats is not None
    assert chat.stats.cache.dropped_tokens > 0
    shown = [{"role": "system", "content": system}]
    count = 1  # the role of the first message
    if system:
        text = tokenizer.apply_chat_template(shown, tokenize=False)
        count = len(tokenizer.encode(text, add_special_tokens=False))
    assert store.tokens("alice")[:count] == chat.token_ids[:count]


def test_with_drop_0_a_chat_ends_at_its_window(tokenizer: PreTrainedTokenizerFast, store: AttentionStore) -> None:
    chat = ChatSession(tiny_model(tokenizer, window=64), tokenizer, store, "alice", drop=0, **GREEDY)
    while len(chat.prompt_ids("the letter and then")) < 64:
        chat.send("the letter and then")
    with pytest.raises(ContextWindowError, match="undo"):
        chat.send("the letter and then")
    assert 40 < len(chat.token_ids) <= 64
    assert len(store.tokens("alice")) == len(chat.token_ids) - 1


def test_max_length_is_an_answer_length_too(chat: ChatSession) -> None:
    chat.generate_defaults = {"max_length": 40, "do_sample": False}
    chat.send("the letter")
    assert len(chat.token_ids) == 40


# undo, retry, system


def test_undo_takes_the_turn_back_in_the_store_as_well(chat: ChatSession, store: AttentionStore) -> None:
    first = chat.send("the letter")
    ids = chat.token_ids
    second = chat.send("and then")
    assert chat.undo() == "and then"
    assert (chat.token_ids, said(chat)) == (ids, [("user", "the letter"), ("assistant", first)])
    again = ChatSession(chat.model, chat.tokenizer, store, "alice", **GREEDY)
    assert again.history == chat.history
    assert again.send("and then") == second
    assert again.stats is not None
    assert again.stats.reused_tokens >= len(ids) - 1


def test_retry_answers_the_same_message_again(chat: ChatSession) -> None:
    answer = chat.send("the letter")
    assert chat.retry() == answer  # greedy
    set_seed(0)
    other = chat.retry(do_sample=True)
    assert other != answer
    assert said(chat) == [("user", "the letter"), ("assistant", other)]
    assert chat.stats is not None
    assert chat.stats.prefilled_tokens == 1


def test_undo_and_retry_without_a_turn_say_so(chat: ChatSession) -> None:
    for method in (chat.undo, chat.retry):
        with pytest.raises(ValueError, match="no turn to take back"):
            method()


def test_system_message_stays_and_is_replaced_when_another_is_given(
    model: LlamaForCausalLM, plain: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, store: AttentionStore
) -> None:
    chat = ChatSession(model, tokenizer, store, "alice", "a prince", **GREEDY)
    chat.send("the letter")
    assert said(ChatSession(model, tokenizer, store, "alice"))[0] == ("system", "a prince")
    other = ChatSession(model, tokenizer, store, "alice", "an officer", **GREEDY)
    assert [role for role, _ in said(other)] == ["system", "user", "assistant"]
    prompt = other.prompt_ids("and then")
    assert "an officer" in tokenizer.decode(prompt)
    other.send("and then")
    assert other.token_ids == prompt + plain_answer(plain, prompt, **GREEDY)


# what does not fit


def test_tokenizer_without_chat_template_is_refused(model: LlamaForCausalLM, store: AttentionStore) -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        ChatSession(model, tiny_tokenizer(None), store, "alice")


def test_template_that_refuses_the_messages_is_a_clear_error(model: LlamaForCausalLM, store: AttentionStore) -> None:
    chat = ChatSession(model, tiny_tokenizer(NO_SYSTEM), store, "alice", "a prince")
    with pytest.raises(ChatTemplateError, match="no system role here"):
        chat.send("the letter")
    assert said(chat) == [("system", "a prince")]


def test_other_model_and_tokenizer_continue_the_messages_but_reuse_nothing(
    chat: ChatSession, store: AttentionStore
) -> None:
    chat.send("the old prince looked at the letter")
    tokenizer = tiny_tokenizer(all_bytes=True)
    other = ChatSession(tiny_model(tokenizer, seed=1), tokenizer, store, "alice", **GREEDY)
    assert other.history == chat.history
    assert other.token_ids == []
    other.send("and then")
    assert other.stats is not None
    assert other.stats.reused_tokens == 0
    assert [role for role, _ in said(other)] == ["user", "assistant"] * 2


def test_metadata_of_others_is_left_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, store: AttentionStore
) -> None:
    store.set_metadata("alice", {"title": "letters"})
    ChatSession(model, tokenizer, store, "alice", **GREEDY).send("the letter")
    assert store.metadata("alice")["title"] == "letters"


def test_messages_in_a_format_of_the_future_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, store: AttentionStore
) -> None:
    store.set_metadata("alice", {"chat": {"format": 99}})
    with pytest.raises(AttentionStoreError, match=r"'alice'.*format 99"):
        ChatSession(model, tokenizer, store, "alice")


def test_fork_carries_the_messages_and_the_state(chat: ChatSession, store: AttentionStore) -> None:
    chat.send("the old prince looked at the letter")
    ids = chat.token_ids
    store.fork("alice", "bob")
    fork = ChatSession(chat.model, chat.tokenizer, store, "bob", **GREEDY)
    fork.send("and then")
    assert fork.stats is not None
    assert fork.stats.reused_tokens == len(ids) - 1
    assert len(chat.history) == 2


def test_what_a_tool_gave_is_a_message_of_its_own_role(model: LlamaForCausalLM, store: AttentionStore) -> None:
    tokenizer = tiny_tokenizer(WITH_TOOLS)
    chat = ChatSession(model, tokenizer, store, "alice", **GREEDY)
    chat.send("the letter")
    known = len(chat.token_ids)
    expected = chat.prompt_ids("nothing", "tool")
    assert expected != chat.prompt_ids("nothing")
    chat.send("nothing", role="tool")
    assert chat.token_ids[: len(expected)] == expected
    assert chat.stats is not None
    assert chat.stats.reused_tokens == known - 1
    before = said(chat)
    assert [role for role, _ in before] == ["user", "assistant", "tool", "assistant"]

    again = ChatSession(model, tokenizer, store, "alice", **GREEDY)
    assert again.retry() == before[-1][1]  # the role is kept with the message
    assert said(again) == before
    assert again.undo() == "nothing"
    assert said(again) == before[:2]


def test_a_turn_in_words(chat: ChatSession) -> None:
    chat.send("the letter")
    chat.send("and then")
    turn = chat.stats
    assert turn is not None
    assert turn.tokens_per_second is not None
    assert str(turn).startswith(
        f"reused {turn.reused_tokens} of {turn.prompt_tokens} tokens, prefilled {turn.prefilled_tokens}, first token"
    )
    assert str(turn).endswith(f", then {turn.tokens_per_second:,.0f} tokens/s")


def test_edit_of_an_earlier_message_takes_back_what_followed_and_reuses_what_came_before(
    chat: ChatSession, plain: LlamaForCausalLM, store: AttentionStore
) -> None:
    for text in ("the old prince", "the other officer", "the mother"):
        chat.send(text)
    before = ChatSession(chat.model, chat.tokenizer, store, "before", **GREEDY)
    before.send("the old prince")

    answer = chat.edit(1, "the young man rose")

    prompt = before.prompt_ids("the young man rose")
    assert chat.token_ids == prompt + plain_answer(plain, prompt, **GREEDY)
    assert [text for role, text in said(chat) if role == "user"] == ["the old prince", "the young man rose"]
    assert chat.history[-1]["content"] == answer
    assert chat.stats is not None
    assert chat.stats.prefilled_tokens < len(before.prompt_ids("the young man rose")) - len(before.token_ids) + 4
    assert chat.stats.reused_tokens >= len(before.token_ids) - 1
    assert ChatSession(chat.model, chat.tokenizer, store, "alice").history == chat.history


def test_edit_that_fails_leaves_the_conversation(chat: ChatSession) -> None:
    chat.send("the old prince")
    chat.send("the other officer")
    before = said(chat)
    with pytest.raises(RuntimeError):
        chat.edit(0, "the letter", logits_processor=LogitsProcessorList([FailsAtOnce()]))
    assert said(chat) == before
    for turn in (-1, 2):
        with pytest.raises(ValueError, match="no turn"):
            chat.edit(turn, "the letter")


def test_without_reuse_all_is_computed_and_only_the_messages_are_kept(
    chat: ChatSession, plain: LlamaForCausalLM, store: AttentionStore
) -> None:
    chat.send("the old prince")
    store.flush()
    blocks = store.stats()["disk_blocks"]
    without = ChatSession(chat.model, chat.tokenizer, store, "alice", reuse=False, **GREEDY)
    prompt = without.prompt_ids("the other officer")
    without.send("the other officer")
    assert without.stats is not None
    assert (without.stats.reused_tokens, without.stats.prefilled_tokens) == (0, len(prompt))
    assert without.token_ids == prompt + plain_answer(plain, prompt, **GREEDY)
    store.flush()
    assert store.stats()["disk_blocks"] == blocks

    again = ChatSession(chat.model, chat.tokenizer, store, "alice", **GREEDY)
    assert again.history == without.history
    again.send("the mother")
    assert again.stats is not None
    assert again.stats.reused_tokens == len(chat.token_ids) - 1


def test_annotations_go_with_the_conversation(chat: ChatSession, store: AttentionStore) -> None:
    chat.send("the old prince")
    assert chat.annotation("mood") is None
    chat.annotate("mood", {"value": 3})
    chat.send("the mother")
    store.fork("alice", "copy")
    for name in ("alice", "copy"):
        again = ChatSession(chat.model, chat.tokenizer, store, name, **GREEDY)
        assert again.annotation("mood") == {"value": 3}
        assert again.history == chat.history
