"""Sessions over machines: two stores in different folders, with one engine that both know."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Timer

import pytest
from support.engines import Valkey, empty_server
from support.store_blocks import make_chain, save

from hf_attnstore.errors import AttentionStoreError, SessionBusyError, SessionNotFoundError
from hf_attnstore.store import AttentionStore
from hf_attnstore.store.disk.surroundings import Clock, Surroundings
from hf_attnstore.store.shared import leases
from hf_attnstore.store.shared.engine import Engine, EngineError, Put
from hf_attnstore.store.shared.valkey import ValkeyEngine


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """Of a server with nothing in it; a parameter is the fixture that has it."""
    return empty_server(request)


@pytest.fixture
def machines(tmp_path: Path, url: str) -> Iterator[tuple[AttentionStore, AttentionStore]]:
    with machine(tmp_path / "one", url) as one, machine(tmp_path / "two", url) as two:
        yield one, two


@pytest.fixture(params=["has a clock", "has none"])
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that tells when a hold is over, and one on which others have to find out."""
    if request.param == "has none":
        for name in ("take", "renew"):
            monkeypatch.setattr(ValkeyEngine, name, getattr(Engine, name))


def machine(folder: Path, url: str, **settings: object) -> AttentionStore:
    return AttentionStore(folder, block_size=16, shared=url, **settings)  # type: ignore[arg-type]


def a_turn(store: AttentionStore, name: str, ids: list[int]) -> None:
    """A session is these ids from now on; everything has gone up when it returns."""
    lock = store.lock_session(name, wait=0)
    save(store, make_chain(ids, 16), name)
    lock.release()
    store.flush()


@pytest.mark.parametrize("disk", ["1GiB", 0])
def test_a_session_is_known_to_other_machines_with_all_that_belongs_to_it(
    disk: object, tmp_path: Path, url: str
) -> None:
    with machine(tmp_path / "one", url, disk=disk) as one, machine(tmp_path / "two", url, disk=disk) as two:
        a_turn(one, "alice", list(range(40)))
        one.set_metadata("alice", {"title": "a walk"})
        one.flush()
        assert [info.name for info in two.sessions()] == ["alice"]
        assert two.metadata("alice") == {"title": "a walk"}
        assert two.manifest("alice").spans == one.manifest("alice").spans
        assert two.tokens("alice") == list(range(40))
        assert two.session_fingerprint("alice") == one.session_fingerprint("alice")
        a_turn(two, "alice", list(range(60)))
        assert one.tokens("alice") == list(range(60))
        assert one.metadata("alice") == {"title": "a walk"}


@pytest.mark.parametrize("url", ["server", "seaweed"], indirect=True)
def test_a_session_is_forked_renamed_and_deleted_from_any_machine(
    machines: tuple[AttentionStore, AttentionStore],
) -> None:
    one, two = machines
    a_turn(one, "alice", list(range(40)))
    two.fork("alice", "bob")
    two.flush()
    with pytest.raises(AttentionStoreError, match="exists already"):
        one.fork("alice", "bob")
    one.rename("bob", "carol")
    one.flush()
    assert {info.name for info in two.sessions()} == {"alice", "carol"}
    assert two.tokens("carol") == list(range(40))
    two.delete("alice")
    two.flush()
    assert [info.name for info in one.sessions()] == ["carol"]
    with pytest.raises(SessionNotFoundError):
        one.manifest("alice")
    a_turn(one, "alice", list(range(5)))  # the name may be used again
    assert two.tokens("alice") == list(range(5))


