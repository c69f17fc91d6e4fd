"""The bench of what is beyond chat: every part runs and compares outputs, and a missing package is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_attnstore.cli import app as cli
from hf_attnstore.lab.bench.beyond import PARTS
from hf_attnstore.lab.bench.beyond_cli import TITLES


def run(*options: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "beyond", "--quick", *options])


def test_each_part_makes_its_figures_and_what_can_not_be_measured_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    done = run("--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "beyond.json").read_text())
    assert {*record["parts"], *record["left_out"]} == set(PARTS) == set(TITLES)
    assert "pip install lm_eval" in record["left_out"]["scoring"]
    for figures in record["parts"].values():
        for figure in figures:
            assert all(ratio > 0 for ratio in figure["ratios"])
            assert figure["cpu"] or figure["ratios"]
    [kept] = [f for f in record["parts"]["rerank"] if f["wanted"]]
    assert kept["what"].startswith("document first, its tokens kept")
    shares = {f["what"]: f["ratio"] for f in record["parts"]["chunkers"] if "20 %" in f["against"]}
    assert 1 > shares["paragraphs"] > shares["every 256 words"] > 0
    report = (tmp_path / "beyond.md").read_text()
    assert all(TITLES[name] in report for name in record["parts"])


def test_an_unknown_part_is_said_in_one_line() -> None:
    done = run("--part", "poems")
    assert done.exit_code == 2
    assert "scoring, rerank" in done.output
