"""`attnstore lab batches`: every figure of its table, by a run that is too short for most of what is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_attnstore.cli.app import app

pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")


@pytest.mark.slow
def test_figures_of_continuous_batching(tmp_path: Path) -> None:
    sizes = {"--history": 256, "--resumed": 64, "--of-users": 64, "--turns": 2, "--requests": 8, "--repeats": 1}
    options = [str(word) for pair in sizes.items() for word in pair]
    ran = CliRunner().invoke(app, ["lab", "batches", "--model", "small", *options, "--output", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    found = {
        figure["what"]: figure["value"]
        for figure in json.loads((tmp_path / "batches-small.json").read_text())["figures"]
    }
    assert found["tokens fed, new and generated"] == 1
    assert found["tokens shared between namespaces"] == found["greedy answers that are another"] == 0
    assert found["greedy answers that were compared"] == 2 * 8 + 8 * 8
    assert found["8 users, paged cache for half of them: tokens fed / plain"] < 0.5
    assert all(value > 0 for what, value in found.items() if "/" in what)
    assert "| tokens fed, new and generated | 1 | ≤ 1 | met |" in (tmp_path / "batches-small.md").read_text()
