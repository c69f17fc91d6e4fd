"""Processes killed in the middle of their work, and power lost: every acknowledged turn, and never a wrong tensor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.crashes import BETWEEN, HALFWAY, INSTANT, LOSSES, Outcome, run_kills, run_power_losses

SEED = int(os.environ.get("ATTNSTORE_TEST_SEED", "0"))


def check_kills(outcome: Outcome, tried: int) -> None:
    """Processes were killed while they did something, and nothing that was acknowledged got lost."""
    assert not outcome.wrong, str(outcome)
    assert outcome.tried == tried
    assert {part.fault for part in outcome.parts} == {INSTANT, BETWEEN, HALFWAY}
    assert all(part.recomputed > 0 for part in outcome.parts), "no kill of that kind cost anything"
    assert outcome.counts["in the middle of work"] > tried / 2
    assert outcome.served > tried


def check_losses(outcome: Outcome, tried: int) -> None:
    """Things were damaged that somebody used, and nothing wrong was served."""
    assert not outcome.wrong, str(outcome)
    assert outcome.tried == tried
    assert {part.fault for part in outcome.parts} == set(LOSSES)
    assert outcome.counts["damaged blocks"] > 0
    assert outcome.counts["blocks refused"] > 0
    assert outcome.counts["blocks read equal"] > 10 * tried
    assert outcome.recomputed > 0
    assert outcome.served > tried


def test_a_killed_process_leaves_every_acknowledged_turn_and_a_store_in_order(tmp_path: Path) -> None:
    check_kills(run_kills(tmp_path, SEED, 50), 50)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_killed_processes_leave_every_acknowledged_turn_and_stores_in_order(tmp_path: Path) -> None:
    outcome = run_kills(tmp_path, SEED + 1, 1000)
    check_kills(outcome, 1000)
    for moment in ("opening", "working", "closing"):
        assert outcome.counts[f"while {moment}"] > 0
    for operation in ("open", "rename", "unlink", "writev", "mkdir", "SQL COMMIT", "SQL BEGIN", "SQL INSERT"):
        assert outcome.counts[f"killed at {operation}"] > 0
    assert outcome.counts["sessions cut short by eviction"] > 0
    assert outcome.counts["while two processes worked"] > 0
    assert outcome.counts["evicted blocks"] > 0


def test_a_loss_of_power_is_noticed_and_what_it_took_is_computed_again(tmp_path: Path) -> None:
    check_losses(run_power_losses(tmp_path, SEED, 24), 24)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_hundred_losses_of_power_are_noticed_and_what_they_took_is_computed_again(tmp_path: Path) -> None:
    check_losses(run_power_losses(tmp_path, SEED + 1, 504), 504)
