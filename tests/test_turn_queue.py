"""TurnQueue: who runs when, what comes out, what the store is told, and what goes wrong."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import FORGETFUL, tiny_model, tiny_tokenizer
from support.tiny_models import BLOCK, make_model, tokens
from support.turn_queue_fixtures import PATIENCE, Gate, Held, Recording, fails, noting, until
from support.turns import GREEDY, follow_up, turn
from transformers.generation.streamers import BaseStreamer

from hf_attnstore import (
    AttentionStore,
    AttentionStoreCache,
    ChatSession,
    ContextWindowError,
    QueueFullError,
    SessionBusyError,
    SessionNameError,
    Turn,
    TurnQueue,
    TurnQueueError,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Recording]:
    with Recording(tmp_path / "store", block_size=BLOCK) as opened:
        yield opened


# tokens


def test_many_threads_and_sessions_get_what_plain_generate_gives(store: Recording) -> None:
    model, plain = make_model(), make_model()

    def talk(name: str) -> None:
        sequence = tokens(0)
        for number in range(4):
            known = sequence.shape[1]
            prompt = follow_up(sequence, 13 + number, seed=100 * ord(name) + number)
            given = queue.submit(name, prompt, wait=PATIENCE, **GREEDY)
            sequence = given.result(PATIENCE)
            assert torch.equal(sequence, turn(plain, prompt, None).sequences)
            assert list(given.stream()) == sequence[0, prompt.shape[1] :].tolist()
            assert given.stats is not None
            assert given.stats.reused_tokens == max(known - 1, 0)
            assert given.stats.prefilled_tokens == prompt.shape[1] - max(known - 1, 0)
            assert (given.stats.loaded_bytes > 0) == (number > 0)
            assert given.generated_tokens == 6
            assert given.ttft_seconds is not None
            assert 0 < given.ttft_seconds <= given.running_seconds

    with TurnQueue(model, store, max_waiting=3) as queue:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(talk, "abcdefgh"))
        stats = queue.stats()
    assert (stats.submitted, stats.done, stats.waiting, stats.running) == (32, 32, 0, 0)
    assert stats.generated_tokens == 32 * 6
    assert 0 < stats.reused_tokens < stats.prompt_tokens
    assert stats.tokens_per_second > 0


def test_the_result_is_what_generate_returns_and_a_streamer_hears_it_too(store: Recording) -> None:
    class Hears(BaseStreamer):
        def __init__(self) -> None:
            self.heard: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.heard += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, prompt, streamer = make_model(), tokens(30), Hears()
    expected = turn(make_model(), prompt, None)
    with TurnQueue(model, store) as queue:
        given = queue.submit(
            "alice", prompt, streamer=streamer, return_dict_in_generate=True, output_logits=True, **GREEDY
        )
        output = given.result(PATIENCE)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(output.logits, expected.logits, strict=True))
    assert streamer.heard == expected.sequences[0].tolist()
    assert streamer.ended


def test_beams_samples_and_no_session_run_as_in_plain_generate(store: Recording) -> None:
    model, plain, prompt = make_model(), make_model(), tokens(40)
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    several = {"num_return_sequences": 2, "num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    with TurnQueue(model, store) as queue:
        for settings in (beams, several):
            given = queue.submit(None, prompt, **settings)
            assert torch.equal(given.result(PATIENCE), plain.generate(prompt, **settings))
            assert given.pieces == []  # beams are known at the end only
    assert store.sessions() == []


def test_the_options_of_the_caches_are_those_of_the_queue(store: Recording) -> None:
    model = make_model()
    with TurnQueue(model, store, save=False) as queue:
        queue.submit("alice", tokens(40), **GREEDY).result(PATIENCE)
    assert store.session_count() == 0
    with pytest.raises(TypeError):
        TurnQueue(model, store, windows=7)
    for wrong in ({"max_waiting": -1}, {"patience": -1.0}, {"session_wait": float("nan")}):
        with pytest.raises(TurnQueueError):
            TurnQueue(model, store, **wrong)
    with pytest.raises(ContextWindowError):
        TurnQueue(model, store, window=4, keep_first=10)


def test_autocast_of_the_thread_that_makes_the_queue_holds_for_its_turns(store: Recording) -> None:
    model, plain, prompt = make_model(), make_model(), tokens(40)
    with torch.autocast("cpu", torch.bfloat16):
        expected = turn(plain, prompt, None)
        queue = TurnQueue(model, store)
    with queue:
        output = queue.submit("a", prompt, return_dict_in_generate=True, output_logits=True, **GREEDY).result(PATIENCE)
    assert all(torch.equal(a, b) for a, b in zip(output.logits, expected.logits, strict=True))
    assert not torch.equal(output.logits[0], turn(plain, prompt, None).logits[0])


# order


def test_first_come_first_served_and_places_are_known(store: Recording) -> None:
    order: list[str] = []
    with TurnQueue(make_model(), store) as queue:
        gate = Gate(queue)
        turns = [queue.run(name, noting(order, name)) for name in "dacb"]
        assert [one.position for one in turns] == [0, 1, 2, 3]
        assert queue.waiting == turns
        assert (gate.turn.position, gate.turn.state, turns[0].state) == (None, "running", "waiting")
        assert queue.running is gate.turn
        gate.go_on.set()
    assert order == list("dacb")
    assert [one.state for one in [gate.turn, *turns]] == ["done"] * 5
    assert all(one.waiting_seconds > 0 for one in turns)


def test_priorities_go_first_and_a_session_keeps_its_order(store: Recording) -> None:
    order: list[str] = []
    with TurnQueue(make_model(), store) as queue:
        gate = Gate(queue)
        queue.run("b", noting(order, "b"))
        queue.run("a", noting(order, "a1"))
        queue.run("c", noting(order, "c"), priority=1)
        queue.run("a", noting(order, "a2"), priority=2)
        assert [one.session for one in queue.waiting] == ["a", "a", "c", "b"]
        gate.go_on.set()
    assert order == ["a1", "a2", "c", "b"]


def test_a_turn_that_has_waited_for_long_is_not_overtaken_any_more(store: Recording) -> None:
    order: list[str] = []
    with TurnQueue(make_model(), store, patience=0.01) as queue:
        gate = Gate(queue)
        queue.run("old", noting(order, "old"))
        time.sleep(0.05)  # more than one step of priority is worth
        queue.run("young", noting(order, "young"))
        queue.run("urgent", noting(order, "urgent"), priority=1)
        gate.go_on.set()
    assert order[0] == "old"
    assert set(order) == {"old", "young", "urgent"}


# what the store is told


def test_the_store_is_told_who_comes_whenever_that_changes(store: Recording) -> None:
    with TurnQueue(make_model(), store) as queue:
        gate = Gate(queue, "now")
        submit = {name: queue.run(name, lambda turn: turn.put("begun")) for name in "ab"}
        until(lambda: store.told[-1:] == [["a", "b"]])
        again = queue.run("a", lambda _: None)
        queue.run(None, lambda _: None)
        queue.run("c", lambda _: None, priority=1)
        until(lambda: store.told[-1] == ["c", "a", "b", "a"])
        submit["a"].cancel()
        until(lambda: store.told[-1] == ["c", "b", "a"])
        again.cancel()
        until(lambda: store.told[-1] == ["c", "b"])
        gate.go_on.set()
    assert store.told[-1] == []
    assert all("now" not in told for told in store.told)  # it ran at once: there was nothing to fetch for it


def test_a_session_stays_on_the_list_until_its_turn_has_what_it_came_for(store: Recording) -> None:
    model = make_model()
    with TurnQueue(model, store) as queue:
        gate, streamer = Gate(queue), Held(0)
        running = queue.submit("a", tokens(30), streamer=streamer, **GREEDY)
        queue.submit("b", tokens(30), **GREEDY)
        until(lambda: store.told[-1:] == [["a", "b"]])
        before = threading.Event()

        def holds(*_: Any) -> None:
            assert before.wait(PATIENCE)

        handle = model.register_forward_pre_hook(holds)
        gate.go_on.set()
        until(lambda: running.state == "running")
        third = queue.run("c", lambda _: None)
        until(lambda: store.told[-1] == ["a", "b", "c"])  # it computes its first token
        before.set()
        assert streamer.reached.wait(PATIENCE)
        until(lambda: store.told[-1] == ["b", "c"])  # it has it
        assert third.position == 1
        streamer.go_on.set()
        handle.remove()


def test_a_session_with_another_turn_to_come_stays_on_the_list_when_one_is_saved(store: Recording) -> None:
    with TurnQueue(make_model(), store) as queue:
        gate, streamer, between = Gate(queue), Held(2), threading.Event()
        first = queue.submit("a", tokens(20), streamer=streamer, **GREEDY)
        queue.run("b", lambda _: between.wait(PATIENCE))
        second = queue.submit("a", tokens(40), **GREEDY)
        gate.go_on.set()
        assert streamer.reached.wait(PATIENCE)
        until(lambda: list(store.upcoming) == ["b", "a"])
        streamer.go_on.set()
        first.result(PATIENCE)
        until(lambda: list(store.upcoming) == ["b", "a"])  # the store took one off when the turn was saved
        between.set()
        second.result(PATIENCE)
        until(lambda: list(store.upcoming) == [])


def test_equal_names_in_several_namespaces_are_several_sessions(store: Recording) -> None:
    model = make_model()
    with Recording(store.path, namespace="other") as other, TurnQueue(model, store, session_wait=PATIENCE) as queue:
        gate = Gate(queue)
        lock = store.lock_session("alice", wait=0)
        here = queue.submit("alice", tokens(40), **GREEDY)
        there = queue.submit("alice", tokens(40), store=other, priority=-1, **GREEDY)
        queue.run("bob", lambda _: None, store=other, priority=-1)
        until(lambda: (store.told[-1:], other.told[-1:]) == ([["alice"]], [["alice", "bob"]]))
        gate.go_on.set()
        assert there.result(PATIENCE).shape[1] == 46  # it does not wait for the session of its name
        assert here.state == "waiting"
        assert here.store is store
        assert there.store is other
        lock.release()
        assert torch.equal(here.result(PATIENCE), there.result(PATIENCE))
        assert here.stats is not None
        assert here.stats.reused_tokens == 0
    assert (store.told[-1], other.told[-1]) == ([], [])
    assert store.tokens("alice") == here.result()[0, :-1].tolist()


def test_a_store_that_can_not_be_told_disturbs_no_turn(store: Recording, log: pytest.LogCaptureFixture) -> None:
    def refuses(_: Sequence[str]) -> None:
        raise RuntimeError("no schedule today")

    store.schedule = refuses  # type: ignore[method-assign]
    with TurnQueue(make_model(), store) as queue:
        gate = Gate(queue)
        turns = [queue.submit(name, tokens(20), **GREEDY) for name in "abc"]
        gate.go_on.set()
        assert all(one.result(PATIENCE).shape[1] == 26 for one in turns)
    assert log.text.count("no schedule today") >= 1
    assert log.text.count("could not be told") == 1


# back-pressure


def test_a_full_queue_refuses_or_has_one_wait(store: Recording) -> None:
    with TurnQueue(make_model(), store, max_waiting=2) as queue:
        gate = Gate(queue)
        first, second = (queue.run("a", lambda _: "ran") for _ in range(2))
        with pytest.raises(QueueFullError, match="max_waiting=2"):
            queue.run("a", lambda _: "never")
        with pytest.raises(QueueFullError):
            queue.run("a", lambda _: "never", wait=0.02)
        with ThreadPoolExecutor(1) as pool:
            patient = pool.submit(queue.run, "a", lambda _: "patient", wait=float("inf"))
            time.sleep(0.02)
            assert not patient.done()
            first.cancel()
            third = patient.result(PATIENCE)
        assert queue.waiting == [second, third]
        gate.go_on.set()
        assert third.result(PATIENCE) == "patient"
        assert queue.stats().refused == 2


def test_with_room_for_nobody_a_turn_is_taken_when_nothing_runs(store: Recording) -> None:
    with TurnQueue(make_model(), store, max_waiting=0) as queue:
        gate = Gate(queue)
        with pytest.raises(QueueFullError):
            queue.run("a", lambda _: "never")
        gate.go_on.set()
        gate.turn.result(PATIENCE)
        assert queue.run("a", lambda _: "now").result(PATIENCE) == "now"


# errors


def test_a_turn_that_fails_fails_alone(store: Recording) -> None:
    model = make_model()
    with TurnQueue(model, store) as queue:
        gate = Gate(queue)
        bad = queue.run("a", fails)
        worse = queue.run("a", lambda _: sys.exit("leaves"))
        wrong = queue.submit("a", tokens(20), no_such_argument=1)
        good = queue.submit("a", tokens(20), **GREEDY)
        gate.go_on.set()
        with pytest.raises(LookupError, match="this one fails"):
            bad.result(PATIENCE)
        assert isinstance(worse.exception(PATIENCE), SystemExit)
        with pytest.raises(ValueError, match="no_such_argument"):
            list(wrong.stream())
        assert torch.equal(good.result(PATIENCE), turn(make_model(), tokens(20), None).sequences)
        assert [one.state for one in (bad, worse, wrong, good)] == ["failed"] * 3 + ["done"]
        assert queue.stats().failed == 3


def test_an_error_in_the_model_frees_the_session_and_its_memory(store: Recording) -> None:
    model = make_model()

    def out_of_memory(*_: Any) -> None:
        raise MemoryError("no memory")

    with TurnQueue(model, store) as queue:
        handle = model.model.layers[1].register_forward_hook(out_of_memory)
        failed = queue.submit("alice", tokens(40), **GREEDY)
        with pytest.raises(MemoryError):
            failed.result(PATIENCE)
        handle.remove()
        frame = failed.exception().__traceback__  # type: ignore[union-attr]
        held = []
        while frame is not None:
            held += [value for value in frame.tb_frame.f_locals.values() if isinstance(value, AttentionStoreCache)]
            frame = frame.tb_next
        assert held == []
        again = queue.submit("alice", tokens(40), **GREEDY).result(PATIENCE)
        assert torch.equal(again, turn(make_model(), tokens(40), None).sequences)


def test_callbacks_that_raise_stop_nothing(store: Recording) -> None:
    with TurnQueue(make_model(), store) as queue:
        for error in (ValueError, SystemExit):
            gate = Gate(queue)

            def raises(_: Any, error: type[BaseException] = error) -> None:
                raise error("in a callback")

            gate.turn.add_done_callback(raises)
            gate.go_on.set()
            assert gate.turn.result(PATIENCE) == "gate"
        assert queue.run("a", lambda _: "goes on").result(PATIENCE) == "goes on"


def test_waiting_for_oneself_is_an_error_and_submitting_from_a_turn_is_not(store: Recording) -> None:
    with TurnQueue(make_model(), store, max_waiting=1) as queue:

        def nested(turn: Turn[Any]) -> Any:
            inner = queue.run("inner", lambda _: "inner")
            for waits in (inner.result, inner.exception, lambda: next(inner.stream(cancel=False)), turn.result):
                with pytest.raises(TurnQueueError, match="wait"):
                    waits()
            with pytest.raises(QueueFullError):  # waiting for room would be for ever
                queue.run("more", lambda _: None, wait=PATIENCE)
            return inner

        inner = queue.run("outer", nested).result(PATIENCE)
        assert inner.result(PATIENCE) == "inner"

        chained: list[Turn[Any]] = []
        seen = threading.Event()

        def chain(done: Any) -> None:
            assert done.result() == "first"
            chained.append(queue.run("a", lambda _: "second"))
            seen.set()

        queue.run("a", lambda _: "first").add_done_callback(chain)
        assert seen.wait(PATIENCE)
        assert chained[0].result(PATIENCE) == "second"


def test_what_is_wrong_with_a_turn_is_said_when_it_is_submitted(store: Recording) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    with TurnQueue(model, store) as queue:
        with pytest.raises(SessionNameError):
            queue.submit("", tokens(5))
        with pytest.raises(TurnQueueError, match="leave it out"):
            queue.submit("a", tokens(5), past_key_values=AttentionStoreCache(model, "a", store))
        with pytest.raises(TurnQueueError, match="priority"):
            queue.run("a", lambda _: None, priority=float("nan"))
        with pytest.raises(TurnQueueError, match="another model"):
            queue.retry(ChatSession(tiny_model(tokenizer), tokenizer, store, "a"))
        assert queue.stats().submitted == 0


# sessions that somebody else holds


def test_a_session_that_somebody_else_holds_fails_its_turn_only(store: Recording) -> None:
    with TurnQueue(make_model(), store) as queue:
        lock = store.lock_session("busy", wait=0)
        busy, free = (queue.submit(name, tokens(20), **GREEDY) for name in ("busy", "free"))
        with pytest.raises(SessionBusyError, match="busy"):
            busy.result(PATIENCE)
        assert free.result(PATIENCE).shape[1] == 26
        lock.release()
        assert queue.submit("busy", tokens(20), **GREEDY).result(PATIENCE).shape[1] == 26


def test_a_turn_waits_for_its_session_while_others_run(store: Recording) -> None:
    order: list[str] = []
    with TurnQueue(make_model(), store, session_wait=PATIENCE) as queue:
        lock = store.lock_session("busy", wait=0)
        gate = Gate(queue)
        held = [queue.run("busy", noting(order, name)) for name in ("held 1", "held 2")]
        free = queue.run("free", noting(order, "free"))
        gate.go_on.set()
        free.result(PATIENCE)
        assert [one.state for one in held] == ["waiting", "waiting"]
        assert [one.position for one in held] == [0, 1]
        gone = queue.run("busy", noting(order, "gone"))
        assert gone.cancel()
        lock.release()
        held[1].result(PATIENCE)
    assert order == ["free", "held 1", "held 2"]


def test_a_turn_whose_session_does_not_become_free_fails_in_the_end(store: Recording) -> None:
    with TurnQueue(make_model(), store, session_wait=0.1) as queue:
        lock = store.lock_session("busy", wait=0)
        with pytest.raises(SessionBusyError):
            queue.submit("busy", tokens(20), **GREEDY).result(PATIENCE)
        lock.release()


def test_a_session_held_by_another_process_is_waited_for(store: Recording) -> None:
    script = (
        "import filelock, sys\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.readline()"
    )
    locks = store._locks
    path = locks._folder / f"{locks._name(store.namespace, 'alice')}.lock"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as there:
        assert there.stdout is not None
        assert there.stdout.readline() == "held\n"
        with TurnQueue(make_model(), store, session_wait=PATIENCE) as queue:
            alice, bob = (queue.submit(name, tokens(20), **GREEDY) for name in ("alice", "bob"))
            bob.result(PATIENCE)
            assert alice.state == "waiting"
            there.communicate("let go\n", timeout=PATIENCE)
            assert alice.result(PATIENCE).shape[1] == 26


# chats


def test_chats_speak_through_the_queue_as_without_it(store: Recording, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    texts = ("the old prince", "said nothing", "and the letter")
    settings = {"do_sample": False, "max_new_tokens": 12}
    with AttentionStore(tmp_path / "plain", block_size=BLOCK) as other:
        alone = {name: ChatSession(tiny_model(tokenizer), tokenizer, other, name, name, **settings) for name in "abc"}
        expected = {name: [chat.send(text) for text in texts] for name, chat in alone.items()}

    chats = {name: ChatSession(model, tokenizer, store, name, name, **settings) for name in "abc"}
    heard: list[str] = []
    with TurnQueue(model, store) as queue:
        turns = {name: [queue.send(chats[name], text, heard.append) for text in texts] for name in "abc"}
        for name, given in turns.items():
            assert [one.result(PATIENCE) for one in given] == expected[name]
            for one, answer in zip(given, expected[name], strict=True):
                assert "".join(one.stream()) == answer
                assert one.chat_turn is not None
                assert one.stats is one.chat_turn.cache
                assert one.generated_tokens == one.chat_turn.generated_tokens == 12
            assert given[-1].chat_turn is chats[name].stats
            assert given[-1].chat_turn.reused_tokens > given[0].chat_turn.prompt_tokens
        again = queue.retry(chats["a"])
        assert again.result(PATIENCE) == expected["a"][-1]
        assert len(chats["a"].history) == 7
        assert queue.run("a", lambda _: chats["a"].undo()).result(PATIENCE) == texts[-1]
    assert sorted("".join(heard)) == sorted("".join(text for answers in expected.values() for text in answers))


def test_a_chat_that_is_stopped_keeps_its_answer_so_far(store: Recording) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    chat = ChatSession(model, tokenizer, store, "alice", do_sample=False, max_new_tokens=300)
    with TurnQueue(model, store) as queue:
        stopped = queue.send(chat, "the old prince")
        stream = stopped.stream()
        next(stream)
        stream.close()
        with pytest.raises(CancelledError):
            stopped.result(PATIENCE)
        assert chat.stats is not None
        assert chat.stats.finish == "stopped"
        assert chat.history[-1]["content"] == "".join(stopped.pieces)
        assert 0 < stopped.generated_tokens < 300
        waits = queue.send(chat, "goes on", max_new_tokens=5)
        waits.result(PATIENCE)
        assert waits.chat_turn is not None
        assert waits.chat_turn.reused_tokens >= stopped.generated_tokens
        failed = queue.send(chat, "never", no_such_argument=1)
        assert isinstance(failed.exception(PATIENCE), ValueError)
        assert failed.chat_turn is None
        assert len(chat.history) == 4


def test_what_a_chat_computes_in_the_background_gives_way_to_who_waits(store: Recording) -> None:
    tokenizer = tiny_tokenizer(FORGETFUL)
    model = tiny_model(tokenizer)
    chat = ChatSession(model, tokenizer, store, "alice", canonicalize=True, do_sample=False, max_new_tokens=60)
    with TurnQueue(model, store) as queue:
        gate = Gate(queue)
        first = queue.send(chat, "the old prince looked at the letter")
        outcomes: list[Any] = []
        second = queue.run("bob", lambda _: outcomes.append(chat.stats.background.outcome))  # type: ignore[union-attr]
        gate.go_on.set()
        second.result(PATIENCE)
        assert outcomes[0] in ("done", "stopped")  # and not "running" beside the turn
        third = queue.send(chat, "and said nothing", max_new_tokens=5)
        third.result(PATIENCE)
        assert first.chat_turn is not None
    plain = ChatSession(tiny_model(tokenizer), tokenizer, AttentionStore(store.path.with_name("plain")), "alice")
    settings = {"do_sample": False}
    answers = [
        plain.send("the old prince looked at the letter", max_new_tokens=60, **settings),
        plain.send("and said nothing", max_new_tokens=5, **settings),
    ]
    plain.store.close()
    assert [first.result(), third.result()] == answers
