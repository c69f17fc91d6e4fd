"""How the turns of a `TurnQueue` end: stopped, out of time, with their queue, and in races of all that."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fresh
from support.tiny_models import BLOCK, make_model, tokens
from support.turn_queue_fixtures import LONG, PATIENCE, Gate, Held, Recording, next_token, noting, until
from support.turns import GREEDY, turn

from hf_attnstore import (
    AttentionStore,
    QueueFullError,
    StoreClosedError,
    Turn,
    TurnQueue,
    TurnQueueError,
    TurnTimeoutError,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Recording]:
    with Recording(tmp_path / "store", block_size=BLOCK) as opened:
        yield opened


# cancelling


def test_a_waiting_turn_that_is_cancelled_never_runs(store: Recording) -> None:
    order: list[str] = []
    with TurnQueue(make_model(), store) as queue:
        gate = Gate(queue)
        first, second = queue.run("a", noting(order, "first")), queue.run("a", noting(order, "second"))
        called: list[Any] = []
        first.add_done_callback(called.append)
        assert first.cancel()
        assert called == [first]
        assert (first.state, first.position, second.position) == ("cancelled", None, 0)
        assert wait([first], PATIENCE).done == {first}
        with pytest.raises(CancelledError):
            first.result()
        assert list(first.stream()) == []
        assert first.cancel()
        gate.go_on.set()
        second.result(PATIENCE)
        assert not second.cancel()
        assert queue.stats().cancelled == 1
    assert order == ["second"]


def test_a_running_turn_stops_at_the_next_token_and_keeps_what_is_complete(store: Recording) -> None:
    model, plain, prompt = make_model(), make_model(), tokens(40)
    whole = turn(plain, prompt, None, max_new_tokens=400).sequences
    with TurnQueue(model, store) as queue:
        streamer = Held(20)
        stopped = queue.submit("alice", prompt, streamer=streamer, **LONG)
        assert streamer.reached.wait(PATIENCE)
        assert stopped.cancel()
        assert not stopped.done()
        streamer.go_on.set()
        with pytest.raises(CancelledError):
            stopped.result(PATIENCE)
        with pytest.raises(CancelledError):
            stopped.exception(PATIENCE)
        assert (stopped.state, stopped.cancelled(), stopped.done()) == ("cancelled", True, True)
        said = stopped.pieces
        assert said == whole[0, 40 : 40 + len(said)].tolist()
        assert len(said) in next_token(streamer)
        assert stopped.stats is not None

        again = queue.submit("alice", whole[:, :60], **GREEDY)
        assert torch.equal(again.result(PATIENCE), turn(plain, whole[:, :60], None).sequences)
        assert again.stats is not None
        assert again.stats.reused_tokens == 59
    assert store.tokens("alice")[:60] == whole[0, :60].tolist()


@pytest.mark.parametrize("how", ["close", "drop", "break"])
def test_a_listener_that_goes_away_cancels(how: str, store: Recording) -> None:
    with TurnQueue(make_model(), store) as queue:
        running = queue.submit("alice", tokens(20), **LONG)
        if how == "break":
            for number, _ in enumerate(running.stream()):
                if number == 3:
                    break
        else:
            stream = running.stream()
            assert next(stream) == running.pieces[0]
            if how == "close":
                stream.close()
            else:
                del stream
                gc.collect()
        assert wait([running], PATIENCE).done
        assert running.cancelled()


def test_a_listener_that_only_looks_on_cancels_nothing_and_may_come_late(store: Recording) -> None:
    prompt = tokens(20)
    expected = turn(make_model(), prompt, None).sequences[0, 20:].tolist()
    with TurnQueue(make_model(), store) as queue:
        streamer = Held(3)
        running = queue.submit("alice", prompt, streamer=streamer, **GREEDY)
        looks = running.stream(cancel=False)
        assert next(looks) == expected[0]
        looks.close()
        del looks
        streamer.go_on.set()
        assert list(running.stream()) == expected
        unused = running.stream()
        del unused
        assert running.result(PATIENCE)[0, 20:].tolist() == expected
        assert running.state == "done"


def test_time_runs_out_for_who_waits_and_for_who_runs(store: Recording) -> None:
    order: list[str] = []
    with TurnQueue(make_model(), store) as queue:
        gate = Gate(queue)
        late = queue.run("a", noting(order, "late"), timeout=0.02)
        with pytest.raises(TurnTimeoutError, match="waited for"):
            late.result(PATIENCE)
        assert (late.state, late.cancelled()) == ("failed", False)
        gate.go_on.set()

        streamer = Held(5)
        running = queue.submit("b", tokens(20), timeout=3600, streamer=streamer, **LONG)
        assert streamer.reached.wait(PATIENCE)
        running._submitted -= 3600  # it is an hour later
        streamer.go_on.set()
        with pytest.raises(TurnTimeoutError):
            list(running.stream())
        assert len(running.pieces) in next_token(streamer)
        assert queue.run("a", lambda _: "in time", timeout=float("inf")).result(PATIENCE) == "in time"
        assert queue.stats().timed_out == 2
    assert order == []
    assert len(store.tokens("b")) == 19 + len(running.pieces)


def test_a_turn_can_be_awaited(store: Recording) -> None:
    prompt = tokens(20)

    async def talk(queue: TurnQueue) -> Any:
        sequence = await asyncio.wrap_future(queue.submit("alice", prompt, **GREEDY))
        stopped = queue.submit("bob", prompt, **LONG)
        task = asyncio.ensure_future(asyncio.wrap_future(stopped))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return sequence, stopped

    with TurnQueue(make_model(), store) as queue:
        sequence, stopped = asyncio.run(talk(queue))
        assert torch.equal(sequence, turn(make_model(), prompt, None).sequences)
        assert wait([stopped], PATIENCE).done
        assert stopped.cancelled()


# its end


def test_close_runs_what_waits_and_takes_nothing_more(store: Recording) -> None:
    queue = TurnQueue(make_model(), store)
    gate = Gate(queue)
    turns = [queue.submit(name, tokens(20), **GREEDY) for name in "abc"]
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(queue.close)
        until(lambda: queue._closing)
        with pytest.raises(TurnQueueError, match="closed"):
            queue.submit("d", tokens(20))
        gate.go_on.set()
        closing.result(PATIENCE)
    assert all(one.state == "done" for one in turns)
    queue.close()
    queue.close(cancel=True)


def test_close_can_cancel_all(store: Recording) -> None:
    queue = TurnQueue(make_model(), store, max_waiting=3)
    streamer = Held(4)
    running = queue.submit("a", tokens(20), streamer=streamer, **LONG)
    assert streamer.reached.wait(PATIENCE)
    turns = [queue.submit(name, tokens(20), **GREEDY) for name in "abc"]
    with ThreadPoolExecutor(2) as pool:
        blocked = pool.submit(queue.submit, "d", tokens(20), wait=PATIENCE)
        closing = pool.submit(queue.close, cancel=True)
        with pytest.raises(TurnQueueError, match="closed"):
            blocked.result(PATIENCE)
        until(lambda: all(one.cancelled() for one in turns))
        streamer.go_on.set()
        closing.result(PATIENCE)
    assert running.cancelled()
    assert len(running.pieces) in next_token(streamer)
    assert len(store.tokens("a")) == 19 + len(running.pieces)


def test_an_error_in_the_block_of_a_queue_cancels_its_turns(store: Recording) -> None:
    turns: list[Turn[Any]] = []

    def leaves() -> None:
        with TurnQueue(make_model(), store) as queue:
            turns.extend(queue.submit(name, tokens(20), **LONG) for name in "abc")
            raise LookupError

    with pytest.raises(LookupError):
        leaves()
    assert all(one.done() for one in turns)
    assert turns[-1].cancelled()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, whatever server an earlier test has left in charge of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_close_cancels_and_leaves_nothing_hanging(store: Recording, interruptible: None) -> None:
    queue = TurnQueue(make_model(), store)
    streamer = Held(4)
    turns = [queue.submit("a", tokens(20), streamer=streamer, **LONG), queue.submit("b", tokens(20), **GREEDY)]
    assert streamer.reached.wait(PATIENCE)

    def interrupt() -> None:
        until(lambda: queue._closing)
        os.kill(os.getpid(), signal.SIGINT)
        until(turns[1].cancelled)
        streamer.go_on.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        queue.close()
    thread.join()
    assert all(one.cancelled() for one in turns)
    assert len(turns[0].pieces) in next_token(streamer)


def test_a_turn_may_close_its_queue(store: Recording) -> None:
    queue = TurnQueue(make_model(), store)
    gate = Gate(queue)
    closes, after = queue.run("a", lambda _: queue.close(cancel=True)), queue.run("b", lambda _: None)
    gate.go_on.set()
    assert wait([closes, after], PATIENCE).not_done == set()
    queue.close()
    assert (closes.state, after.state) == ("cancelled", "cancelled")


def test_turns_of_a_closed_store_fail_and_the_queue_goes_on(tmp_path: Path) -> None:
    store = Recording(tmp_path / "store", block_size=BLOCK)
    with TurnQueue(make_model(), store) as queue:
        store.close()
        for _ in range(2):
            with pytest.raises(StoreClosedError):
                queue.submit("a", tokens(20), **GREEDY).result(PATIENCE)


def test_a_process_that_just_ends_keeps_what_was_complete(tmp_path: Path) -> None:
    script = """
