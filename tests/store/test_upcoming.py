"""What a store does for sessions that run next: fetching, keeping, and forgetting about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.store_blocks import FINGERPRINT, load, make_chain, same, save

from hf_attnstore import AttentionStore
from hf_attnstore.errors import AttentionStoreError, SessionNameError, StoreClosedError
from hf_attnstore.store.blocks.block import Block
from hf_attnstore.store.eviction.policies import POLICIES

SIZE = 256
CHAIN = 4 * SIZE
"""Tokens of a session: four blocks."""


def chain_of(number: int, tokens: int = CHAIN) -> list[Block]:
    return make_chain(list(range(number * 10_000, number * 10_000 + tokens)), SIZE)


def nbytes(chain: list[Block]) -> int:
    return sum(block.nbytes for block in chain)


ONE = nbytes(chain_of(0))
TWO = int(2.3 * ONE)
"""Memory for two sessions: what a session takes is measured on disk, where it is a little more."""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def filled(path: Path, sessions: int, memory: int, **settings: object) -> AttentionStore:
    """A store with sessions "0", "1", … on disk, and nothing in memory."""
    store = AttentionStore(path, block_size=SIZE, memory=memory, **settings)  # type: ignore[arg-type]
    for number in range(sessions):
        save(store, chain_of(number), str(number))
    store.drop_memory()
    return store


def in_memory(store: AttentionStore, name: str) -> int:
    return store.residence(name)["memory"]


def test_what_runs_next_is_fetched_as_far_as_memory_goes(tmp_path: Path) -> None:
    with filled(tmp_path, 6, memory=TWO) as store:
        assert all(store.residence(str(n)) == {"memory": 0, "disk": store.session(str(n)).bytes} for n in range(6))
        store.schedule(["3", "1", "4"])
        wait_for(lambda: in_memory(store, "3") == ONE and in_memory(store, "1") == ONE)
        assert in_memory(store, "4") == 0
        wait_for(lambda: store.stats()["fetched_bytes"] == 2 * ONE)  # counted when it is there
        chain = chain_of(3)
        assert same(chain, load(store, chain))
        store.schedule(["1", "4"])
        wait_for(lambda: in_memory(store, "4") == ONE)
        assert in_memory(store, "1") == ONE
        assert in_memory(store, "3") < ONE / 2, "what has run makes room"
        assert store.stats()["memory_bytes"] <= TWO


def test_what_waits_to_be_written_does_not_keep_upcoming_turns_out_of_memory(tmp_path: Path) -> None:
    """Writing stands back while somebody computes; where turns follow one another, that is always."""
    with filled(tmp_path, 1, memory=TWO) as store:
        store._right_of_way.take("a turn")
        for number in (1, 2):
            for block in chain_of(number):
                assert store.reserve(block.nbytes)
                store.put(block)
        assert store.stats()["memory_bytes"] > TWO - ONE, "no room for a third"
        store.schedule(["0"])
        wait_for(lambda: in_memory(store, "0") == ONE)
        store._right_of_way.give("a turn")
        store.flush()
        assert store.stats()["memory_bytes"] <= TWO


def test_a_full_disk_refuses_what_is_worth_less_until_somebody_says_what_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with filled(tmp_path, 8, memory=10 * ONE, disk=1_200_000) as store:
        there = [name for name in map(str, range(8)) if store.residence(name)["disk"]]
        assert 0 < len(there) < 8
        evicted = store.stats()["evicted_blocks"]
        assert evicted > 0
        monkeypatch.setattr(store._order.policy, "admits", lambda newcomer, victim, now: False)
        for number in range(8, 12):  # what room is left takes in a part of the first ones
            save(store, chain_of(number), str(number))
        store.flush()
        chain = chain_of(11)
        assert same(chain, load(store, chain)), "memory has it"
        store.drop_memory()
        assert not store.has(chain[0].meta.key)
        assert store.stats()["not_admitted_blocks"] >= len(chain)
        assert store.stats()["evicted_blocks"] == evicted
        assert all(store.residence(name)["disk"] for name in there)
        assert not caplog.records
        store.schedule(there[-1:])
        wait_for(lambda: in_memory(store, there[-1]) > 0)
        save(store, chain_of(12), "12")
        store.flush()
        assert store.has(chain_of(12)[-1].meta.key)
        assert store.residence(there[-1])["disk"] > 0
        assert store.stats()["evicted_blocks"] > evicted


def test_a_turn_that_was_saved_leaves_the_list(tmp_path: Path) -> None:
    with filled(tmp_path, 3, memory=10 * ONE) as store:
        store.schedule(["0", "1", "0"])
        store.expect("2")
        assert store.upcoming == ["0", "1", "0", "2"]
        save(store, chain_of(0), "0")
        assert store.upcoming == ["1", "0", "2"]
        save(store, chain_of(2), "2")
        assert store.upcoming == ["1", "0"]


def test_who_is_expected_is_fetched_after_who_is_scheduled(tmp_path: Path) -> None:
    with filled(tmp_path, 4, memory=TWO) as store:
        store.expect("2", within=50)
        store.expect("1", within=20)
        assert store.upcoming == ["1", "2"]
        wait_for(lambda: in_memory(store, "1") == ONE and in_memory(store, "2") == ONE)
        store.schedule(["3"])
        wait_for(lambda: in_memory(store, "3") == ONE)
        assert in_memory(store, "1") == ONE
        assert in_memory(store, "2") < ONE / 2, "the one that is expected last"
        store.expect("1", within=0)
        assert store.upcoming == ["3", "2"]
        store.expect("1", within=0)


def test_an_expectation_ends_by_itself(tmp_path: Path) -> None:
    with filled(tmp_path, 1, memory=ONE) as store:
        store.expect("0", within=0.05)
        wait_for(lambda: not store.upcoming)


def test_a_session_that_is_not_there_is_expected_in_vain(tmp_path: Path) -> None:
    with filled(tmp_path, 1, memory=10 * ONE) as store:
        store.schedule(["nobody", "0"])
        wait_for(lambda: in_memory(store, "0") == ONE)
        with pytest.raises(SessionNameError):
            store.schedule([""])
        with pytest.raises(SessionNameError):
            store.expect("x" * 5000)
    for use in (lambda: store.schedule(["0"]), lambda: store.expect("0")):
        with pytest.raises(StoreClosedError):
            use()


def test_what_is_scheduled_is_not_dropped_from_disk(tmp_path: Path) -> None:
    """As many more sessions as the disk holds: those that are scheduled are all that stays of the old ones."""
    with AttentionStore(tmp_path / "sizes", block_size=SIZE, memory=ONE) as store:
        save(store, chain_of(0), "0")
        per_session = store.session("0").bytes
    cap = 12 * per_session + (400 << 10)
    with filled(tmp_path / "store", 10, memory=TWO, disk=cap, policy="lru") as store:
        store.schedule(["2", "5"])
        wait_for(lambda: in_memory(store, "5") == ONE)
        for number in range(10, 40):
            save(store, chain_of(number), str(number))
        store.flush()
        assert store.stats()["disk_bytes"] <= cap
        assert store.stats()["evicted_blocks"] > 0
        whole = {info.name for info in store.sessions() if info.bytes == per_session}
        assert {"2", "5"} <= whole
        assert not {"0", "1", "3", "4"} & whole
        store.drop_memory()
        assert same(chain_of(2), load(store, chain_of(2)))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_full_disk_under_every_policy(tmp_path: Path, policy: str) -> None:
    cap = 1_600_000
    with AttentionStore(tmp_path, block_size=SIZE, memory=2 * ONE, disk=cap, policy=policy) as store:
        for number in range(60):
            chain = chain_of(number)
            save(store, chain, str(number))
            store.used([block.meta.key for block in chain], CHAIN, short=False)
            if number % 3 == 0:
                store.flush()
                assert store.stats()["disk_bytes"] <= cap
        store.flush()
        assert store.stats()["evicted_blocks"] > 0
        assert not store.verify().problems
        left = [info for info in store.sessions() if info.tokens]
        assert left
        for info in left:  # whatever is left is a beginning
            store.drop_memory()
            chain = chain_of(int(info.name), info.tokens)
            assert same(chain, load(store, chain))
    with AttentionStore(tmp_path, disk=cap, memory=2 * ONE, policy="lru") as store:  # groups of another policy
        for number in range(60, 80):
            save(store, chain_of(number), str(number))
        store.flush()
        assert store.stats()["disk_bytes"] <= cap
        assert store.session("79").bytes > 0


def test_what_the_policy_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    with AttentionStore(tmp_path, block_size=SIZE, policy="predictive") as store:
        for number in range(20):
            chain = chain_of(number)
            save(store, chain, str(number))
            store.used([block.meta.key for block in chain], CHAIN, short=False)
        store.flush()
        known = store._order.policy.learned()
        assert sum(map(sum, known["waited"])) > 0
    for _ in range(2):  # and once more, after a process that only looked
        with AttentionStore(tmp_path, policy="predictive") as store:
            again = store._order.policy._returns.learned()
            assert again["waited"] == known["waited"]


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttentionStoreError, match="predictive"):
        AttentionStore(tmp_path, policy="belady")
    assert not list(tmp_path.glob("blocks/*"))


@settings(max_examples=8, deadline=None)
@given(plan=st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=5, max_size=12))
def test_races_of_schedule_expect_and_saving(tmp_path_factory: pytest.TempPathFactory, plan: list[list[int]]) -> None:
    """Whatever is said meanwhile by others, everything saved is there, and no cap is exceeded."""
    path = tmp_path_factory.mktemp("store")
    with filled(path, 6, memory=3 * ONE) as store:
        stop = threading.Event()
        errors: list[BaseException] = []

        def say() -> None:
            try:
                while not stop.is_set():
                    for upcoming in plan:
                        store.schedule([str(n) for n in upcoming])
                        for n in upcoming[:2]:
                            store.expect(str(n), within=0.01 * n)
                        assert store.stats()["memory_bytes"] <= 3 * ONE
            except BaseException as error:
                errors.append(error)

        talker = threading.Thread(target=say)
        talker.start()
        try:
            for turn in range(1, 4):
                for number in range(6):
                    chain = chain_of(number, CHAIN + turn * SIZE)
                    save(store, chain, str(number))
                    store.used([b.meta.key for b in chain], CHAIN + turn * SIZE, short=False)
                    assert same(chain, load(store, chain))
        finally:
            stop.set()
            talker.join()
        assert not errors
        store.delete("0")
        store.schedule(["0", "1"])
        store.flush()
        assert [info.fingerprint for info in store.sessions()] == [FINGERPRINT] * 5
        assert not store.verify().problems
