"""`attnstore bench codecs`: what it says of codecs is what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import make_model, tokens
from typer.testing import CliRunner

from hf_attnstore.cli.app import app
from hf_attnstore.lab.bench import codec_bench
from hf_attnstore.lab.bench.codec_bench import KEPT, quality, resume


def test_finer_codecs_change_less_and_raw_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = quality(make_model(), None, [tokens(300)], ["raw", "fp16", "int8", "int4"], 256, 4, lambda what: None)
    assert list(found) == [
        "fp16",
        "int8",
        "int4",
        "q8_0 (llama.cpp)",
        "q4_0 (llama.cpp)",
        "4 bits by token (quanto's axis 0)",
    ]
    assert 0 <= found["fp16"].kl[0] < found["int8"].kl[0] < found["int4"].kl[0]
    assert found["fp16"].bytes == 0.5
    assert 0.25 < found["int8"].bytes < 0.31
    assert 0.125 < found["int4"].bytes < 0.2
    assert found["fp16"].top == [1.0]
    assert all(len(one.same) == 1 for one in found.values())


def test_each_codec_is_resumed_from_each_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    found = resume(
        make_model(), tokens(300), ["raw", "int8"], ["memory", "page cache", "1 GB/s"], 20, 2, lambda what: None
    )
    assert found.history == 280
    assert {medium: {name: len(all_) for name, all_ in times.items()} for medium, times in found.seconds.items()} == {
        medium: {"raw": 2, "int8": 2, KEPT: 2} for medium in ("memory", "page cache", "1 GB/s")
    }
    assert found.ratio("memory", "raw") == found.loading_ratio("1 GB/s", "raw") == 1.0
    assert all(
        0 < loading < whole
        for loading, whole in zip(found.loading["memory"]["int8"], found.seconds["memory"]["int8"], strict=True)
    )
    config = make_model().config
    by_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert found.raw_bytes == 280 * by_token


def test_halves_are_measured_apart_and_put_into_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_bench, "CODECS", ("raw", "int8"))
    monkeypatch.setattr(codec_bench, "MEDIA", {"memory": None})
    common = "bench codecs --history 256 --scored 32 --texts 1 --answers 2 --no-floor --output".split()

    def measured(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*common, str(tmp_path), *arguments])
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "codecs-small-model.json").read_text())

    first = measured("--only", "quality")
    assert first["resumed"] == {}
    second = measured("--only", "speed", "--repeats", "1", "--new", "8")
    assert second["quality"] == first["quality"]
    assert second["resumed"]["float32, 256 tokens"]["new"] == 8
    codecs = measured("--only", "quality", "--codec", "int4")["quality"]["float32"]["codecs"]
    assert codecs.items() >= first["quality"]["float32"]["codecs"].items()
    assert codecs["int8"]["kl"][0] < codecs["int4"]["kl"][0]
    report = (tmp_path / "codecs-small-model.md").read_text()
    assert "| int8 |" in report
    assert "| nothing to load |" in report
    assert (tmp_path / "codecs-small-model.png").exists()
    (tmp_path / "codecs-small-model.json").write_text("no")
    assert CliRunner().invoke(app, [*common, str(tmp_path)]).exit_code == 2


def test_the_doctor_warns_above_the_bound_and_fails() -> None:
    asked = ["doctor", "--model", "small", *"--codec int4 --history 256 --scored 16 --texts 1 --bound".split()]
    for bound, code, said in (("0.00000001", 1, "more than 1e-08"), ("10", 0, "within the bound of 10")):
        done = CliRunner().invoke(app, [*asked, bound])
        assert done.exit_code == code, done.output
        assert said in " ".join(done.output.split())
        assert "int4" in done.output
        assert "q4_0" not in done.output
