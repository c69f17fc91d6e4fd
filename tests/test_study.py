"""The truncation study: that it measures what it says, and that moved keys lose nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.chat_fixtures import save_tiny_chat_model
from typer.testing import CliRunner

from hf_attnstore.chat.model import load_chat_model, small_model_path
from hf_attnstore.cli import app as cli
from hf_attnstore.lab.bench.shapes import BenchError, choose_model, load_model
from hf_attnstore.lab.bench.study import METHODS, own_text, resume, stream, tokenised


def test_moved_keys_are_as_good_as_computed_ones_and_cut_keys_are_not() -> None:
    model, tokenizer = load_chat_model()
    ids = own_text(model, 1400, seed=1, begin=tokenizer.bos_token_id)
    found = {method: stream(model, ids, method, window=256, chunk=32) for method in METHODS}
    kept = stream(model, ids, "CA", window=256, chunk=32, keep_first=4)
    exact = found["TT"].perplexity
    assert found["CA"].perplexity == pytest.approx(exact, rel=0.02)
    assert kept.perplexity == pytest.approx(exact, rel=0.03)
    assert found["NKVT"].perplexity > 1.2 * exact
    assert found["TT"].truncations == found["CA"].truncations == found["NKVT"].truncations > 5
    assert found["CA"].prefilled == found["NKVT"].prefilled == kept.prefilled == 0
    assert found["TT"].prefilled >= 112 * found["TT"].truncations
    assert sum(found["TT"].tokens) > 1100


def test_until_the_first_truncation_all_methods_are_one() -> None:
    model, tokenizer = load_chat_model()
    ids = own_text(model, 300, seed=2, begin=tokenizer.bos_token_id)
    with pytest.raises(BenchError, match="too few"):
        stream(model, ids, "CA", window=1024, chunk=32)
    found = [stream(model, ids, method, window=256, chunk=32, keep_first=3) for method in METHODS]
    assert {len(f.nats) for f in found} == {2}


def test_resumed_turns_are_really_resumed() -> None:
    model = load_model(choose_model("tiny", None, max_tokens=600))
    found = resume(model, 256, 8, 2, 0, lambda text: None)
    assert set(found.seconds) == {"whole/memory", "whole/disk", "truncated/memory", "truncated/disk", "recompute"}
    assert all(len(seconds) == 2 for seconds in found.seconds.values())


def test_a_text_is_begun_as_the_tokenizer_begins_one(tmp_path: Path) -> None:
    _, tokenizer = load_chat_model()
    path = tmp_path / "text.txt"
    path.write_text("One day.\n\nAnother day.\n\n")
    ids = tokenised(tokenizer, path, by_paragraph=True)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == path.read_text()
    assert ids[0, 0] == tokenizer.bos_token_id
    with pytest.raises(BenchError, match="nothing"):
        tokenised(tokenizer, tmp_path / "nothing.txt", by_paragraph=False)


def test_the_command_writes_its_report(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    arguments = ["bench", "truncation", "--model", str(model), "--window", "64", "--tokens", "300", "--chunk", "16"]
    arguments += ["--dtype", "float32"]
    arguments += ["--resume-shape", "tiny", "--resume-history", "128", "--repeats", "2", "--output", str(tmp_path)]
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "truncated, from disk" in result.output
    record = json.loads((tmp_path / "truncation-model.json").read_text())
    assert [found["method"] for found in record["streams"]] == ["TT", "CA", "NKVT", "TT", "CA", "TT", "CA"]
    assert [found["keep_first"] for found in record["streams"]] == [0, 0, 0, 1, 1, 4, 4]
    assert (tmp_path / "truncation-model.png").stat().st_size > 10_000
    assert "tokens computed again" in (tmp_path / "truncation-model.md").read_text()


def test_the_published_results_are_of_the_small_model() -> None:
    record = json.loads((small_model_path().parents[1] / "docs/results/truncation-small-model.json").read_text())
    by_name = {(found["method"], found["keep_first"]): found["perplexity"] for found in record["streams"]}
    assert abs(by_name["CA", 0] - by_name["TT", 0]) < 0.02 * by_name["TT", 0]
    assert by_name["NKVT", 0] > 1.2 * by_name["TT", 0]
    assert torch.tensor(record["streams"][0]["tokens"]).sum() > 30_000
