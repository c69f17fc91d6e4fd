"""`attnstore sim`, on little."""

import json
from pathlib import Path

import pytest
from test_sim_traces import AGENT, MOONCAKE, write
from typer.testing import CliRunner

from hf_attnstore.cli.app import app

runner = CliRunner()


def run(*arguments: object) -> str:
    result = runner.invoke(app, ["sim", *map(str, arguments)], env={"COLUMNS": "250"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_paper(tmp_path: Path) -> None:
    shown = run("paper", "--model", 3, "--sessions", 20, "--policy", "lru", "--json", tmp_path / "out.json")
    assert "Falcon-40B, recompute" in shown
    assert "Falcon-40B, lru" in shown
    recompute, lru = json.loads((tmp_path / "out.json").read_text())
    assert recompute["found"]["token_hit_rate"] == 0
    assert lru["found"]["token_hit_rate"] == 1
    assert lru["found"]["ttft_mean"] < recompute["found"]["ttft_mean"]


def test_trace(tmp_path: Path) -> None:
    file = write(tmp_path / "m.jsonl", MOONCAKE)
    shown = run(
        "trace", file, "--capacity", 50, "--capacity", 100, "--policy", "lru", "--policy", "optimum", "--serve", 2
    )
    assert "0.480" in shown  # 6 of 12.5 blocks
    assert "recompute" in shown
    assert "50 %" in shown


def test_replay(tmp_path: Path) -> None:
    shown = run("replay", write(tmp_path / "m.jsonl", MOONCAKE), "--memory", 80, "--policy", "lru", "--check")
    assert "lru" in shown
    assert "3 turns" in shown  # those of the conversation that has several


def test_replay_with_a_model(tmp_path: Path) -> None:
    file = write(tmp_path / "m.jsonl", MOONCAKE)
    shown = run("replay", file, "--memory", 80, "--policy", "lru", "--shape", "tiny", "--check")
    assert "lru, tiny model" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trace", "nowhere.jsonl"], "can't be read"),
        (["trace", "nowhere.jsonl", "--format", "csv"], "--format is"),
        (["paper", "--policy", "best"], "no policy 'best'"),
        (["replay", "--shape", "tiny"], "--shape needs a trace"),
    ],
)
def test_mistakes_are_said_in_a_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["sim", *arguments], env={"COLUMNS": "250"})
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_report(tmp_path: Path) -> None:
    agent = write(tmp_path / "a.jsonl", AGENT)
    out = tmp_path / "out"
    little = ("--sessions", 12, "--agent-block-tokens", 256, "--live-sessions", 6, "--jobs", 1)
    run("report", "--agent", agent, "--output", out, *little)
    text = (out / "hierarchy.md").read_text()
    assert "LLaMA-2 13B" in text
    assert "Sessions of coding agents" in text
    assert "no `--mooncake` was given" in text
    assert "They agree after every turn" in text
    assert str(tmp_path) not in text
    assert "## What was to be reached" in text
    record = json.loads((out / "hierarchy.json").read_text())
    assert str(tmp_path) not in json.dumps(record["runs"])
    assert (out / "hierarchy.png").stat().st_size > 10_000
    assert (out / "hierarchy-sessions-of-coding-agents.png").exists()
