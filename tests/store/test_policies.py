"""Who goes first: orders of eviction against plain models of them, windows by their formulas."""

import itertools
import json
import random
from collections.abc import Hashable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attnstore.errors import AttentionStoreError
from hf_attnstore.store.eviction.accounts import TierBook
from hf_attnstore.store.eviction.lookahead import Lookahead, fetch_window, keep_window
from hf_attnstore.store.eviction.order import EvictionOrder
from hf_attnstore.store.eviction.policies import MOST_GROUPS, POLICIES, Place, Policy, Use, make_policy
from hf_attnstore.store.eviction.policies.ends import End, Ends
from hf_attnstore.store.eviction.policies.returns import BINS, EDGES, Returns, bin_of
from hf_attnstore.store.eviction.victims import Order, VictimSearch
from hf_attnstore.store.index.rows import BlockRow

NAMES = sorted(POLICIES)


def parent_of(n: int) -> int:
    """Blocks 0 to 11 form chains 0-1-2-3, 4-5-6-7 and 8-9-10-11."""
    return n - 1 if n % 4 else -1


class PlainOrder:
    """What `EvictionOrder` does, by looking at every block."""

    def __init__(self, policy: Policy, lookahead: Lookahead) -> None:
        self.policy = policy
        self.lookahead = lookahead
        self.places: dict[int, Place] = {}

    def victims(self, now: float) -> set[int]:
        leaves = [n for n in self.places if not any(parent_of(m) == n for m in self.places)]
        free = [n for n in leaves if self.lookahead.job(n) is None]
        if not free:
            farthest = [(-(self.lookahead.job(n) or 0), -(n % 4), n) for n in leaves]
            return {n for job, start, n in farthest if (job, start) == min(farthest)[:2]} if farthest else set()
        firsts = []
        for group in {self.places[n].group for n in free}:
            firsts.append(min((self.places[n].stamp, -(n % 4)) for n in free if self.places[n].group == group))
        ranks = {
            n: (self.policy.worth(self.places[n], now), self.places[n].stamp, -(n % 4))
            for n in free
            if (self.places[n].stamp, -(n % 4)) in firsts
        }
        return {n for n, rank in ranks.items() if rank[:2] == min(ranks.values())[:2]}

    def remove(self, n: int) -> None:
        place = self.places.pop(n, None)
        parent = parent_of(n)
        if place is not None and parent in self.places and not any(parent_of(m) == parent for m in self.places):
            self.places[parent] = self.policy.left(self.places[parent], place)


class Same(dict[object, int]):
    """Bytes by block: 1 each."""

    def __missing__(self, key: object) -> int:
        return 1


def evict_one(order: EvictionOrder, now: float) -> object:
    """Takes out the block that goes next; None if there is none."""
    return next(iter(order.evict(1, Same(), now)), None)


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "use", "evict", "remove", "plan"]), st.integers(0, 11)), min_size=10, max_size=70
)


