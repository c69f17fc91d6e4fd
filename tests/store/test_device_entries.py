"""The accounts of the device tier: a cap that holds, least recently used first, and nothing given out twice."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hf_attnstore.store.memory.device_tier import DeviceEntry, DeviceTier, Owner


def test_what_comes_last_or_not_at_all_goes_first() -> None:
    tier, owner = DeviceTier(30), Owner()
    a, b, c = (tier.park(owner, name, 10, name) for name in "abc")
    tier.expect([("", "c"), ("", "a"), ("", "c"), ("", "d"), ("", "b")])
    for name in ("e", None):
        assert tier.park(owner, name, 10, name) is None, "all that is there is needed, and this is not"
    assert tier.evicted == 0
    d = tier.park(owner, "d", 10, "d")
    assert [each and each.state for each in (a, b, c, d)] == ["parked", "dropped", "parked", "parked"]
    assert tier.park(owner, "b", 10, "b") is None, "it comes after all others"
    assert tier.park(owner, "a", 20, "a") is not None, "it needs more room now: d goes, c comes sooner"
    assert [each and each.state for each in (a, c, d)] == ["dropped", "parked", "dropped"]
    tier.expect([])
    assert tier.park(owner, "e", 10, "e") is not None
    assert c is not None
    assert c.state == "dropped", "least recently used where nothing comes"
    tier.expect([("other", "e")])
    assert tier.park(owner, "f", 30, "f") is not None, "a session of that name elsewhere is another one"


NAMES = st.sampled_from(["a", "b", "c", None])


class Accounts(RuleBasedStateMachine):
    """A tier of 100 bytes against a list that does the same by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = DeviceTier(100)
        self.owners = [Owner(), Owner()]
        self.held: list[DeviceEntry] = []
        """Least recently used first."""
        self.dropped: list[int] = []
        self.parked = 0

    def _here(self, entry: DeviceEntry) -> bool:
        return entry.state == "parked"

    @rule(owner=st.integers(0, 1), name=NAMES, size=st.integers(0, 120))
    def park(self, owner: int, name: str | None, size: int) -> None:
        number, self.parked = self.parked, self.parked + 1
        before = [e for e in self.held if name is None or (e.owner, e.session) != (self.owners[owner].number, name)]
        entry = self.tier.park(self.owners[owner], name, size, number, lambda: self.dropped.append(number))
        self.held = before
        if not 0 < size <= 100:
            assert entry is None
            assert all(map(self._here, before))
            return
        assert entry is not None
        while sum(e.nbytes for e in self.held) + size > 100:
            assert not self._here(self.held.pop(0))
        self.held.append(entry)

    @rule(which=st.integers(0, 9))
    def take(self, which: int) -> None:
        if self.held:
            entry = self.held.pop(which % len(self.held))
            assert self.tier.take(entry) is not None
            assert self.tier.take(entry) is None
            assert entry.state == "taken"

    @rule(name=st.sampled_from("abc"))
    def forget(self, name: str) -> None:
        self.tier.forget(name)
        self.held = [entry for entry in self.held if entry.session != name]

    @rule(source=st.sampled_from("abc"))
    def rename(self, source: str) -> None:
        if not any(entry.session == "d" for entry in self.held):
            before = sum(entry.session == source for entry in self.held)
            self.tier.rename(source, "d")
            assert [entry.session for entry in self.held].count("d") == before
            assert not any(entry.session == source for entry in self.held)

    @rule(owner=st.integers(0, 1))
    def let_go(self, owner: int) -> None:
        self.held = [entry for entry in self.held if entry.owner != self.owners[owner].number]
        self.owners[owner].drop()

    @invariant()
    def accounts_are_right(self) -> None:
        assert all(map(self._here, self.held))
        assert len(self.tier) == len(self.held)
        assert self.tier.used == sum(entry.nbytes for entry in self.held) <= 100
        assert len(self.dropped) == len(set(self.dropped))  # each of them once


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_an_owner_that_is_gone_leaves_nothing() -> None:
    tier, told = DeviceTier(100), []
    owner, other = Owner(), Owner()
    tier.park(owner, "a", 10, "content", lambda: told.append("dropped"))
    tier.park(other, "a", 10, "content")
    del owner
    gc.collect()
    assert (len(tier), tier.used, told) == (1, 10, ["dropped"])


def test_closed_it_takes_nothing_in() -> None:
    tier, owner = DeviceTier(100), Owner()
    tier.park(owner, "a", 10, "content")
    tier.close()
    assert tier.park(owner, "a", 10, "content") is None
    assert (len(tier), tier.used) == (0, 0)


def test_of_several_threads_one_gets_an_entry() -> None:
    tier, owner = DeviceTier(10_000), Owner()
    entries = [tier.park(owner, None, 10, number) for number in range(500)]

    def take(_: int) -> list[int]:
        return [found for entry in entries if entry is not None and (found := tier.take(entry)) is not None]

    with ThreadPoolExecutor(4) as pool:
        taken = [number for found in pool.map(take, range(4)) for number in found]
    assert sorted(taken) == list(range(500))
    assert (len(tier), tier.used) == (0, 0)
