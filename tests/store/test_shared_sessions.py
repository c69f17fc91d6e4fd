"""Sessions over machines: two stores in different folders, with one engine that both know."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import Valkey
from support.store_blocks import make_chain, save

from hf_attnstore.errors import AttentionStoreError, SessionNotFoundError
from hf_attnstore.store import AttentionStore


@pytest.fixture
def url(server: Valkey) -> str:
    server.ask("FLUSHALL")
    return server.url + "?timeout=30&lookup=30"  # the machine may be busy


@pytest.fixture
def machines(tmp_path: Path, url: str) -> Iterator[tuple[AttentionStore, AttentionStore]]:
    with machine(tmp_path / "one", url) as one, machine(tmp_path / "two", url) as two:
        yield one, two


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


def test_of_two_machines_that_go_on_at_once_the_first_keeps_the_name_and_nothing_is_mixed(
    machines: tuple[AttentionStore, AttentionStore], log: pytest.LogCaptureFixture
) -> None:
    one, two = machines
    a_turn(one, "alice", list(range(32)))
    locks = [store.lock_session("alice", wait=0) for store in machines]
    for store, last in ((one, 1), (two, 2)):
        save(store, make_chain([*range(32), *[last] * 16], 16), "alice")
        store.flush()
    for lock in locks:
        lock.release()
    assert len([record for record in log.records if "which keeps its name" in record.getMessage()]) == 1
    for store in machines:
        store.lock_session("alice", wait=0).release()
        assert store.tokens("alice") == [*range(32), *[1] * 16]
    keys = [block.meta.key for block in make_chain([*range(32), *[2] * 16], 16)]
    assert one.known(keys) == 3  # what the other computed is found by its text


def test_what_another_machine_has_is_fetched_for_who_is_expected(
    machines: tuple[AttentionStore, AttentionStore],
) -> None:
    one, two = machines
    a_turn(one, "alice", list(range(64)))
    two.expect("alice")
    until = time.monotonic() + 60
    while two.stats()["fetched_blocks"] < 4:
        assert time.monotonic() < until
        time.sleep(0.01)
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
        with machine(tmp_path / "one", server.url) as one:
            a_turn(one, "alice", list(range(40)))
            server.kill()
            a_turn(one, "alice", list(range(50)))
            assert one.tokens("alice") == list(range(50))
        server.start()
        with machine(tmp_path / "one", server.url) as one:
            a_turn(one, "alice", list(range(60)))
        with machine(tmp_path / "two", server.url) as two:
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


@pytest.mark.parametrize("turns", [40, pytest.param(1000, marks=pytest.mark.slow)])
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