import sys
from support.tiny_models import make_model, tokens
from hf_attnstore import AttentionStore, TurnQueue
queue = TurnQueue(make_model(), AttentionStore(sys.argv[1], block_size=16))
running = queue.submit("alice", tokens(40), max_new_tokens=400, do_sample=False)
waiting = queue.submit("bob", tokens(40), max_new_tokens=400, do_sample=False)
waiting.add_done_callback(lambda turn: print(turn.state))
print(next(running.stream(cancel=False)) > 0)
"""
    done = fresh.run([sys.executable, "-c", script, tmp_path / "store"], check=True)
    assert done.stdout.split() == ["True", "cancelled"]
    with AttentionStore(tmp_path / "store", block_size=BLOCK) as store:
        assert [session.name for session in store.sessions()] == ["alice"]
        assert 40 <= len(store.tokens("alice")) < 439


# races


@pytest.mark.parametrize("seed", range(3))
def test_submitting_and_cancelling_from_many_threads_resolves_every_turn(seed: int, store: Recording) -> None:
    model, plain = make_model(), make_model()
    prompts = {name: tokens(24, seed=ord(name)) for name in "abcdef"}
    whole = {name: turn(plain, prompt, None, max_new_tokens=30).sequences for name, prompt in prompts.items()}
    everything: list[Turn[Any]] = []
    called: list[Any] = []
    running: list[str] = []
    began: dict[str, list[int]] = {name: [] for name in prompts}

    def one_at_a_time(number: int, name: str, turn: Turn[Any]) -> str:
        running.append(name)
        began[name].append(number)
        turn.put(name)
        assert running == [name]
        running.remove(name)
        if number % 5 == 0:
            raise LookupError(name)
        return name

    def user(thread: int) -> None:
        chooses = random.Random(100 * seed + thread)
        mine = "abcdef"[thread % 6]  # two threads share a session
        for number in range(8):
            name = chooses.choice([mine, *prompts])
            more = {"priority": chooses.choice([0, 0, 1, 5]), "wait": chooses.choice([0, 0.01, PATIENCE])}
            if chooses.random() < 0.15:
                more["timeout"] = chooses.choice([0.001, 0.02])
            try:
                if chooses.random() < 0.5:
                    ids, new = prompts[name], chooses.choice([1, 8, 30])
                    given = queue.submit(name, ids, max_new_tokens=new, do_sample=False, **more)
                else:
                    work = lambda turn, number=number, name=name: one_at_a_time(number, name, turn)  # noqa: E731
                    given = queue.run(name, work, **more)
            except (QueueFullError, TurnQueueError):
                continue
            given.add_done_callback(called.append)
            everything.append(given)
            action = chooses.random()
            if action < 0.2:
                given.cancel()
            elif action < 0.4:
                stream = given.stream()
                if chooses.random() < 0.5:
                    with contextlib.suppress(LookupError, TurnTimeoutError):
                        next(stream, None)
                del stream
            elif action < 0.6:
                wait([given], chooses.choice([0, 0.05]))
                given.cancel()

    queue = TurnQueue(model, store, max_waiting=6, patience=0.01)
    with ThreadPoolExecutor(8) as pool:
        users = [pool.submit(user, thread) for thread in range(8)]
        if seed == 2:  # closed in the middle of it all
            until(lambda: queue.stats().done >= 5)
            queue.close(cancel=True)
        for one in users:
            one.result(PATIENCE)
    queue.close()
    assert wait(everything, PATIENCE).not_done == set()
    until(lambda: len(called) == len(everything))
    assert set(map(id, called)) == set(map(id, everything))
    stats = queue.stats()
    assert stats.submitted == len(everything)
    assert stats.submitted == stats.done + stats.failed + stats.cancelled + stats.timed_out
    assert (stats.waiting, stats.running) == (0, 0)
    for given in everything:
        assert given.session is not None
        if given.state == "done" and not isinstance(given.result(), str):
            sequence = given.result()
            assert torch.equal(sequence, whole[given.session][:, : sequence.shape[1]])
        elif given.state == "done":
            assert given.result() == given.session
        elif given.state == "failed":
            assert isinstance(given.exception(), (LookupError, TurnTimeoutError))
        if given.pieces and isinstance(given.pieces[0], int):  # also of those that were stopped
            assert given.pieces == whole[given.session][0, 24 : 24 + len(given.pieces)].tolist()
    assert sum(one.state == "done" for one in everything) == stats.done > 0
    assert store.told[-1:] in ([], [[]])
    store.flush()
    for name in prompts:
        if name in {session.name for session in store.sessions()}:
            held = store.tokens(name)
            assert held == whole[name][0, : len(held)].tolist()
            store.lock_session(name, wait=0).release()


def test_turns_of_one_session_begin_in_the_order_in_which_they_were_submitted(store: Recording) -> None:
    began: dict[str, list[int]] = {name: [] for name in "abcd"}

    def user(name: str) -> None:
        chooses = random.Random(name)
        for number in range(30):
            queue.run(
                name,
                lambda _, number=number: began[name].append(number),
                priority=chooses.randint(0, 5),
                wait=PATIENCE,
            )

    with TurnQueue(make_model(), store, max_waiting=10) as queue, ThreadPoolExecutor(4) as pool:
        list(pool.map(user, "abcd"))
    assert began == {name: list(range(30)) for name in "abcd"}
