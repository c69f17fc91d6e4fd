"""`attnstore bench gate` on a tiny model: the crossover really happens, and the report says what was measured."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cli.app import app
from hf_attnstore.lab.bench import gate_bench
from hf_attnstore.lab.bench.gate_bench import METHODS, Cell, Tier
from hf_attnstore.lab.bench.gate_report import mean_regret, rows, worst
from hf_attnstore.lab.bench.shapes import BenchError, choose_model, load_model, random_ids


def test_regret_is_against_the_better_of_both() -> None:
    cell = Cell("disk", None, 100)
    cell.ttft = {"load": [1.0, 3.0, 2.0], "recompute": [4.0, 4.0, 5.0], "gate": [2.2, 2.0, 9.0], "plain": [4.0] * 3}
    cell.reused = [100, 100, 0]
    assert cell.best == 2.0
    assert cell.regret == pytest.approx(0.1)
    assert cell.choice_regret == pytest.approx(statistics.mean([2.0, 2.0, 4.0]) / 2 - 1)
    assert cell.better_chosen == 2
    other = Cell("memory", None, 100, {method: [1.0] for method in METHODS}, [100])
    assert mean_regret([cell, other]) == pytest.approx(0.05)
    assert worst([cell, other]) is cell
    assert rows([cell])[0] == ("disk", "100", "2,000.0", "4,000.0", "2,200.0", "4,000.0", "100", "+10.0%", "+33.3%")


def test_tiers_have_names() -> None:
    labels = [tier.label for tier in (Tier("memory"), Tier("disk"), Tier("disk", 2.5e6))]
    assert labels == ["memory", "disk, warm", "disk at 2.5 MB/s"]


def test_what_comes_from_another_tier_is_no_figure_of_this_one(tmp_path: Path) -> None:
    model = load_model(choose_model("tiny", None, device="cpu", max_tokens=128))
    ids = random_ids(model, 64, (0,))
    with AttentionStore(tmp_path) as store:
        model.generate(ids, past_key_values=AttentionStoreCache(model, store=store), max_new_tokens=1)
    slow = AttentionStore(tmp_path, memory=0)
    with slow as store, pytest.raises(BenchError, match=r"^memory: blocks came from \['disk'\], not from memory alone"):
        gate_bench._tier(model, store, Tier("memory"), {64: ids}, 8, 1, 0, print)


def test_the_gate_bench_in_small(tmp_path: Path) -> None:
    arguments = ["bench", "gate", "--shape", "tiny", "--history", "64", "--history", "200", "--new", "8"]
    arguments += ["--bandwidth", "0.2", "--repeats", "2", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "gate.json").read_text())
    assert [(cell["tier"], cell["history"]) for cell in record["cells"]] == [
        (tier, history) for tier in ("memory", "disk, warm", "disk at 0.2 MB/s") for history in (64, 200)
    ]
    slow = record["cells"][-1]
    # 200 tokens of 512 bytes each at 0.2 MB/s: loading is hopeless, and the gate knows
    assert min(slow["ttft"]["load"]) > 0.5
    assert slow["reused"] == [0, 0]
    assert slow["reason"].startswith("reuse 0 of 200: load ")
    assert re.search(r"\| disk at 0.2 MB/s \| 200 \|", (tmp_path / "gate.md").read_text())
    assert (tmp_path / "gate.png").stat().st_size > 10_000