@pytest.mark.parametrize("name", ["lru", "fifo", "hyperbolic"])
@settings(max_examples=80, deadline=None)
@given(steps=STEPS)
def test_an_order_is_what_looking_at_every_block_gives(name: str, steps: list[tuple[str, int]]) -> None:
    lookahead = Lookahead()
    policy = make_policy(name)
    order, plain = EvictionOrder(policy, lookahead), PlainOrder(policy, lookahead)
    for step, (action, n) in enumerate(steps):
        now = float(step)
        if action == "add" and (n % 4 == 0 or n - 1 in plain.places) and n not in plain.places:
            order.add(n, parent_of(n), n % 4, policy.place(None, 0, now))
            plain.places[n] = policy.place(None, 0, now)
        elif action == "use":
            chain = list(range(n - n % 4, n + 1))
            order.used(chain, 0, now)
            end = next((m for m in reversed(chain) if m in plain.places), None)
            if end is not None:
                plain.places[end] = policy.place(plain.places[end], 0, now)
        elif action == "remove":
            order.remove(n)
            plain.remove(n)
        elif action == "plan":
            first, second = list(range(n - n % 4, n + 1)), [(n + 4) % 12]
            order.rescheduled(lookahead.schedule(["a", "b"], {"a": first, "b": second}, n % 3))
        elif action == "evict":
            expected = plain.victims(now)
            victim = evict_one(order, now)
            assert (victim in expected) if expected else victim is None, (victim, expected)
            if isinstance(victim, int):
                plain.remove(victim)
        assert len(order) == len(plain.places)
        assert all(order.place(m) == place for m, place in plain.places.items())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_chain_added_at_once_stands_as_one_added_block_by_block(name: str, seed: int) -> None:
    dice = random.Random(seed)
    policy, lookahead = make_policy(name), Lookahead()
    lookahead.schedule(["a"], {"a": [(0, 1), (2, 3)]})
    at_once, one_by_one = EvictionOrder(policy, lookahead), EvictionOrder(policy, lookahead)
    for step in range(40):
        chain, first, count = dice.randrange(4), dice.randrange(6), dice.randrange(4)
        keys = [(chain, number) for number in range(first, first + count)]
        if dice.random() < 0.7 and not any(key in at_once for key in keys):
            place = Place(dice.randrange(policy.groups), float(step))
            at_once.add_chain(keys, (chain, first - 1), first, place)
            for _, number in reversed(keys):
                one_by_one.add((chain, number), (chain, number - 1), number, place)
        else:
            for order in (at_once, one_by_one):
                order.remove((chain, first))
        for key in itertools.product(range(4), range(-1, 10)):
            assert at_once.place(key) == one_by_one.place(key)
            assert at_once.followers(key) == one_by_one.followers(key)
    gone = [order.evict(1000, Same(), 100.0) for order in (at_once, one_by_one)]
    assert gone[0] == gone[1]
    assert not len(at_once)
    assert not len(one_by_one)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_blocks_that_go_at_once_are_those_that_go_one_by_one(name: str, seed: int) -> None:
    dice = random.Random(seed)
    policy, lookahead = make_policy(name), Lookahead()
    at_once, one_by_one = orders = EvictionOrder(policy, lookahead), EvictionOrder(policy, lookahead)
    sizes: dict[Hashable, int] = {}
    for step in range(60):
        action = dice.choice(["add", "add", "fork", "touch", "used", "plan", "evict"])
        chain, now = dice.randrange(5), step
        place = Place(dice.randrange(policy.groups), dice.randrange(4))  # stamps are shared, as by what comes together
        if action == "add":
            first = dice.randrange(4)
            keys = [key for number in range(first, first + 4) if (key := (chain, number)) not in at_once]
            for order, (_, number) in itertools.product(orders, keys):
                order.add((chain, number), (chain, number - 1), number, place)
            sizes |= {key: dice.randrange(1, 4) for key in keys}
        elif action == "fork":  # chains share their beginnings
            for order in orders:
                order.add((chain, -step - 1), (chain, 1), 2, place)
            sizes.setdefault((chain, -step - 1), 2)
        elif action == "plan":
            plans = {other: [(other, number) for number in range(3)] for other in dice.sample(range(5), 2)}
            changed = lookahead.schedule(list(plans), plans)
            for order in orders:
                order.rescheduled(changed)
        elif action == "evict":
            excluded = {key for key in sizes if dice.random() < 0.1}
            job = dice.choice([None, *lookahead.jobs.values(), ()])
            wanted, job = dice.randrange(1, 20), job[0] if job else None
            newcomer = dice.choice([None, Place(dice.randrange(policy.groups), dice.randrange(now + 1))])
            gone = at_once.evict(wanted, sizes, now, excluded, job=job, newcomer=newcomer)
            alone: list[Hashable] = []
            while wanted > 0 and (victims := one_by_one.evict(1, sizes, now, excluded, job=job, newcomer=newcomer)):
                alone += victims
                wanted -= sum(map(sizes.__getitem__, victims))
            assert gone == alone
            assert not excluded.intersection(gone)
        else:
            blocks = [(chain, number) for number in range(dice.randrange(1, 7))]
            for order in orders:
                if action == "touch":
                    order.touch(blocks, now)
                else:
                    order.used(blocks, place.group, now)
        assert len(at_once) == len(one_by_one)
    for key in sizes:
        assert at_once.place(key) == one_by_one.place(key)
        assert at_once.followers(key) == one_by_one.followers(key)


