"""The comparison with other ways to resume a turn: what is measured, and what is left out with a word."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.chat_fixtures import save_tiny_chat_model
from typer.testing import CliRunner

from hf_attnstore.cli import app as cli
from hf_attnstore.lab.bench.llama_server import Reply
from hf_attnstore.lab.bench.measure import Workload
from hf_attnstore.lab.bench.peers import edited_in_llama_cpp, in_llama_cpp
from hf_attnstore.lab.bench.shapes import BenchError


class Slot:
    """A server that takes a second for each token it computes, and a tenth of one to restore its slot."""

    def __init__(self, forgets: bool = False) -> None:
        self.held: list[int] = []
        self.files: dict[str, list[int]] = {}
        self.forgets = forgets

    def answer(self, ids: Sequence[int]) -> Reply:
        pairs = zip(self.held, ids, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.held), len(ids)))
        self.held = list(ids)
        return Reply(float(len(ids) - same), same, len(ids) - same)

    def save(self, name: str) -> int:
        self.files[name] = self.held[:-1] if self.forgets else self.held
        return 100 * len(self.held)

    def restore(self, name: str) -> float:
        self.held = self.files[name]
        return 0.1

    def erase(self) -> None:
        self.held = []


def test_a_slot_is_measured_kept_restored_and_empty() -> None:
    server: Any = Slot()
    row = in_llama_cpp(server, range(20), Workload(20, 4, 1, 3, 0), vocabulary=1000)
    assert (row.kept, row.recomputed) == ([4.0] * 3, [24.0] * 3)
    assert row.resumed == [4.1] * 3
    assert (row.against_kept, row.against_recompute) == (4.1 / 4, 4.1 / 24)
    assert row.bytes_per_token == 100
    assert edited_in_llama_cpp(server, range(20)) == 10


def test_a_server_that_reuses_less_than_it_should_is_no_figure() -> None:
    server: Any = Slot(forgets=True)
    with pytest.raises(BenchError, match="reused 19 tokens of 20"):
        in_llama_cpp(server, range(20), Workload(20, 4, 1, 3, 0), vocabulary=1000)


def test_peers_are_measured_by_one_command_and_a_missing_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # as if it were not installed
    model = save_tiny_chat_model(tmp_path / "model")
    command = ["bench", "peers", "--model", str(model), "--history", "64", "--new", "4", "--repeats", "2"]
    command += ["--threads", "1", "--output", str(tmp_path / "peers.json")]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "pip install xllamacpp" in done.output
    record = json.loads((tmp_path / "peers.json").read_text())
    titles = [row["title"].partition(",")[0] for row in record["rows"]]
    assert titles == ["hf-attnstore"] * 3 + ["torch.save by hand", "safetensors by hand"]
    assert all(len(row[name]) == 2 for row in record["rows"] for name in ("resumed", "kept", "recomputed"))
    assert "xllamacpp" in record["left_out"]
