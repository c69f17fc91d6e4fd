"""`memory="auto"`: the rule by itself, and a tier that follows it while others take memory and give it back."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.store_blocks import load, make_chain, save

from hf_attnstore import AttentionStore
from hf_attnstore.errors import AttentionStoreError
from hf_attnstore.store.eviction.policies import LRU
from hf_attnstore.store.memory import size as memory_size
from hf_attnstore.store.memory.size import AutomaticSize, FreeMemory, free_memory, next_capacity
from hf_attnstore.store.memory.tier import MemoryTier

MIB, GIB = 1 << 20, 1 << 30

sizes = st.integers(0, 1 << 44)


# the rule


@given(total=sizes, available=sizes, used=sizes, current=st.none() | sizes)
def test_a_capacity_is_never_negative_nor_more_than_half_of_all_memory(
    total: int, available: int, used: int, current: int | None
) -> None:
    free = FreeMemory(total, min(available, total))
    assert 0 <= next_capacity(free, used, current) <= total // 2


@given(total=sizes, available=sizes, used=sizes, current=st.none() | sizes)
def test_what_does_not_change_changes_nothing(total: int, available: int, used: int, current: int | None) -> None:
    free = FreeMemory(total, min(available, total))
    once = next_capacity(free, used, current)
    assert next_capacity(free, used, once) == once


@given(total=sizes, used=sizes, current=sizes, a=sizes, b=sizes)
def test_less_free_memory_is_never_a_larger_capacity(total: int, used: int, current: int, a: int, b: int) -> None:
    low, high = sorted((min(a, total), min(b, total)))
    assert next_capacity(FreeMemory(total, low), used, current) <= next_capacity(FreeMemory(total, high), used, current)


@given(total=st.integers(GIB, 1 << 44), available=sizes, used=sizes, current=sizes)
def test_after_the_tier_has_shrunk_there_is_memory_free(total: int, available: int, used: int, current: int) -> None:
    used = min(used, total)
    available = min(available, total - used)
    capacity = next_capacity(FreeMemory(total, available), used, current)
    if capacity:
        freed = max(used - capacity, 0)
        grown = max(capacity - used, 0)
        assert available + freed - grown >= min(total // 10, 4 * GIB) * 0.99


def test_a_little_more_or_less_does_not_move_it_to_and_fro() -> None:
    capacity = next_capacity(FreeMemory(64 * GIB, 30 * GIB), 0)
    assert capacity == 24 * GIB  # 4 GiB stay free, and half as much again, before it grows
    seen = {capacity}
    for wobble in (-1, 1, -1, 0.5, -0.5, 1):
        capacity = next_capacity(FreeMemory(64 * GIB, int((30 + wobble) * GIB) - capacity), capacity, capacity)
        seen.add(capacity)
    assert len(seen) == 2  # it grows once, and stays


# what is free


def test_free_memory_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=40))
    monkeypatch.setattr(memory_size, "_of_the_group", list)
    assert free_memory() == FreeMemory(100, 40)
    monkeypatch.setattr(memory_size, "_of_the_group", lambda: [FreeMemory(70, 50), FreeMemory(90, 30)])
    assert free_memory() == FreeMemory(70, 30)


def _group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


STAT = "anon 1\ninactive_file 30\nactive_file 40\ntotal_inactive_file 30\ntotal_active_file 40\n"


def test_limits_of_control_groups_count_at_every_level(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    membership = tmp_path / "self"
    membership.write_text("0::/outer/inner\n")
    _group(root, {"cgroup.procs": ""})
    _group(root / "outer", {"memory.max": "1000", "memory.current": "600", "memory.stat": STAT})
    _group(root / "outer/inner", {"memory.max": "max", "memory.current": "100", "memory.stat": STAT})
    assert memory_size._of_the_group(root, membership) == [FreeMemory(1000, 450)]  # half of what files use counts


def test_limits_of_old_control_groups_count(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("5:cpu:/elsewhere\n4:cpuset,memory:/docker/abc\n0::/\n")
    # a container sees its own group as the root
    limits = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "600", "memory.stat": STAT}
    _group(root / "memory", limits)
    assert memory_size._of_the_group(root, membership) == [FreeMemory(1000, 450)]
    (root / "memory/memory.limit_in_bytes").write_text("9223372036854771712")
    assert memory_size._of_the_group(root, membership) == []


@pytest.mark.parametrize("text", ["", "nonsense\n", "1:2\n"])
def test_control_groups_that_nobody_understands_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "self").write_text(text)
    assert memory_size._of_the_group(tmp_path, tmp_path / "self") == []
    assert memory_size._of_the_group(tmp_path, tmp_path / "missing") == []


# a tier that follows


class Machine:
    """A machine of 8 GiB, of which others take some and the tier the rest."""

    def __init__(self) -> None:
        self.others = 0
        self.tier: MemoryTier | None = None
        self.silent = False

    def ask(self) -> FreeMemory | None:
        if self.silent:
            return None
        used = self.tier.used if self.tier is not None else 0
        return FreeMemory(8 * MIB, max(8 * MIB - self.others - used, 0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(memory_size, "free_memory", machine.ask)
    monkeypatch.setattr(memory_size, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(memory_size, "_RESERVE_SECONDS", 0.0)
    return machine


def assert_set(event: threading.Event) -> None:
    assert event.wait(30)


def _opened(path: Path, machine: Machine, **settings: Any) -> AttentionStore:
    store = AttentionStore(path, memory="auto", block_size=16, **settings)
    machine.tier = store._memory
    return store


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_tier_shrinks_under_pressure_and_grows_back(tmp_path: Path, machine: Machine) -> None:
    with _opened(tmp_path / "store", machine) as store:
        first = store.stats()["memory_capacity"]
        assert first == 4 * MIB
        chains = [make_chain(list(range(number, number + 160)), 16) for number in range(0, 3000, 200)]
        for number, chain in enumerate(chains):
            save(store, chain, f"s{number}")
        store.flush()
        held = store.stats()["memory_bytes"]
        assert held > 100_000
        machine.others = 8 * MIB - 2 * MIB - held // 2  # 2 MiB are to stay free
        _until(lambda: store.stats()["memory_capacity"] < held)
        for _ in range(50):
            stats = store.stats()
            assert stats["memory_bytes"] <= stats["memory_capacity"] < first
            time.sleep(0.001)
        assert store.stats()["memory_blocks"] > 0
        assert store.stats()["evicted_from_memory"] > 0
        machine.others = 0
        _until(lambda: store.stats()["memory_capacity"] == first)
        load(store, chains[0])  # nothing was lost: it is on disk
        load(store, chains[-1])


def test_dirty_blocks_stay_until_they_are_written(tmp_path: Path, machine: Machine) -> None:
    with _opened(tmp_path / "store", machine) as store:
        go_on = threading.Event()
        store._writer.submit(lambda: assert_set(go_on))
        chain = make_chain(list(range(320)), 16)
        save(store, chain, "alice")
        machine.others = 8 * MIB
        _until(lambda: store.stats()["memory_capacity"] == 0)
        assert store.stats()["memory_blocks"] == len(chain)  # they are nowhere else
        assert not store.reserve(1)
        go_on.set()
        store.flush()
        assert store.stats()["memory_bytes"] == 0  # the cap as it is now holds as soon as it can
        assert store.tokens("alice") == list(range(320))


def test_pressure_is_seen_before_memory_is_reserved(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_size, "_TICK_SECONDS", 3600.0)
    with _opened(tmp_path / "store", machine) as store:
        machine.others = 8 * MIB
        assert not store.reserve(1000)
        machine.others = 0
        assert store.reserve(1000)
        store.release(1000)


def test_a_moment_in_which_nobody_can_say_changes_nothing(tmp_path: Path, machine: Machine) -> None:
    with _opened(tmp_path / "store", machine) as store:
        before = store.stats()["memory_capacity"]
        machine.silent = True
        store._automatic.check()
        assert store.stats()["memory_capacity"] == before


def test_where_psutil_can_say_nothing_a_fixed_size_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise NotImplementedError("no such system")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    monkeypatch.setattr(memory_size, "_of_the_group", list)
    with AttentionStore(tmp_path / "store", memory="auto") as store:
        assert store.stats()["memory_capacity"] == memory_size.WITHOUT_KNOWLEDGE
    assert "nobody can say how much memory is free" in log.text


def test_memory_that_only_waits_for_its_next_use_is_given_back(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    relieved = threading.Event()
    monkeypatch.setattr(memory_size, "_pressure", [relieved.set])
    with _opened(tmp_path / "store", machine) as store:
        assert not relieved.is_set()
        machine.others = 8 * MIB
        assert relieved.wait(30)
        assert store.stats()["memory_capacity"] == 0


def test_the_thread_ends_with_the_store(tmp_path: Path, machine: Machine) -> None:
    def watching() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "attnstore-memory"]

    with _opened(tmp_path / "store", machine):
        assert len(watching()) == 1
    assert watching() == []
    size = AutomaticSize(MemoryTier(0, LRU()))
    gone = weakref.ref(size)
    del size  # nobody closed it
    _until(lambda: gc.collect() >= 0 and gone() is None and not watching())


def test_other_words_are_no_size(tmp_path: Path) -> None:
    with pytest.raises(AttentionStoreError, match="not a size"):
        AttentionStore(tmp_path / "store", memory="automatic")


def test_real_numbers_of_this_machine_make_sense(tmp_path: Path) -> None:
    free = free_memory()
    assert free is not None
    assert 0 < free.available <= free.total
    with AttentionStore(tmp_path / "store", memory="auto") as store:
        assert 0 <= store.stats()["memory_capacity"] <= free.total // 2
