"""Every policy on examples worked by hand, through the tiers of the simulator."""

import pytest

from hf_attnstore.lab.sim.plain import plain_fifo
from hf_attnstore.lab.sim.replay import Request, Requests, replay
from hf_attnstore.lab.sim.tiers import Tiers
from hf_attnstore.store.eviction.policies import POLICIES


def requests(*chains: str, every: float = 1.0, block_tokens: int = 1) -> Requests:
    """A turn for every text; a letter is a block and names all before it, too."""
    rows = []
    for number, chain in enumerate(chains):
        blocks = [chain[: place + 1] for place in range(len(chain))]
        rows.append(
            Request(
                at=number * every, session=number, prompt=blocks, blocks=blocks, tokens=len(blocks), history=0,
                kept=len(blocks), short=False, start=0, foreseen=blocks, prompt_short=0, superseded=None,
            )
        )  # fmt: skip
    return Requests("by hand", block_tokens, rows)


def found(policy: str, capacity: int, *chains: str, window: int = 0) -> list[int]:
    return replay(requests(*chains), capacity, policy, window=window, trace=True).by_turn


def test_lru_gives_up_what_was_used_least_recently() -> None:
    # a, b, a again: b is the older one when c comes
    assert found("lru", 2, "a", "b", "a", "c", "a", "b") == [0, 0, 1, 0, 1, 0]


def test_fifo_gives_up_what_came_first_even_if_it_was_used() -> None:
    assert found("fifo", 2, "a", "b", "a", "c", "a", "b") == [0, 0, 1, 0, 0, 0]


def test_hyperbolic_keeps_what_is_used_often_for_its_age() -> None:
    # at 10 s a has been used three times in 10 s and b, though more recently, once in 7
    rows = requests("a", "a", "a", "b", "c", "a")
    rows.rows[4].at, rows.rows[5].at = 10.0, 11.0
    assert replay(rows, 2, "hyperbolic", trace=True).by_turn == [0, 1, 1, 0, 0, 1]
    assert replay(rows, 2, "lru", trace=True).by_turn == [0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_end_of_a_chain_goes_before_its_beginning(policy: str) -> None:
    # abc and d fill the store; the room for e is that of c, whatever the policy thinks of chains of one age
    hits = replay(requests("abc", "d", "d", "e", "abc"), 4, policy, trace=True)
    assert hits.evictions[0] in ("abc", "d")
    assert hits.by_turn[-1] in (2, 3)


def test_predictive_keeps_conversations_that_have_come_back() -> None:
    """Some conversations return after six others which never do: with room for 40 blocks LRU finds next to nothing."""
    chains = []
    for turn in range(400):
        conversation, length = divmod(turn, 20)
        chains.append(chr(0x4E00 + conversation) + "x" * length)
        chains += [chr(0x5E00 + 6 * turn + other) + "y" * 9 for other in range(6)]
    rows = requests(*chains, every=10.0, block_tokens=100)
    lru, predictive, best = (replay(rows, 40, "lru"), replay(rows, 40, "predictive"), replay(rows, 10**6, "lru"))
    assert lru.found < 0.2 * best.found
    assert predictive.found > 0.6 * best.found


def test_what_is_scheduled_goes_last_and_the_farthest_turn_first() -> None:
    # with room for two, LRU loses everything in a cycle of three; who knows the order keeps one of them
    cycle = ["a", "b", "c"] * 4
    assert sum(found("lru", 2, *cycle)) == 0
    ahead = found("lru", 2, *cycle, window=3)
    assert sum(ahead) >= 4


def test_a_turn_that_runs_takes_the_room_of_the_farthest() -> None:
    tiers = Tiers(3, policy="lru")
    for key in "abc":
        tiers.admit(tiers.memory, 0.0, [key], 0, [1], tiers.newcomer(0.0))
        tiers.queued(key, [key])
    tiers.admit(tiers.memory, 1.0, ["d"], 0, [1], tiers.newcomer(1.0))
    assert "c" not in tiers.memory
    assert "a" in tiers.memory
    # for the first turn goes what nobody needs, then what a later one does, and never what itself needs
    for goes in "db":
        assert goes in tiers.memory
        assert tiers.memory.reserve(1, 2.0, job=0)
        assert goes not in tiers.memory
    assert not tiers.memory.reserve(1, 2.0, job=0)
    assert "a" in tiers.memory


def test_plain_fifo_drops_beginnings_too() -> None:
    assert plain_fifo(requests("ab", "c", "ab"), 2).found == 0
    assert plain_fifo(requests("ab", "c", "ab"), 3).found == 2


def test_a_second_tier_keeps_what_memory_gives_up() -> None:
    hits = replay(requests("a", "b", "a"), 1, "lru", disk=10)
    assert hits.found == 1
    assert hits.fast == 0  # it was on disk only
