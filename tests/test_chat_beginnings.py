"""ChatSession: beginning from what was said elsewhere, several messages before an answer, answers that go on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import APPEND_ONLY, plain_answer, tiny_model, tiny_tokenizer

from hf_attnstore import AttentionStore, AttentionStoreCache, AttentionStoreError, CacheUseError, ChatSession, attach
from hf_attnstore.chat import session as chats
from hf_attnstore.chat.session import BEGAN_KEY
from hf_attnstore.chat.transcript import encode

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
TOKENIZER = tiny_tokenizer(
    APPEND_ONLY.replace("'<|' + m['role']", "'<|' + ('user' if m['role'] == 'tool' else m['role'])")
)
MODEL, PLAIN = tiny_model(TOKENIZER), tiny_model(TOKENIZER)
BEFORE = [
    {"role": "system", "content": "the old prince"},
    {"role": "user", "content": "the letter"},
    {"role": "assistant", "content": "and the room"},
]


def open_chat(store: AttentionStore, **options: Any) -> ChatSession:
    return ChatSession(MODEL, TOKENIZER, store, "alice", **{**GREEDY, **options})


def rendered(messages: list[dict[str, str]]) -> list[int]:
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(encode(TOKENIZER, str(text)))


def test_a_conversation_begins_with_messages_from_elsewhere(store: AttentionStore) -> None:
    chat = open_chat(store, messages=BEFORE)
    assert chat.history == BEFORE
    prompt = rendered([*BEFORE, {"role": "user", "content": "and then"}])
    assert chat.prompt_ids("and then") == prompt
    chat.send("and then")
    assert chat.token_ids == prompt + plain_answer(PLAIN, prompt, **GREEDY)
    again = open_chat(store, messages=BEFORE[:1])
    assert again.history == chat.history, "what the session has goes on"
    again.send("so")
    assert again.stats is not None
    assert again.stats.reused_tokens == len(chat.token_ids) - 1
    again.undo()
    again.undo()
    assert again.history == BEFORE
    assert again.undo() == "the letter"


@pytest.mark.parametrize("wrong", [["the letter"], [{"role": "user"}], [{"role": "user", "content": ["the letter"]}]])
def test_messages_that_are_none_are_refused(wrong: Any, store: AttentionStore) -> None:
    with pytest.raises(CacheUseError, match="a message is"):
        open_chat(store, messages=wrong)


def test_several_results_of_tools_get_one_answer(store: AttentionStore) -> None:
    chat = open_chat(store)
    chat.send("the old prince")
    chat.add("the letter", role="tool")
    chat.add("the room", role="tool")
    prompt = chat.prompt_ids("the hour", role="tool")
    before = len(chat.token_ids)
    chat.send("the hour", role="tool")
    assert [m["role"] for m in chat.history] == ["user", "assistant", "tool", "tool", "tool", "assistant"]
    assert chat.token_ids == prompt + plain_answer(PLAIN, prompt, **GREEDY)
    assert chat.stats is not None
    assert chat.stats.reused_tokens == before - 1
    answered = chat.token_ids
    chat.retry()
    assert chat.token_ids == answered, "the same messages, the likeliest answer"
    chat.edit(1, "the hour")
    assert chat.token_ids == answered
    assert open_chat(store).history == chat.history
    assert chat.undo() == "the hour"
    assert len(chat.history) == 2
    chat.add("once more", role="tool")
    assert chat.undo() == "once more"
    assert len(chat.history) == 2


def test_an_answer_that_was_cut_goes_on_as_if_it_had_not_been(store: AttentionStore) -> None:
    prompt = rendered([{"role": "user", "content": "the old prince"}])
    whole = plain_answer(PLAIN, prompt, max_new_tokens=20, do_sample=False)
    chat = open_chat(store)
    first = chat.send("the old prince", max_new_tokens=8)
    chat = open_chat(store)  # perhaps in another process
    pieces: list[str] = []
    answer = chat.go_on(stream=pieces.append, max_new_tokens=12)
    assert chat.token_ids == prompt + whole
    assert answer == first + "".join(pieces)
    assert chat.history[-1]["content"] == answer
    assert len(chat.history) == 2
    assert chat.stats is not None
    assert chat.stats.reused_tokens == len(prompt) + 8 - 1
    assert chat.stats.prefilled_tokens == 1
    chat.send("so")
    assert chat.stats.reused_tokens == len(prompt) + len(whole) - 1


def test_an_answer_that_is_complete_does_not_go_on(store: AttentionStore) -> None:
    chat = open_chat(store)
    with pytest.raises(ValueError, match="no turn"):
        chat.go_on()
    chat.send("the old prince", eos_token_id=None)
    ended = [*chat.token_ids, TOKENIZER.eos_token_id]
    chat._transcript = chats.replace(chat._transcript, ids=tuple(ended))
    with pytest.raises(ValueError, match="is complete"):
        chat.go_on()


def test_an_answer_begins_as_it_is_told(store: AttentionStore) -> None:
    begin = "and the letter"
    prompt = rendered([{"role": "user", "content": "the old prince"}]) + list(encode(TOKENIZER, begin))
    chat = open_chat(store)
    answer = chat.send("the old prince", begin=begin)
    assert answer.startswith(begin)
    assert chat.token_ids == prompt + plain_answer(PLAIN, prompt, **GREEDY)
    assert chat.stats is not None
    assert (chat.stats.prompt_tokens, chat.stats.prefilled_tokens) == (len(prompt), len(prompt))


DATED = "{{ '<|system|>' + strftime_now('%d %b %Y') + '<|end|>' }}" + APPEND_ONLY


@pytest.mark.parametrize("frozen", [True, False])
def test_the_date_in_a_template_is_that_of_the_beginning(
    frozen: bool, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer(DATED, all_bytes=True)
    model, day = tiny_model(tokenizer), 86400.0
    options = {**GREEDY, "freeze_date": frozen}
    chat = ChatSession(model, tokenizer, store, "bob", **options)
    chat.send("the old prince")
    today = chat.prompt_ids("so")
    now = time.time()
    monkeypatch.setattr(chats.time, "time", lambda: now + 40 * day)
    later = ChatSession(model, tokenizer, store, "bob", **options)
    assert later.prompt_ids("so") == today
    assert (BEGAN_KEY in store.metadata("bob")) is frozen
    if frozen:
        later.send("so")
        assert later.stats is not None
        assert later.stats.reused_tokens == len(chat.token_ids) - 1
        new = ChatSession(model, tokenizer, store, "carol", **options)
        assert new.prompt_ids("so")[:20] != today[:20]


def test_arguments_in_another_order_are_named(store: AttentionStore, tmp_path: Path) -> None:
    for wrong, says in (
        ((TOKENIZER, MODEL, store, "a"), "the model given is a PreTrainedTokenizerFast|TokenizersBackend"),
        ((MODEL, store, TOKENIZER, "a"), "the tokenizer given is a AttentionStore"),
        ((MODEL, TOKENIZER, "a", store), "the store given is the text 'a'"),
    ):
        with pytest.raises(CacheUseError, match=says):
            ChatSession(*wrong)  # type: ignore[arg-type]
    with pytest.raises(AttentionStoreError, match="the model comes first"):
        attach(store, MODEL)  # type: ignore[arg-type]
    with pytest.raises(AttentionStoreError, match="the model comes first"):
        AttentionStoreCache("alice", MODEL)  # type: ignore[arg-type]
    with pytest.raises(AttentionStoreError, match="takes a store"):
        attach(MODEL, tmp_path)  # type: ignore[arg-type]
    assert torch.is_grad_enabled()


SYSTEM = "the letter " * 25


def in_namespace(store: AttentionStore, name: str, **options: Any) -> ChatSession:
    """A chat of one turn; without loss it says what a model without a store does."""
    chat = ChatSession(MODEL, TOKENIZER, store.in_namespace(name), "talk", SYSTEM, **GREEDY, **options)
    prompt = chat.prompt_ids("and then")
    chat.send("and then")
    assert store.is_lossy or chat.token_ids == prompt + plain_answer(PLAIN, prompt, **GREEDY)
    return chat


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_system_prompt_is_shared_between_namespaces_and_nothing_else_is(store: AttentionStore, codec: str) -> None:
    store = store.with_codec(codec)
    first = in_namespace(store, "ann", system_from="house")
    assert first.stats is not None
    assert first.stats.reused_tokens == 0
    both = rendered([{"role": "system", "content": SYSTEM}, {"role": "user", "content": ""}])
    shared = len(both) // store.block_size * store.block_size  # whole blocks, and nothing of the message
    assert shared >= 16
    second = in_namespace(store, "bob", system_from="house")
    assert second.stats is not None
    assert (second.stats.reused_tokens, second.stats.cache.loaded_bytes > 0) == (shared, True)
    for name, options in (("carl", {}), ("dora", {"system_from": "hut"})):  # nobody else's
        apart = in_namespace(store, name, **options)
        assert apart.stats is not None
        assert apart.stats.reused_tokens == 0
    house, said = store.in_namespace("house"), first.token_ids
    cache = AttentionStoreCache(MODEL, None, house, save=False)
    assert cache.match(torch.tensor([said])) == shared, "what was said is not there"
    assert house.sessions() == []
    store.flush()
    store.drop_memory()
    third = in_namespace(store, "emma", system_from="house")  # from disk
    assert third.stats is not None
    assert third.stats.reused_tokens == shared
    assert third.token_ids == second.token_ids


def test_what_a_conversation_from_elsewhere_has_said_is_not_shared(store: AttentionStore) -> None:
    said = [{"role": "user", "content": SYSTEM}, {"role": "assistant", "content": "and the room"}]
    chat = ChatSession(MODEL, TOKENIZER, store.in_namespace("ann"), "a", messages=said, system_from="house", **GREEDY)
    chat.send("and then")
    cache = AttentionStoreCache(MODEL, None, store.in_namespace("house"), save=False)
    assert cache.match(torch.tensor([chat.token_ids])) == 0
    other = ChatSession(MODEL, TOKENIZER, store.in_namespace("bob"), "b", messages=said, system_from="house", **GREEDY)
    other.send("and then")
    assert other.stats is not None
    assert other.stats.reused_tokens == 0
