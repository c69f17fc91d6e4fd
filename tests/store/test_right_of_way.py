"""Writing stands back while somebody computes, but never for long, and never while it is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from support.store_blocks import make_chain

from hf_attnstore import AttentionStore
from hf_attnstore.store.processes.threads import IOThreads, RightOfWay

LONG = 600.0


@pytest.fixture
def writer() -> Iterator[tuple[IOThreads, RightOfWay]]:
    right = RightOfWay(LONG)
    threads = IOThreads(1, "test", right)
    yield threads, right
    with right.hurry():
        threads.close()


def soon(event: threading.Event) -> bool:
    return event.wait(20)


def test_a_task_waits_until_nobody_computes(writer: tuple[IOThreads, RightOfWay]) -> None:
    threads, right = writer
    right.take("a")
    right.take("b")
    done = threading.Event()
    threads.submit(done.set)
    assert not done.wait(0.1)
    right.give("a")
    right.give("a")
    right.give("nobody")
    assert not done.wait(0.1)
    right.give("b")
    assert soon(done)


def test_who_waits_for_tasks_does_not_wait_for_those_who_compute(writer: tuple[IOThreads, RightOfWay]) -> None:
    threads, right = writer
    right.take("a")
    done = threading.Event()
    threads.submit(done.set)
    threads.drain()
    assert done.is_set()
    later = threading.Event()
    threads.submit(later.set)
    assert not later.wait(0.1)  # the hurry is over
    right.overrule()
    assert soon(later)


def test_nobody_holds_tasks_for_ever() -> None:
    right = RightOfWay(0.2)
    threads = IOThreads(1, "test", right)
    began = time.monotonic()
    right.take("one that never gives way")
    done = threading.Event()
    threads.submit(done.set)
    assert soon(done)
    assert time.monotonic() - began >= 0.1
    right.take("one that never gives way")  # what has run out may be taken again, by the next turn
    again = threading.Event()
    threads.submit(again.set)
    assert soon(again)
    threads.close()


def test_turns_that_follow_one_another_hold_nothing_for_longer_than_one() -> None:
    right = RightOfWay(0.3)
    threads = IOThreads(1, "test", right)
    over = threading.Event()

    def compute() -> None:
        for turn in range(10**6):
            right.take(turn)
            if over.wait(0.02):
                return
            right.give(turn)

    turns = threading.Thread(target=compute)
    right.take("the first")
    turns.start()
    done = [threading.Event() for _ in range(20)]
    for event in done:
        threads.submit(event.set)
    right.give("the first")
    assert all(soon(event) for event in done)
    over.set()
    turns.join()
    threads.close()


def test_blocks_are_written_after_the_turn_or_when_memory_is_short(store: AttentionStore) -> None:
    chain = make_chain(list(range(64)), 16)
    store.begin_computing("a turn")
    for block in chain[:2]:
        assert store.reserve(block.nbytes)
        store.put(block)
    time.sleep(0.1)
    assert store.stats()["disk_blocks"] == 0
    assert not store.reserve(store.stats()["memory_capacity"])  # does not fit: what waits has to go
    deadline = time.monotonic() + 20
    while store.stats()["disk_blocks"] < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.stats()["disk_blocks"] == 2
    store.begin_computing("another turn")
    assert store.reserve(chain[2].nbytes)
    store.put(chain[2])
    store.flush()
    assert store.stats()["disk_blocks"] == 3
    store.end_computing("another turn")
