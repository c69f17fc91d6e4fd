"""Turns of the page: what is reused after each change of a conversation, what is left after a stop or an error, and
that nobody sees or changes what is another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest
from conftest import GREEDY, Gate
from support.chat_fixtures import plain_answer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_attnstore import AttentionStore, AttentionStoreError, ChatSession, SessionNotFoundError
from hf_attnstore.ui.model import ModelLoader
from hf_attnstore.ui.sessions import UserSessions
from hf_attnstore.ui.turns import Running, Turns, UserTurnError, Wish

Ask = Callable[..., Running]


def chat(sessions: UserSessions, name: str, turns: Turns) -> ChatSession:
    model, tokenizer = turns.model.result()
    return ChatSession(model, tokenizer, sessions.store, name, **GREEDY)


def said(sessions: UserSessions, name: str) -> list[str]:
    return [exchange.message for exchange in sessions.open(name).exchanges]


def test_a_conversation_prefills_only_what_is_new_and_answers_as_plain_generate(
    ask: Ask, ann: UserSessions, turns: Turns, plain: LlamaForCausalLM, store: AttentionStore
) -> None:
    for text in ("the old prince", "and the other officer", "what did the mother say"):
        before = chat(ann, "talk", turns)
        prompt = before.prompt_ids(text)
        ask(ann, "talk", "send", text)
        after = chat(ann, "talk", turns)
        assert after.token_ids == prompt + plain_answer(plain, prompt, **GREEDY)
        record = ann.open("talk").records[-1]
        assert record is not None
        known = len(before.token_ids)
        assert (record.prompt, record.reused) == (len(prompt), max(0, known - 1))
        assert record.prefilled == len(prompt) - record.reused
        assert (record.loaded_bytes > 0) == (known > 0)  # each turn takes its KV from the store, not from the process


def test_retry_undo_and_edit_go_back_to_a_prefix_and_reuse_it(
    ask: Ask, ann: UserSessions, turns: Turns, plain: LlamaForCausalLM
) -> None:
    lengths = []
    for text in ("the old prince", "the other officer", "the mother"):
        ask(ann, "talk", "send", text)
        lengths.append(len(chat(ann, "talk", turns).token_ids))

    ask(ann, "talk", "retry")
    record = ann.open("talk").records[-1]
    assert record is not None
    assert (len(ann.open("talk").records), record.prefilled) == (3, 1)  # all but the last token of the same prompt

    assert turns.undo(ann, "talk") == "the mother"
    assert len(ann.open("talk").records) == 2
    running = ask(ann, "talk", "send", "the young man")
    record = ann.open("talk").records[-1]
    assert record is not None
    assert record.reused >= lengths[1] - 1
    assert [e.message for e in running.earlier] == ["the old prince", "the other officer"]

    prompt = chat(ann, "talk", turns)
    ask(ann, "talk", "edit", "the three letters", turn=1)
    assert said(ann, "talk") == ["the old prince", "the three letters"]
    record = ann.open("talk").records[-1]
    assert record is not None
    assert record.reused >= lengths[0] - 1
    assert record.prefilled == record.prompt - record.reused < lengths[1] - lengths[0]
    edited = chat(ann, "talk", turns)
    whole = edited.token_ids
    assert whole[record.prompt :] == plain_answer(plain, whole[: record.prompt], **GREEDY)
    assert prompt.token_ids[: lengths[0]] == whole[: lengths[0]]


def test_the_switch_recomputes_and_the_footer_says_that_it_was_measured(
    ask: Ask, ann: UserSessions, turns: Turns, store: AttentionStore
) -> None:
    ask(ann, "talk", "send", "the old prince looked at the letter")
    ask(ann, "talk", "send", "and the other officer")
    with_store = ann.open("talk")
    ask(ann, "talk", "retry", reuse=False)
    compared = ann.open("talk")
    record, before = compared.records[-1], with_store.records[-1]
    assert record is not None
    assert before is not None
    assert (record.reused, record.prefilled) == (0, before.prompt)
    assert compared.exchanges[-1].answer == with_store.exchanges[-1].answer
    assert (record.ttft_with, record.ttft_without) == (before.ttft, record.ttft)
    ask(ann, "talk", "send", "what did the mother say")
    record = ann.open("talk").records[-1]
    assert record is not None
    assert record.reused > 0
    assert record.with_store


def test_stop_ends_an_answer_and_keeps_what_is_complete(
    turns: Turns, gate: Gate, ann: UserSessions, ask: Ask, plain: LlamaForCausalLM
) -> None:
    gate.hold_after(4)
    running = turns.begin(ann, "talk", Wish("send", "the old prince"))
    assert gate.reached.wait(60)
    assert turns.running(ann, "talk") == (running,)
    running.stop()
    gate.open.set()
    with pytest.raises(CancelledError):
        running.turn.result(60)
    assert running.failure() == ""
    stopped = chat(ann, "talk", turns)
    record = ann.open("talk").records[0]
    assert record is not None
    assert 4 <= record.generated <= 5
    assert record.finish == "stopped"
    assert stopped.history[-1]["content"] == running.answer != ""
    ids = stopped.token_ids
    assert ids[record.prompt :] == plain_answer(plain, ids[: record.prompt], **GREEDY)[: record.generated]
    ask(ann, "talk", "send", "go on")
    record = ann.open("talk").records[1]
    assert record is not None
    assert record.reused == len(ids) - 1


def test_stop_ends_a_prefill_between_two_layers_and_leaves_nothing(
    turns: Turns, ann: UserSessions, model: LlamaForCausalLM
) -> None:
    computed: list[int] = []
    begun = threading.Event()
    stopped = threading.Event()

    def in_a_layer(number: int) -> None:
        computed.append(number)
        begun.set()
        assert stopped.wait(60)

    hooks = [
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: in_a_layer(number))
        for number, layer in enumerate(model.model.layers)
    ]
    running = turns.begin(ann, "talk", Wish("send", "the old prince"))
    assert begun.wait(60)
    running.stop()
    stopped.set()
    with pytest.raises(CancelledError):
        running.turn.result(60)
    for hook in hooks:
        hook.remove()
    assert computed == [0]
    assert running.failure() == "stopped before anything was answered"
    assert ann.entries() == ([], 0)


def test_a_turn_that_waits_can_be_stopped_and_says_how_many_come_first(
    turns: Turns, gate: Gate, ann: UserSessions, bob: UserSessions
) -> None:
    gate.hold_after(1)
    first = turns.begin(ann, "talk", Wish("send", "the old prince"))
    assert gate.reached.wait(60)
    second = turns.begin(bob, "talk", Wish("send", "the letter"))
    assert second.turn.position == 0
    second.stop()
    assert second.done
    assert second.failure() == "stopped before anything was answered"
    gate.open.set()
    first.turn.result(60)
    with pytest.raises(SessionNotFoundError):
        bob.open("talk")


def test_nothing_changes_a_conversation_that_is_being_answered(turns: Turns, gate: Gate, ann: UserSessions) -> None:
    gate.hold_after(1)
    running = turns.begin(ann, "talk", Wish("send", "the old prince"))
    assert gate.reached.wait(60)
    for wish in (Wish("retry"), Wish("edit", "and then"), Wish("go_on")):
        with pytest.raises(UserTurnError, match="being answered"):
            turns.begin(ann, "talk", wish)
    with pytest.raises(UserTurnError, match="being answered"), turns.untouched(ann, "talk"):
        pass
    gate.open.set()
    running.turn.result(60)
    assert turns.running(ann, "talk") == ()
    with turns.untouched(ann, "talk"):
        ann.delete("talk")


def test_a_model_error_is_words_and_leaves_the_conversation(
    turns: Turns, gate: Gate, ask: Ask, ann: UserSessions
) -> None:
    ask(ann, "talk", "send", "the old prince")
    before = ann.open("talk")
    gate.failure = RuntimeError("CUDA error: out of memory\nat file.cpp:12")
    for wish in (Wish("send", "and then"), Wish("edit", "the letter"), Wish("retry")):
        running = turns.begin(ann, "talk", wish)
        with pytest.raises(RuntimeError):
            running.turn.result(60)
        assert running.failure() == "the model failed: CUDA error: out of memory"
        assert ann.open("talk") == before
    gate.failure = None
    ask(ann, "talk", "send", "and then")
    assert said(ann, "talk") == ["the old prince", "and then"]


def test_a_model_that_can_not_be_loaded_is_an_error_of_each_turn(store: AttentionStore, ann: UserSessions) -> None:
    def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
        raise AttentionStoreError("the model is not there")

    turns = Turns(store, ModelLoader(load))
    with pytest.raises(AttentionStoreError, match="not there"):
        turns.begin(ann, "talk", Wish("send", "hello"))
    assert ann.entries() == ([], 0)  # and conversations can be looked at
    turns.close()


def test_two_users_with_the_same_words_have_nothing_of_each_other(
    turns: Turns, ask: Ask, ann: UserSessions, bob: UserSessions
) -> None:
    ask(ann, "talk", "send", "the old prince looked at the letter")
    ask(bob, "talk", "send", "the old prince looked at the letter")
    record = bob.open("talk").records[0]
    assert record is not None
    assert record.reused == 0
    ask(ann, "mine", "send", "and then the other officer")
    for attempt in (
        lambda: bob.open("mine"),
        lambda: bob.rename("mine", "stolen"),
        lambda: bob.fork("mine"),
        lambda: bob.delete("mine"),
    ):
        with pytest.raises(SessionNotFoundError):
            attempt()
    with pytest.raises(UserTurnError):
        turns.undo(bob, "mine")
    for wish in (Wish("retry"), Wish("edit", "x", turn=0)):
        with pytest.raises(UserTurnError):
            turns.begin(bob, "mine", wish)
    assert [entry.name for entry in bob.entries()[0]] == ["talk"]
    assert [entry.name for entry in bob.entries("officer")[0]] == []
    assert [entry.name for entry in ann.entries("officer")[0]] == ["mine"]
    bob.delete("talk")
    assert {entry.name for entry in ann.entries()[0]} == {"talk", "mine"}


def test_one_user_can_not_fill_the_queue(turns: Turns, gate: Gate, ann: UserSessions, bob: UserSessions) -> None:
    gate.hold_after(0)
    begun = [turns.begin(ann, f"talk {n}", Wish("send", "the letter")) for n in range(4)]
    with pytest.raises(UserTurnError, match="several"):
        turns.begin(ann, "talk 5", Wish("send", "the letter"))
    begun.append(turns.begin(bob, "talk", Wish("send", "the letter")))
    gate.open.set()
    for running in begun:
        running.turn.result(60)


def test_a_process_that_ends_keeps_what_was_answered(turns: Turns, gate: Gate, ann: UserSessions) -> None:
    gate.hold_after(3)
    running = turns.begin(ann, "talk", Wish("send", "the old prince"))
    assert gate.reached.wait(60)
    running.stop()
    gate.open.set()
    turns.close()
    (exchange,) = ann.open("talk").exchanges
    assert exchange.answer == running.answer != ""
    with pytest.raises(UserTurnError, match="ending"):
        turns.begin(ann, "talk", Wish("send", "and then"))


def test_what_was_fetched_before_the_message_was_sent_is_said(
    turns: Turns, ask: Ask, ann: UserSessions, store: AttentionStore
) -> None:
    ask(ann, "talk", "send", "the old prince looked at the letter and said nothing to the others in the room")
    store.flush()
    held = ann.store.residence("talk")["memory"]
    store.drop_memory()
    assert held > ann.store.residence("talk")["memory"] == 0
    turns.expectations.expect(ann.store, "talk")
    deadline = time.monotonic() + 30
    while (fetched := ann.store.residence("talk")["memory"]) < held:
        assert time.monotonic() < deadline, "it was never fetched"
        time.sleep(0.01)
    ask(ann, "talk", "send", "and then")
    record = ann.open("talk").records[1]
    assert record is not None
    assert record.fetched_bytes == fetched
    assert record.blocks_from.keys() == {"memory"}
    ask(ann, "talk", "send", "and then")
    record = ann.open("talk").records[2]
    assert record is not None
    assert record.fetched_bytes == 0
