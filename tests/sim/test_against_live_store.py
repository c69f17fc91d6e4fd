"""The simulator and a real store on the same turns: the same hits, the same blocks in memory after each of them."""

import random
from pathlib import Path

import pytest

from hf_attnstore.errors import AttentionStoreError
from hf_attnstore.lab.bench.shapes import choose_model, load_model
from hf_attnstore.lab.sim import live_model
from hf_attnstore.lab.sim.live import compare
from hf_attnstore.lab.sim.live_model import ModelTurns, scaled_down
from hf_attnstore.lab.sim.paper import paper_workload
from hf_attnstore.lab.sim.replay import Requests, requests_of
from hf_attnstore.lab.sim.traces import mooncake
from hf_attnstore.lab.sim.workload import Workload
from hf_attnstore.store.eviction.policies import POLICIES


def trace() -> Workload:
    """Twelve conversations of up to eight turns, which all begin with the same block."""
    dice = random.Random(3)
    rows = []
    for session in range(12):
        ids, now = [0], dice.uniform(0, 300)
        for turn in range(dice.randrange(2, 9)):
            ids = [*ids, *(1 + 1000 * session + 50 * turn + n for n in range(dice.randrange(1, 4)))]
            rows.append({"timestamp": 1000 * now, "input_length": 512 * len(ids), "output_length": 9, "hash_ids": ids})
            now += dice.expovariate(1 / 60)
    return mooncake("a trace", rows)


@pytest.fixture(scope="module")
def requests() -> Requests:
    return requests_of(paper_workload(25, gap=60), 1024, 4096)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_hits_and_the_same_evictions(requests: Requests, policy: str, tmp_path: Path) -> None:
    result = compare(requests, tmp_path / "store", 40, policy)
    assert result.differing == []
    assert result.wrong == 0
    assert result.evicted == result.evicted_simulated > 20
    assert result.found == result.found_simulated > result.fast == result.fast_simulated > 0


@pytest.mark.parametrize("policy", ["lru", "predictive"])
def test_a_model_that_computes_the_turns_finds_and_evicts_the_same(policy: str, tmp_path: Path) -> None:
    scaled = scaled_down(requests_of(trace(), 512))
    model = load_model(choose_model("tiny", None, device="cpu", max_tokens=600))
    turns = ModelTurns.of(model, every=3)
    result = compare(scaled, tmp_path / "store", scaled.unique // 3, policy, turns=turns)
    assert result.differing == []
    assert result.wrong == 0
    assert result.evicted == result.evicted_simulated > 20
    assert result.found == result.found_simulated > result.fast == result.fast_simulated > 0


def test_a_wrong_token_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = scaled_down(requests_of(trace(), 512))
    model = load_model(choose_model("tiny", None, device="cpu", max_tokens=600))
    turns = ModelTurns.of(model, every=1)
    answer = live_model._answer
    monkeypatch.setattr(live_model, "_answer", lambda *args: answer(*args) + (args[2] is None))
    result = compare(scaled, tmp_path / "store", scaled.unique // 3, turns=turns)
    assert result.wrong == result.turns
    assert not result.agrees


def test_a_difference_is_seen(requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another policy in the simulation than in the store must not pass."""
    from hf_attnstore.lab.sim import live

    real = live.replay
    monkeypatch.setattr(live, "replay", lambda rows, memory, policy, **rest: real(rows, memory, "fifo", **rest))
    result = compare(requests, tmp_path / "store", 40, "lru")
    assert result.differing
    assert not result.agrees


def test_a_folder_that_is_there_is_left_alone(requests: Requests, tmp_path: Path) -> None:
    with pytest.raises(AttentionStoreError, match="exists"):
        compare(requests, tmp_path, 10)