class Table:
    """An index as `VictimSearch` sees one."""

    def __init__(self, rows: list[BlockRow]) -> None:
        self.rows = {row.key: row for row in rows}
        self.pages = 0

    def followers(self, key: bytes) -> int:
        return sum(row.continues == key for row in self.rows.values())

    def block(self, key: bytes) -> BlockRow | None:
        return self.rows.get(key)

    def leaves(self, group: int, limit: int, offset: int) -> list[BlockRow]:
        self.pages += 1
        found = [row for row in self.rows.values() if row.group == group and not self.followers(row.key)]
        return sorted(found, key=lambda row: (row.stamp, -row.start))[offset : offset + limit]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_index_gives_up_the_blocks_that_memory_would(name: str, seed: int) -> None:
    dice = random.Random(seed)
    policy, lookahead = make_policy(name), Lookahead()
    now = 10_000.0
    order = EvictionOrder(policy, lookahead)
    rows = []
    for chain in range(30):
        parent = b"root"
        for start in range(dice.randrange(1, 6)):
            key = bytes([chain, start])
            place = Place(dice.randrange(policy.groups), dice.random() * now)
            rows.append(BlockRow(key, parent, parent, start, 1, 1, "", *place))
            order.add(key, parent, start, place)
            parent = key
    plans = {str(n): [row.key for row in rows if row.key[0] == n] for n in dice.sample(range(30), 12)}
    order.rescheduled(lookahead.schedule(list(plans), plans))
    table = Table(rows)
    search = VictimSearch(table, Order(policy, lookahead), now)
    for _ in rows:
        found = search.next()
        assert found is not None
        assert found.key == evict_one(order, now)
    assert search.next() is None
    assert evict_one(order, now) is None


def test_what_is_worth_less_than_all_there_is_not_admitted_unless_somebody_says_what_comes() -> None:
    policy, lookahead, now = learned_policy(), Lookahead(), 20_000.0
    returning, finished = Place(3, now - 100), Place(1, now - 5000)
    newcomer = policy.place(None, policy.newcomers, now)
    assert policy.worth(returning, now) > policy.worth(newcomer, now) > policy.worth(finished, now)
    order = EvictionOrder(policy, lookahead)
    order.add("returning", "root", 0, returning)
    order.add("finished", "root", 0, finished)
    rows = [
        BlockRow(name.encode(), b"root", b"root", 0, 1, 1, "", *place)
        for name, place in (("returning", returning), ("finished", finished))
    ]
    sizes: dict[Hashable, int] = {"returning": 1, "finished": 1}
    search = VictimSearch(Table(rows), Order(policy, lookahead), now, newcomer=newcomer)
    first = search.next()
    assert first is not None
    assert (first.key, search.refused) == (b"finished", False)
    assert (search.next(), search.refused) == (None, True)
    assert order.evict(2, sizes, now, newcomer=newcomer) == ["finished"]
    assert order.evict(1, sizes, now, newcomer=newcomer) == []
    lookahead.schedule(["another"], {"another": ["elsewhere"]})
    assert order.evict(1, sizes, now, newcomer=newcomer) == ["returning"]
    search = VictimSearch(Table(rows[:1]), Order(policy, lookahead), now, newcomer=newcomer)
    last = search.next()
    assert last is not None
    assert last.key == b"returning"


@pytest.mark.parametrize("name", ["lru", "fifo", "hyperbolic"])
def test_policies_that_predict_nothing_admit_everything(name: str) -> None:
    policy = make_policy(name)
    assert policy.admits(Place(0, 0.0), Place(policy.groups - 1, 100.0), 100.0)


