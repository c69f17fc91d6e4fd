"""What `attnstore lab serve` makes of turns that both servers have answered."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_attnstore.cli.app import app
from hf_attnstore.lab.bench.serve_bench import Answered, Turn
from hf_attnstore.lab.bench.serve_cli import _as_markdown, _figures


def turn(ours: float, plain: float, *, restarted: bool = False, said: str = "yes") -> Turn:
    answers = [
        Answered(text=text, prompt_tokens=2048, cached_tokens=7, ttft_seconds=seconds, cpu_seconds=seconds)
        for text, seconds in ((said, ours), ("yes", plain))
    ]
    return Turn(answers[0], answers[1], restarted)


def test_figures_are_those_of_their_turns() -> None:
    turns = [turn(5.0, 5.0), turn(0.1, 5.0), turn(2.0, 5.0, restarted=True), turn(0.3, 5.0, said="no")]
    later, anew, first, other = _figures(turns, [turn(5.05, 5.0)], [turn(0.5, 5.0, restarted=True)])
    assert [figure.value for figure in (later, anew, first, other)] == pytest.approx([0.04, 0.1, 1.01, 1])
    assert [figure.met for figure in (later, anew, first, other)] == [False, False, True, False]


def test_of_what_did_not_happen_there_is_no_figure() -> None:
    (first, other) = _figures([turn(5.0, 5.0), turn(2.0, 5.0, restarted=True)], [turn(5.0, 5.0)], [])
    assert "first turn ever" in first.what
    assert other.met


def test_the_report_has_a_row_for_each_turn() -> None:
    report = _as_markdown("a model", [turn(5.0, 5.0), turn(0.5, 5.0, restarted=True)], "a machine", 0.25)
    assert "| --- | ---: |" in report
    assert "| 1 | 2,048 | 7 | 5.000 | 5.000 | 5.00 | 5.00 | 1.000 |" in report
    assert "| 2 * | 2,048 | 7 | 0.500 | 5.000 | 0.50 | 5.00 | 0.100 |" in report
    assert "25%" in report


@pytest.mark.slow
@pytest.mark.skipif(find_spec("fastapi") is None, reason="needs the extra serve")
def test_the_command_talks_to_both_servers_over_a_restart(tmp_path: Path) -> None:
    options = ["--model", "small", "--quick", "--turns", "2", "--restart-before", "2", "--output", str(tmp_path)]
    ran = CliRunner().invoke(app, ["lab", "serve", *options])
    assert ran.exit_code == 0, ran.output
    (written,) = tmp_path.glob("*.json")
    first, second = json.loads(written.read_text())["turns"]
    assert (first["restarted"], second["restarted"]) == (False, True)
    assert first["ours"]["cached_tokens"] == 0
    assert second["ours"]["cached_tokens"] >= first["ours"]["prompt_tokens"]
    assert [one["ours"]["text"] for one in (first, second)] == [one["plain"]["text"] for one in (first, second)]
