"""What things cost, learned from noisy observations."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attnstore.cache.costs.learn import CAUTIOUS_REACH, ENOUGH, REACH, Costs, _non_negative


def prefill_seconds(history: int, new: int, a: float = 2e-3, b: float = 1e-4, c: float = 2e-8) -> float:
    return a + b * new + c * new * (history + new / 2)


def noisy(rng: random.Random, seconds: float) -> float:
    """A few percent off, and now and then several times as long: another process wanted the machine."""
    return seconds * rng.lognormvariate(0, 0.05) * (rng.uniform(3, 20) if rng.random() < 0.1 else 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_prefill_is_predicted_from_noisy_ones(seed: int) -> None:
    rng, costs = random.Random(seed), Costs()
    for _ in range(120):
        history, new = int(math.exp(rng.uniform(0, 9))) - 1, int(math.exp(rng.uniform(2, 8.5)))
        costs.observe_prefill(history, new, noisy(rng, prefill_seconds(history, new)))
    points = [(0, 64), (0, 1000), (0, 4000), (4000, 64), (2000, 2000), (8000, 1000), (8000, 16)]
    found = costs.prefill(points)
    assert found is not None
    for point, seconds in zip(points, found, strict=True):
        assert seconds == pytest.approx(prefill_seconds(*point), rel=0.15), point


@pytest.mark.parametrize("seed", range(5))
def test_a_load_is_predicted_from_noisy_ones_by_tier(seed: int) -> None:
    rng, costs = random.Random(seed), Costs()
    truth = {"memory": (1e-4, 2e-10), "disk": (3e-3, 1e-9)}
    for _ in range(40):
        for tier, (fixed, per_byte) in truth.items():
            nbytes = int(math.exp(rng.uniform(11, 19)))
            costs.observe_load(tier, nbytes, noisy(rng, fixed + per_byte * nbytes))
    found = costs.load([{"memory": 1 << 24}, {"disk": 1 << 24}, {"memory": 1 << 20, "disk": 1 << 26}, {}])
    assert found is not None
    expected = [1e-4 + 2e-10 * 2**24, 3e-3 + 1e-9 * 2**24, 1e-4 + 2e-10 * 2**20 + 3e-3 + 1e-9 * 2**26, 0]
    assert found == pytest.approx(expected, rel=0.15)


@given(st.lists(st.tuples(st.integers(0, 10**5), st.integers(1, 10**4), st.floats(1e-9, 1e3)), min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_no_cost_is_ever_negative_or_out_of_bounds(observed: list[tuple[int, int, float]]) -> None:
    costs = Costs()
    for history, new, seconds in observed:
        costs.observe_prefill(history, new, seconds)
        costs.observe_load("disk", new * 1000, seconds)
    largest = max(new for _, new, _ in observed)
    points = [(0, 1), (0, largest), (10**5, min(10, largest)), (10**6, largest), (3, int(largest * REACH)), (7, 0)]
    found, loads = costs.prefill(points, enough=1), costs.load([{"disk": largest * 500}, {"disk": largest * 4000}])
    assert found is not None
    assert (found[:-1] > 0).all()
    assert found[-1] == 0
    assert np.isfinite(found).all()
    if len(observed) >= ENOUGH:
        assert loads is not None
        assert (loads > 0).all()
    assert json.loads(json.dumps(costs.to_json())) == costs.to_json()


def test_what_makes_no_sense_is_left_out() -> None:
    costs = Costs()
    for seconds in (0.0, -1.0, math.nan, math.inf):
        costs.observe_prefill(0, 100, seconds)
    costs.observe_load("disk", 0, 1.0)
    assert costs.prefill([(0, 100)], enough=1) is None
    assert costs.estimate(100) is None
    assert costs.to_json()["loads"] == {}


def test_nothing_is_said_beyond_what_observations_tell() -> None:
    costs = Costs()
    for number in range(ENOUGH):
        assert costs.prefill([(0, 10)]) is None
        assert costs.load([{"disk": 10}]) is None
        costs.observe_prefill(1000, 20 + number, 0.02)
        costs.observe_load("disk", 1000, 0.01)
    assert costs.prefill([(0, 10)]) is not None
    assert costs.load([{"disk": 10}]) is not None
    assert costs.load([{"disk": 10, "memory": 1}]) is None
    assert costs.load([{"disk": int(1000 * REACH) + 1}]) is None
    assert costs.prefill([(0, int(22 * CAUTIOUS_REACH) + 1)]) is None
    assert costs.estimate(int(22 * REACH) + 1) is None
    # beyond the largest that was seen, a token costs no less than there: small prompts do not make large ones cheap
    most = costs.prefill([(1000, 22), (1000, 80)])
    assert most is not None
    assert most[1] >= most[0] * 80 / 22 * 0.99


def test_costs_that_have_changed_are_noticed() -> None:
    rng, costs = random.Random(0), Costs()
    for _ in range(60):
        nbytes = int(rng.uniform(1, 8) * 2**20)
        costs.observe_load("disk", nbytes, 1e-8 * nbytes * rng.lognormvariate(0, 0.05))
    turns = 0
    while (found := costs.load([{"disk": 4 << 20}])) is None or found[0] > 2 * 1e-9 * (4 << 20):
        nbytes = int(rng.uniform(1, 8) * 2**20)
        costs.observe_load("disk", nbytes, 1e-9 * nbytes * rng.lognormvariate(0, 0.05))
        turns += 1
        assert turns <= 12
    for _ in range(6):
        costs.observe_load("disk", 4 << 20, 1e-9 * (4 << 20) * rng.lognormvariate(0, 0.05))
    # one slow load alone changes nothing
    before = costs.load([{"disk": 4 << 20}])
    assert costs.observe_load("disk", 4 << 20, 1.0)
    after = costs.load([{"disk": 4 << 20}])
    assert before is not None
    assert after is not None
    assert after[0] == pytest.approx(before[0], rel=0.3)


def test_what_is_as_predicted_is_fitted_now_and_then_and_none_of_it_is_lost() -> None:
    costs = Costs()

    def load(seconds: float) -> float:
        costs.observe_load("disk", 1 << 20, seconds)
        found = costs.load([{"disk": 1 << 20}])
        assert found is not None
        return float(found[0])

    for _ in range(16):
        costs.observe_load("disk", 1 << 20, 1.0)
    first = load(1.0)
    said = [load(1.2) for _ in range(12)]
    assert said[0] == first
    assert len(set(said)) < len(said)
    assert said[-1] == pytest.approx(1.2, rel=0.05)


def test_observations_close_by_count_for_more_than_the_formula() -> None:
    """Small prefills do not follow the straight formula of large ones; where it was seen, what was seen holds."""
    rng, costs = random.Random(1), Costs()

    def crooked(new: int) -> float:
        return 1e-2 + 1e-4 * new if new < 300 else 5e-5 * new  # above, more cores take part

    for _ in range(100):
        new = rng.choice([50, 100, 200, 400, 800, 1600])
        costs.observe_prefill(0, new, crooked(new) * rng.lognormvariate(0, 0.03))
    found = costs.prefill([(0, 100), (0, 400), (0, 1600)])
    assert found == pytest.approx([crooked(100), crooked(400), crooked(1600)], rel=0.08)


def test_what_is_kept_does_not_grow_without_bound() -> None:
    rng, costs = random.Random(2), Costs()
    for _ in range(2000):
        history, new = rng.randrange(10**6), rng.randrange(2, 10**5)
        costs.observe_prefill(history, new, 1e-5 * new)
        costs.observe_load(rng.choice(["memory", "disk"]), new * 1000, 1e-6 * new)
    assert len(json.dumps(costs.to_json())) < 10_000


def test_what_was_learned_can_be_written_down_and_read() -> None:
    rng, costs = random.Random(3), Costs()
    for _ in range(50):
        new = int(math.exp(rng.uniform(3, 8)))
        costs.observe_prefill(0, new, prefill_seconds(0, new))
        costs.observe_load("disk", new * 4096, 1e-9 * new * 4096)
    costs.layer_bytes = [64, 64, 0]
    costs.state_bytes = 100
    twin = Costs.from_json(json.loads(json.dumps(costs.to_json())))
    assert twin.can_choose()
    assert twin.layer_bytes == [64, 64, 0]
    assert twin.state_bytes == 100
    for points in ([(0, 500)], [(100, 900)]):
        assert twin.prefill(points) == pytest.approx(costs.prefill(points), rel=0.1)
    assert twin.load([{"disk": 1 << 20}]) == pytest.approx(costs.load([{"disk": 1 << 20}]), rel=0.1)
    # and what is observed from then on counts for more
    for _ in range(6):
        twin.observe_prefill(0, 500, 10 * prefill_seconds(0, 500))
    found = twin.prefill([(0, 500)])
    assert found is not None
    assert found[0] > 5 * prefill_seconds(0, 500)


@pytest.mark.parametrize(
    "found",
    [
        None, {}, {"version": 0}, {"version": 1}, {"version": 1, "prefill": 3, "loads": {}},
        {"version": 1, "prefill": {"samples": [[1, 2]]}, "loads": {}, "layer_bytes": [], "state_bytes": 0},
        {"version": 1, "prefill": {"samples": []}, "loads": [], "layer_bytes": [], "state_bytes": 0},
        {"version": 1, "prefill": {"samples": [["x", 1, 1]]}, "loads": {}, "layer_bytes": [], "state_bytes": 0},
        {"version": 1, "prefill": {"samples": []}, "loads": {}, "layer_bytes": None, "state_bytes": 0},
    ],
)  # fmt: skip
def test_a_note_that_is_none_is_begun_anew(found: Any) -> None:
    costs = Costs.from_json(found)
    assert not costs.can_choose()
    assert costs.estimate(10) is None


def test_it_is_worth_writing_down_ever_more_seldom() -> None:
    costs, written = Costs(), []
    for number in range(200):
        costs.observe_prefill(0, 100, 0.1)
        if costs.worth_keeping():
            written.append(number)
    assert written[:3] == [0, 1, 2]
    assert len(written) <= 20
    assert not costs.worth_keeping()


@given(
    st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=3, max_size=20),
    st.lists(st.floats(0.01, 1), min_size=20, max_size=20),
    st.lists(st.floats(0, 3), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=100)
def test_no_factors_without_negatives_fit_better(rows: list[Any], trust: list[float], other: list[float]) -> None:
    terms, weights = np.array(rows) + 1e-3, np.array(trust[: len(rows)])

    def error(factors: Any) -> float:
        return float((weights * (terms @ np.asarray(factors) - 1) ** 2).sum())

    trusted = terms * weights[:, None]
    found = _non_negative(trusted.T @ terms, trusted.sum(axis=0))
    assert min(found) >= 0
    assert error(found) <= error(other) + 1e-4


@pytest.mark.parametrize("masked", [0.0, 1.0], ids=["causal all the way", "masked behind a history"])
def test_the_masked_half_behind_a_history_is_learned_where_there_is_one(masked: float) -> None:
    def seconds(history: int, new: int) -> float:
        pairs = new * new / 2
        return 0.01 + 2e-4 * new + 1e-7 * (new * history + pairs + masked * pairs * (history > 0))

    costs = Costs()
    for new in (40, 150, 500, 900, 1800):
        for history in (0, 30, 700):
            costs.observe_prefill(history, new, seconds(history, new))
    found = costs.prefill([(0, 2000), (4, 1996), (500, 1500)])
    assert found == pytest.approx([seconds(0, 2000), seconds(4, 1996), seconds(500, 1500)], rel=0.03)
    assert (found[1] > 1.2 * found[0]) == bool(masked)
