"""The simulator and a real store on the same turns: the same hits, the same blocks in memory after each of them."""

from pathlib import Path

import pytest

from hf_attnstore.errors import AttentionStoreError
from hf_attnstore.sim.live import compare
from hf_attnstore.sim.paper import paper_workload
from hf_attnstore.sim.replay import Requests, requests_of
from hf_attnstore.store.policies import POLICIES


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


def test_a_difference_is_seen(requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another policy in the simulation than in the store must not pass."""
    from hf_attnstore.sim import live

    real = live.replay
    monkeypatch.setattr(live, "replay", lambda rows, memory, policy, **rest: real(rows, memory, "fifo", **rest))
    result = compare(requests, tmp_path / "store", 40, "lru")
    assert result.differing
    assert not result.agrees


def test_a_folder_that_is_there_is_left_alone(requests: Requests, tmp_path: Path) -> None:
    with pytest.raises(AttentionStoreError, match="exists"):
        compare(requests, tmp_path, 10)