@pytest.mark.usefixtures("clock")
def test_a_session_in_the_middle_of_a_turn_on_another_machine_is_waited_for(
    machines: tuple[AttentionStore, AttentionStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_GRACE", 0.01)
    one, two = machines
    lock = one.lock_session("alice", wait=0)
    for change in (partial(two.lock_session, wait=0), two.delete, partial(two.rename, dst="bob")):
        with pytest.raises(SessionBusyError, match="on another machine"):
            change("alice")
    save(one, make_chain(list(range(40)), 16), "alice")
    ending = Timer(0.2, lock.release)
    ending.start()
    two.lock_session("alice", wait=60).release()  # and until what the turn made is there
    assert two.tokens("alice") == list(range(40))
    ending.join()


def test_a_turn_that_gives_way_is_overtaken_at_once(
    machines: tuple[AttentionStore, AttentionStore], log: pytest.LogCaptureFixture
) -> None:
    one, two = machines
    in_the_background = one.lock_session("alice", wait=0)
    one.give_way("alice")
    a_turn(two, "alice", list(range(40)))
    save(one, make_chain(list(range(20)), 16), "alice")
    in_the_background.release()
    one.flush()
    assert [store.tokens("alice") for store in machines] == [list(range(40))] * 2
    assert not log.records


def test_no_clock_says_which_of_two_states_of_a_session_is_the_newer(tmp_path: Path, url: str) -> None:
    class Ahead(Clock):
        def time(self) -> float:
            return super().time() + 10_000

    for folder, ids, skew in (("one", 20, Ahead), ("two", 40, Clock), ("one", 60, Ahead), ("two", 80, Clock)):
        with machine(tmp_path / folder, url, surroundings=Surroundings(clock=skew())) as store:
            if ids > 20:
                assert store.tokens("alice") == list(range(ids - 20))
            a_turn(store, "alice", list(range(ids)))


@pytest.mark.usefixtures("clock")
def test_a_holder_that_was_taken_for_dead_cannot_commit(
    machines: tuple[AttentionStore, AttentionStore], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machines
    a_turn(one, "alice", list(range(32)))
    held = one._shared_sessions.leases
    monkeypatch.setattr(held, "_seconds", 0.05)
    monkeypatch.setattr(held, "_renew", lambda session: None)  # it is asleep
    late = one.lock_session("alice", wait=0)
    a_turn(two, "alice", [*range(32), *[2] * 16])
    monkeypatch.undo()
    save(one, make_chain([*range(32), *[1] * 16], 16), "alice")
    one.flush()
    late.release()
    assert len([record for record in log.records if "which keeps its name" in record.getMessage()]) == 1
    for store in machines:
        store.lock_session("alice", wait=0).release()
        assert store.tokens("alice") == [*range(32), *[2] * 16]
    keys = [block.meta.key for block in make_chain([*range(32), *[1] * 16], 16)]
    assert two.known(keys) == 3  # what it computed is found by its text


def test_a_record_is_not_published_before_all_of_its_blocks_are_there(
    machines: tuple[AttentionStore, AttentionStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machines
    a_turn(one, "alice", list(range(32)))
    chain = make_chain([*range(32), *range(90, 130)], 16)
    engine, failing = one._shared.engine, one._shared.value(chain[3].meta.key)
    put = engine.put

    def fails(name: str, *arguments: object) -> Put:
        if name == failing:
            raise EngineError("no")
        return put(name, *arguments)  # type: ignore[arg-type]

    for broken in (fails, lambda name, *rest: Put.FULL if name == failing else put(name, *rest)):
        monkeypatch.setattr(engine, "put", broken)
        a_turn(one, "alice", [*range(32), *range(90, 130)])
        wait_until(lambda: one._shared.breaker.well)
        assert two.tokens("alice") == list(range(32))
    monkeypatch.setattr(engine, "put", put)
    a_turn(one, "alice", [*range(32), *range(90, 130)])
    assert two.tokens("alice") == [*range(32), *range(90, 130)]
    assert two.known([block.meta.key for block in chain]) == len(chain)


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_another_machine_has_is_fetched_for_who_is_expected(
    machines: tuple[AttentionStore, AttentionStore],
) -> None:
    one, two = machines
    a_turn(one, "alice", list(range(64)))
    two.expect("alice")
    wait_until(lambda: two.stats()["fetched_blocks"] >= 4)
    assert two.residence("alice")["memory"] == sum(block.nbytes for block in make_chain(list(range(64)), 16))


def test_an_engine_that_does_not_compare_keeps_no_names(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    with machine(tmp_path / "one", url) as one, machine(tmp_path / "two", url) as two:
        for store in (one, two):
            monkeypatch.setattr(store._shared.engine, "replace", lambda *_: True)
        a_turn(one, "alice", list(range(40)))
        assert two.sessions() == []
        assert two.known([block.meta.key for block in make_chain(list(range(40)), 16)]) == 3
    assert len([record for record in log.records if "names of sessions are not" in record.getMessage()]) == 2


def test_an_engine_that_is_away_keeps_no_session_from_going_on(tmp_path: Path) -> None:
    server = Valkey(tmp_path)
    try:
        with machine(tmp_path / "one", server.patient_url) as one:
            a_turn(one, "alice", list(range(40)))
            server.kill()
            a_turn(one, "alice", list(range(50)))
            assert one.tokens("alice") == list(range(50))
        server.start()
        with machine(tmp_path / "one", server.patient_url) as one:
            a_turn(one, "alice", list(range(60)))
        with machine(tmp_path / "two", server.patient_url) as two:
            assert two.tokens("alice") == list(range(60))
    finally:
        server.kill()


def test_names_and_ids_of_an_encrypted_store_are_not_to_be_read(tmp_path: Path, url: str, server: Valkey) -> None:
    with machine(tmp_path / "one", url, encryption_key=b"k" * 32) as one:
        one.set_metadata("alice in clear", {"title": "words in clear"})
        one.flush()
        names = server.keys("attnstore:*")
        assert len(names) == 2
        for name in names:
            value = server.ask("GET" if ":s:" in name else "HGETALL", name)
            assert b"clear" not in value
    with machine(tmp_path / "two", url, encryption_key=b"k" * 32) as two:
        assert two.metadata("alice in clear") == {"title": "words in clear"}


@pytest.mark.parametrize(
    ("url", "turns"),
    [
        ("server", 40),
        ("seaweed", 12),
        pytest.param("server", 1000, marks=pytest.mark.slow),
        pytest.param("seaweed", 200, marks=pytest.mark.slow),
    ],
    indirect=["url"],
)
def test_no_turn_is_lost_and_none_mixed_where_sessions_move_at_random(
    turns: int, machines: tuple[AttentionStore, AttentionStore]
) -> None:
    chance = random.Random(turns)
    expected: dict[str, list[int]] = {}
    for _ in range(turns):
        store, name = chance.choice(machines), f"session {chance.randrange(16)}"
        ids = expected.get(name, [])
        expected[name] = (
            ids + [chance.randrange(100) for _ in range(chance.randrange(1, 30))] if len(ids) < 200 else [1]
        )
        a_turn(store, name, expected[name])
        other = machines[store is machines[0]]
        assert other.tokens(name) == expected[name]
    for store in machines:
        assert {info.name: store.tokens(info.name) for info in store.sessions()} == expected