def test_a_search_reads_a_page_of_each_group_and_no_more() -> None:
    rows = [BlockRow(bytes([n // 256, n % 256]), b"", b"", 0, 1, 1, "", 0, float(n)) for n in range(2000)]
    table = Table(rows)
    search = VictimSearch(table, Order(make_policy("lru")), 1e4)
    assert [row.stamp for row in (search.next() for _ in range(5)) if row is not None] == [0, 1, 2, 3, 4]
    assert table.pages == MOST_GROUPS


def test_hyperbolic_by_hand() -> None:
    policy = make_policy("hyperbolic")
    gone = {}
    for at in (60.0, 80.0):
        order = EvictionOrder(policy)
        order.add("often", None, 0, policy.place(None, 0, 0.0))
        order.add("once", None, 0, policy.place(None, 0, 50.0))
        for now in (10.0, 20.0, 30.0):
            order.used(["often"], 0, now)
        assert order.place("often") == (3, 0.0)
        gone[at] = evict_one(order, at)
    assert gone[60.0] == "often", "4 uses in 60 s are fewer than 1 in 10"
    assert gone[80.0] == "once", "4 in 80 s are more than 1 in 30"


def test_fifo_goes_by_arrival_and_keeps_beginnings() -> None:
    policy = make_policy("fifo")
    order = EvictionOrder(policy)
    for now, (key, parent, start) in enumerate([("a", None, 0), ("b", None, 0), ("a2", "a", 1)]):
        order.add(key, parent, start, policy.place(None, 0, float(now)))
    order.used(["b"], 0, 9.0)
    assert evict_one(order, 10.0) == "b", "the beginning of a chain stays while something follows it"


# predicted returns


def conversation(policy: Policy, name: str, times: list[float], tokens: int = 500) -> int:
    """Lets a conversation have turns, each a block more than the one before; returns the last one's group."""
    group = -1
    for turn, now in enumerate(times):
        chain = [f"{name} {n}" for n in range(turn + 2)]
        group = policy.group(Use(now, chain, tokens * (turn + 2)))
    return group


def test_conversations_are_told_apart_by_turns_and_by_what_is_new() -> None:
    policy = make_policy("predictive")
    assert conversation(policy, "a", [0.0]) == 1
    assert conversation(policy, "b", [0.0], tokens=3000) == 2, "a long first text"
    assert conversation(policy, "c", [0.0, 60.0]) == 3
    assert conversation(policy, "d", [0.0, 60.0], tokens=3000) == 4, "a second turn that adds much"
    assert conversation(policy, "e", [0.0, 60.0, 120.0]) == 5
    assert conversation(policy, "f", [float(60 * n) for n in range(9)]) == 7
    assert max(place for place in (1, 2, 3, 4, 5, 7)) < policy.groups <= MOST_GROUPS


def test_a_beginning_that_is_shared_is_no_conversation() -> None:
    policy = make_policy("predictive")
    policy.group(Use(0.0, ["system"], 300))
    policy.group(Use(1.0, ["system", "x"], 500))
    for n in range(20):
        policy.group(Use(2.0 + n, ["system"], 300))
        assert policy.group(Use(2.5 + n, ["system", n], 500)) == 1


def learned_policy() -> Policy:
    """First turns come back in one of five cases; later ones four times of five, within a minute or two."""
    dice = random.Random(1)
    policy = make_policy("predictive")
    events = []
    for n in range(600):
        times = [n * 20.0]
        while dice.random() < (0.2 if len(times) == 1 else 0.8):
            times.append(times[-1] + dice.uniform(30, 120))
        events += [(now, n, turn) for turn, now in enumerate(times)]
    for now, n, turn in sorted(events):
        policy.group(Use(now, [f"{n} {place}" for place in range(turn + 2)], 400 * (turn + 2)))
    return policy


def test_who_returned_before_is_kept_longer_and_nobody_for_ever() -> None:
    policy, now = learned_policy(), 1e6
    fresh, returned = 1, 7
    for age in (1.0, 60.0, 100.0):
        assert policy.worth(Place(returned, now - age), now) > 2 * policy.worth(Place(fresh, now - age), now)
    assert policy.worth(Place(returned, now - 600), now) < policy.worth(Place(fresh, now - 1), now)


def test_what_was_learned_outlives_the_process() -> None:
    policy = learned_policy()
    other = make_policy("predictive")
    other.recall(json.loads(json.dumps(policy.learned())))
    now = 1e6
    assert other.worth(Place(7, now - 60), now) > 2 * other.worth(Place(1, now - 60), now)
    for nonsense in (
        {},
        {"returned": "x"},
        {"returned": [[1.0]], "waited": [[1.0]]},
        {"returned": None, "waited": None},
    ):
        before = other.worth(Place(7, now - 60), now)
        other.recall(nonsense)
        assert other.worth(Place(7, now - 60), now) == before


def test_nothing_known_means_least_recently_used() -> None:
    policy = make_policy("predictive")
    now = 1e6
    worth = [policy.worth(Place(1, now - age), now) for age in (1, 10, 100, 1000, 10_000)]
    assert worth == sorted(worth, reverse=True)
    assert len(set(worth)) == len(worth)


def wait(returns: Returns, *spells: tuple[int, float, float]) -> None:
    groups, since, until = np.array(spells).reshape(-1, 3).T
    returns.waited(groups.astype(int), since, until)


def seconds_waited(returns: Returns) -> np.ndarray:
    return np.array(returns.learned()["waited"])


def test_the_worth_of_waiting_by_hand() -> None:
    returns = Returns(1)
    for _ in range(1000):
        returns.returned(0, 100.0)
    wait(returns, *[(0, 0.0, 2000.0)] * 1000)
    returns.refresh()
    soon, late = returns.worth[0][bin_of(90.0)], returns.worth[0][bin_of(1000.0)]
    # at 90 s half of them come back within the bin of 100 s, which ends at most 1.35 times as late
    width = EDGES[bin_of(100.0) + 1] - EDGES[bin_of(90.0)]
    assert 0.4 / width < soon < 1 / (width / 2)
    assert late < soon / 100
    assert len(returns.worth[0]) == BINS


def test_seconds_of_waiting_are_counted_once_and_by_age() -> None:
    whole, parts, one_by_one = Returns(2), Returns(2), Returns(2)
    dice = random.Random(2)
    spells = [(dice.randrange(2), 0.0, dice.uniform(0, 5000)) for _ in range(200)]
    wait(whole, *spells)
    for group, _, end in spells:
        middle = dice.uniform(0, end)
        wait(parts, (group, 0.0, middle))
        wait(parts, (group, middle, end))
        one_by_one.returned(group, end)
    for other in (parts, one_by_one):
        assert np.allclose(seconds_waited(whole), seconds_waited(other))
    assert np.isclose(seconds_waited(whole).sum(), sum(end for _, _, end in spells))
    assert (seconds_waited(whole)[:, bin_of(5000.0) + 1 :] == 0).all()
    wait(whole, (0, 100.0, 50.0))
    whole.returned(1, 50.0, since=100.0)
    assert np.allclose(seconds_waited(whole), seconds_waited(parts)), "a clock that was set back takes nothing away"
    wait(whole)


def test_a_server_whose_queue_grows_is_followed() -> None:
    """Conversations come back later and later; what was true of them at first must not be held against them."""
    policy = make_policy("predictive")
    names = iter(range(10**6))
    waiting = [(float(n), next(names), 1) for n in range(50)]
    now = 0.0
    for turn in range(6000):
        now, name, turns = waiting.pop(0)
        policy.group(Use(now, [f"{name} {n}" for n in range(turns)], 300 * turns))
        away = 100 + turn / 2
        waiting.append((now + away, name, turns + 1) if turns < 8 else (now + away, next(names), 1))
        waiting.sort()
    soon, due = policy.worth(Place(7, now - 60), now), policy.worth(Place(7, now - 2500), now)
    assert due > 2 * soon, "what is due is worth more than what has just been used"


def test_a_conversation_that_was_truncated_is_known_by_its_name() -> None:
    for name, expected in (("alice", 7), (None, 1)):
        policy = make_policy("predictive")
        groups = [policy.group(Use(60.0 * n, [f"chain {n}"], 500, conversation=name)) for n in range(5)]
        assert groups[-1] == expected


@pytest.mark.parametrize("held", [True, False])
def test_a_short_end_that_was_dropped_is_not_taken_for_useless(held: bool) -> None:
    """Else nothing would ever show that short ends are of use: they would always be dropped."""
    policy = make_policy("predictive")
    for n in range(40):
        for turn in (0, 1):
            use = Use(100.0 * n + 10 * turn, ["a"], 300, f"short {n} {turn}", conversation=n, holds=lambda key: held)
            policy.group(use)
    place = policy.place(None, 3, 5000.0, short=True)
    assert place.group == (0 if held else 3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), most=st.integers(0, 150))
def test_who_may_come_back_is_the_same_seen_one_by_one_and_all_at_once(seed: int, most: int) -> None:
    random_ = random.Random(seed)
    ends, expected = Ends(), dict[int, End]()
    for step in range(400):
        if expected and random_.random() < 0.3:
            key = random_.choice(list(expected))
            assert ends.pop(key) == expected.pop(key)
        else:
            short = random_.choice([None, -1])
            expected[step] = End(1, random_.randrange(5000), random_.randrange(9), float(step), short)
            ends.add(step, expected[step])
        if step % 100 == 99:
            ends.keep(most)
            for oldest in list(expected)[: max(0, len(expected) - most)]:
                del expected[oldest]
        assert len(ends) == len(expected)
    assert [key for key in range(401) if key in ends] == sorted(expected)
    groups, began, short_ones = ends.waiting()
    seen = sorted(zip(groups.tolist(), began.tolist(), short_ones.tolist(), strict=True))
    assert seen == sorted((end.group, end.at, end.short is not None) for end in expected.values())


def test_an_unknown_policy_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(AttentionStoreError, match="hyperbolic"):
        make_policy("best")


# looking ahead


def test_windows_are_those_of_the_formulas() -> None:
    assert fetch_window(100.0, 30.0) == 3
    assert keep_window(100.0, 200.0, 30.0) == 10
    assert fetch_window(10.0, 30.0) == 1, "the next turn is fetched for, whatever its size"
    assert fetch_window(10.0, 0.0) == keep_window(1.0, 1.0, 0.0) == 1


def test_upcoming_turns_keep_their_numbers_while_the_queue_moves_on() -> None:
    lookahead = Lookahead()
    assert lookahead.schedule(["a", "b", "c"], {"a": [1, 2], "b": [1, 3], "c": [4]}) == {1, 2, 3, 4}
    before = {key: lookahead.job(key) for key in (1, 3, 4)}
    assert lookahead.schedule(["b", "c", "d"], {"d": [5]}) == {1, 2, 5}
    assert lookahead.job(2) is None
    assert lookahead.job(1) == before[3], "b needs it, too"
    assert [lookahead.job(key) for key in (3, 4)] == [before[3], before[4]]
    assert list(lookahead.fetches(2)) == [(before[3], 1), (before[3], 3), (before[4], 4)]
    assert lookahead.schedule([], {}) == {1, 3, 4, 5}
    assert not len(lookahead)


def test_only_turns_within_the_window_count() -> None:
    lookahead = Lookahead()
    lookahead.schedule(["a", "b", "c"], {"a": [1], "b": [2], "c": [3]}, window=2)
    assert [lookahead.job(key) is not None for key in (1, 2, 3)] == [True, True, False]
    assert lookahead.window == 2


def test_room_for_a_later_turn_is_not_taken_from_an_earlier_one() -> None:
    lookahead = Lookahead()
    book = TierBook(2, make_policy("lru"), lookahead)
    for now, key in enumerate("ab"):
        assert book.reserve(1, float(now))
        book.add(key, None, 0, 1, Place(0, float(now)))
    book.order.rescheduled(lookahead.schedule(["a", "b", "c"], {"a": ["a"], "b": ["b"], "c": ["c"]}))
    numbers = {key: lookahead.job(key) for key in "abc"}
    assert not book.reserve(1, 5.0, job=numbers["c"])
    assert book.reserve_leading([1, 1], 5.0, job=numbers["c"]) == 0
    assert book.used == 2
    assert book.reserve(1, 5.0), "a turn that is running goes before all that only come"
    assert list(book.keys()) == ["a"], "the farthest one's was given up"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_turns_pushed_and_popped_one_by_one_have_the_jobs_of_a_schedule(seed: int) -> None:
    dice = random.Random(seed)
    queue, schedule = Lookahead(), Lookahead()
    names: list[int] = []
    plans = {name: [dice.randrange(12) for _ in range(4)] for name in range(30)}
    for name in plans:
        before = {key: queue.job(key) for key in range(12)}
        if names and dice.random() < 0.5:
            del names[0]
            changed = queue.pop()
        else:
            names.append(name)
            changed = queue.push(name, plans[name])
        schedule.schedule(names, plans)
        places = {name: schedule.job(key) for name in names for key in plans[name]}
        assert all(job is not None for job in places.values())
        assert {key for key, job in before.items() if queue.job(key) != job} <= changed
        order = {number: place for place, number in enumerate(sorted(set().union(*queue.jobs.values())))}
        wanted = {number: place for place, number in enumerate(sorted(set().union(*schedule.jobs.values())))}
        assert {key: [order[job] for job in jobs] for key, jobs in queue.jobs.items()} == {
            key: [wanted[job] for job in jobs] for key, jobs in schedule.jobs.items()
        }


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(3, 20))
def test_leading_sizes_are_reserved_as_one_by_one(seed: int, capacity: int) -> None:
    dice = random.Random(seed)
    plans = {name: [(name, place) for place in range(4)] for name in range(6)}
    soon = dice.sample(range(6), 3)
    at_once, one_by_one = books = [TierBook(capacity, make_policy("lru"), Lookahead()) for _ in range(2)]
    for book in books:
        lookahead = Lookahead()
        book.order = EvictionOrder(make_policy("lru"), lookahead)
        book.order.rescheduled(lookahead.schedule(soon, plans))
    for step in range(30):
        name, now = dice.randrange(6), float(step)
        job = dice.choice([None, 0, 1, 2])
        absent = at_once.absent(plans[name])
        assert absent == one_by_one.absent(plans[name]) == [key for key in plans[name] if key not in at_once]
        sizes = [dice.randrange(1, 6) for _ in absent]
        count = at_once.reserve_leading(sizes, now, job=job)
        fits = (one_by_one.reserve(size, now, job=job) for size in sizes)
        assert count == sum(itertools.takewhile(bool, fits))
        for book in books:
            for key, size in zip(absent[:count], sizes, strict=False):
                book.add(key, (name, key[1] - 1), key[1], size, Place(0, now))
        assert at_once.used == one_by_one.used
        assert at_once.keys() == one_by_one.keys()
        assert at_once.sizes(plans[name]) == [one_by_one.size(key) for key in plans[name]]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.integers(3, 30))
def test_a_book_never_exceeds_its_cap_nor_keeps_an_orphan(name: str, seed: int, capacity: int) -> None:
    dice = random.Random(seed)
    policy, lookahead = make_policy(name), Lookahead()
    gone: list[object] = []
    book = TierBook(capacity, policy, lookahead, gone.extend)
    parents: dict[object, object] = {}
    for step in range(120):
        now, session = float(step), dice.randrange(6)
        length = dice.randrange(1, 6)
        chain = [(session, n) for n in range(length)]
        if dice.random() < 0.3:
            plans = {n: [(n, place) for place in range(3)] for n in dice.sample(range(6), 3)}
            book.order.rescheduled(lookahead.schedule(list(plans), plans))
        group = policy.group(Use(now, chain, 100 * length))
        book.order.used(chain, group, now)
        for place, key in enumerate(chain):
            parents[key] = chain[place - 1] if place else None
            if key in book:
                continue
            size = dice.randrange(1, 4)
            if not book.reserve(size, now):
                break
            if place and chain[place - 1] not in book:
                book.release(size)
                break
            book.add(key, parents[key], place, size, policy.place(None, group, now), dirty=dice.random() < 0.1)
        for key in list(book.dirty):
            if dice.random() < 0.5:
                book.dirty.discard(key)
        there = set(book.keys())
        assert book.used == sum(book.size(key) for key in there) <= capacity
        assert all(parents[key] is None or parents[key] in there for key in there), "a block without its beginning"
    assert len(gone) == book.evictions
