"""`attnstore bench queue`: what it counts, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_attnstore.cache.stats import TurnStats
from hf_attnstore.cli.app import app
from hf_attnstore.lab.bench.queue_bench import WAYS, Way, _count, decisions
from hf_attnstore.store.eviction.policies import POLICIES


def test_sessions_take_turns_with_a_queue_and_without(tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--sessions", "4", "--room", "2", "--history", "300", "--new", "8", "--decode", "4"]
    options += ["--rounds", "2", "--blocks", "500", "--device", "cpu"]
    ran = CliRunner().invoke(app, ["bench", "queue", *options, "--output", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    record = json.loads((tmp_path / "queue.json").read_text())
    assert list(record["ways"]) == list(WAYS)
    for way in record["ways"].values():
        assert way["turns"] == len(way["exposed"]) == 8
        assert way["recomputed"] == 0
        assert way["blocks"] == 16, "two blocks of each session, in every turn"
        assert 0 <= way["blocks_in_memory"] <= way["blocks"]
        assert way["in_memory"] == way["whole"] / 8
    assert {decision["policy"] for decision in record["decisions"]} == set(POLICIES)
    report = (tmp_path / "queue.md").read_text()
    assert all(f"| {way} |" in report for way in WAYS)


def test_a_turn_counts_as_found_only_if_all_of_it_was() -> None:
    way = Way()
    for blocks in ({"memory": 3}, {"memory": 2, "disk": 1}, {"device": 2}, {"disk": 2}, {}):
        _count(way, TurnStats(reused_tokens=100 if blocks else 0, blocks_from=blocks))
    assert (way.turns, way.whole, way.recomputed) == (5, 2, 1)
    assert way.in_memory == pytest.approx(0.4)
    assert (way.blocks_in_memory, way.blocks) == (7, 10)


def test_decisions_are_timed_in_a_full_tier() -> None:
    [found] = decisions(100, 50, lambda what: None, ["lru"])
    assert found.blocks == 100
    assert 0 < found.median < 1
