"""MIN against every possible choice, on cases that are small enough for that."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_sim_policies import requests

from hf_attnstore.lab.sim.optimum import optimum
from hf_attnstore.lab.sim.replay import Requests, replay
from hf_attnstore.store.eviction.policies import POLICIES

chains = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=7)


def brute_force(rows: Requests, capacity: int) -> int:
    """The most blocks that can be found, over all sets that can be held after every turn."""
    states: dict[frozenset[str], int] = {frozenset(): 0}
    for row in rows.rows:
        after: dict[frozenset[str], int] = {}
        for held, found in states.items():
            hits = next((n for n, key in enumerate(row.prompt) if key not in held), len(row.prompt))
            there = sorted(held | set(row.blocks))
            for size in range(min(capacity, len(there)) + 1):
                for kept in combinations(there, size):
                    if all(len(key) == 1 or key[:-1] in kept for key in kept):
                        state = frozenset(kept)
                        after[state] = max(after.get(state, 0), found + hits)
        states = after
    return max(states.values())


@settings(max_examples=60, deadline=None)
@given(chains, st.integers(1, 4))
def test_nothing_finds_more(texts: list[str], capacity: int) -> None:
    rows = requests(*texts)
    assert optimum(rows, capacity).found == brute_force(rows, capacity)


@settings(max_examples=60, deadline=None)
@given(chains, st.integers(1, 4))
def test_no_policy_finds_more_than_the_optimum(texts: list[str], capacity: int) -> None:
    rows = requests(*texts)
    best = optimum(rows, capacity).found
    for policy in POLICIES:
        assert replay(rows, capacity, policy).found <= best


def test_what_is_never_used_again_takes_no_room() -> None:
    assert optimum(requests("a", "b", "c", "d", "a"), 1).found == 1
