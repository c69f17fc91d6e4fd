"""Several processes that share a store, at random and step by step: right tokens, right accounts, free locks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from support.soak import SCENARIOS, Plan, run

from hf_attnstore.store.processes.locks import SessionLocks


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of the scenarios and of a short soak."""
    return run(Plan(), tmp_path_factory.mktemp("soak"), scenarios=True, timeout=270)


def check(result: dict[str, Any], *, turns: int, kills: int) -> None:
    """A soak in which something happened, and nothing went wrong."""
    assert result["wrong"] == []
    assert result["problems"] == []
    assert result["turns"] >= turns
    assert result["reused_tokens"] > result["prompt_tokens"] / 4, "a soak in which nothing is reused shows nothing"
    assert result["loaded_bytes"] > 0
    assert result["evicted_blocks"] > 0
    assert result["kills"] >= kills
    assert result["done"]["delete"] > 0
    assert result["done"]["fork"] > 0
    assert 0 < result["end_bytes"] <= result["cap"]
    assert 0 < result["peak_bytes"] <= result["cap"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_step_by_step(result: dict[str, Any], scenario: str) -> None:
    assert result["scenarios"][scenario] == []


def test_processes_that_share_a_store_never_say_a_wrong_token(result: dict[str, Any]) -> None:
    check(result, turns=20, kills=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1])
def test_many_processes_that_share_a_store_for_long_never_say_a_wrong_token(tmp_path: Path, seed: int) -> None:
    plan = Plan(processes=8, sessions=16, turns=8, seconds=120, cap=1_300_000, kill_seconds=1.5, seed=seed)
    result = run(plan, tmp_path / "soak")
    check(result, turns=500, kills=30)
    assert result["busy"] > 0


def test_a_session_that_becomes_free_while_it_is_asked_for_is_not_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = SessionLocks(tmp_path), SessionLocks(tmp_path)
    turn = theirs.acquire("", "alice", 0)
    writing = theirs.keep("", "alice")
    assert writing is not None
    turn.release()
    acquire = FileLock.acquire

    def late(self: FileLock, *arguments: Any, **settings: Any) -> Any:
        try:
            return acquire(self, *arguments, **settings)
        except Timeout:
            writing.done()
            raise

    monkeypatch.setattr(FileLock, "acquire", late)
    mine.acquire("", "alice", 0).release()
