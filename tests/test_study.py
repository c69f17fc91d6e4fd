"""The truncation study: that it measures what it says, and that moved keys lose nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support.chat_fixtures import save_tiny_chat_model
from typer.testing import CliRunner

from hf_attnstore.chat.model import load_chat_model, small_model_path
from hf_attnstore.cli import app as cli
from hf_attnstore.lab.bench import study
from hf_attnstore.lab.bench.shapes import BenchError, choose_model, load_model
from hf_attnstore.lab.bench.study import METHODS, SYSTEM, Stream, leading, own_text, resume, stream, tokenised
from hf_attnstore.lab.bench.study_parts import parts


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


def test_what_stays_says_the_same_moved_and_not_and_all_computed_anew_is_computed_anew() -> None:
    model = load_model(choose_model("tiny", None, device="cpu", max_tokens=512))
    ids = own_text(model, 97, seed=1)
    found = parts(model, ids, window=80, chunk=16, keep_first=0)
    assert found["moved"] == pytest.approx(found["kept"], abs=1e-4)  # every distance is what it was
    assert found["kept, 64 next to the first anew"] == pytest.approx(found["computed anew"], abs=1e-4)  # 40 stay
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits[0, 80:]
    assert found["nothing dropped"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, ids[0, 81:])), abs=1e-4
    )
    assert len({round(value, 3) for value in found.values()}) == 3


def test_what_a_window_is_filled_with_is_not_predicted_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(choose_model("tiny", None, device="cpu", max_tokens=512))
    ids = own_text(model, 230, seed=3)
    at_once = stream(model, ids, "CA", window=100, chunk=16, keep_first=4)
    monkeypatch.setattr(study, "_FILLING", 16)
    by_chunks = stream(model, ids, "CA", window=100, chunk=16, keep_first=4)
    assert at_once.tokens == by_chunks.tokens
    assert at_once.truncations == by_chunks.truncations > 1
    assert at_once.nats == pytest.approx(by_chunks.nats, abs=1e-3)


def test_the_system_part_of_dialogues_is_kept_and_other_texts_have_none(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    tokenizer = load_chat_model(str(model))[1]
    dialogues, text = tmp_path / "said.jsonl", tmp_path / "text.txt"
    dialogues.write_text(
        '{"history": [{"user": "One day.", "bot": "So?"}, {"user": "Another.", "bot": "Well."}]}\n' * 20
    )
    text.write_text("the old prince looked at the letter and said nothing " * 40)
    kept = leading(tokenizer, dialogues, SYSTEM)
    assert kept is not None
    ids = tokenised(tokenizer, dialogues, by_paragraph=False)[0]
    assert "One" in tokenizer.decode(ids[kept : kept + 8])
    assert "One" not in tokenizer.decode(ids[:kept])
    assert leading(tokenizer, text, SYSTEM) is None
    assert leading(tokenizer, text, 4) == leading(tokenizer, dialogues, 4) == 4
    arguments = ["lab", "truncation", "--model", str(model), "--dtype", "float32", "--chunk", "16", "--window", "64"]
    arguments += ["--resume-shape", "none", "--output", str(tmp_path), "--tokens", "150", "--text", str(text)]
    arguments += ["--text", str(dialogues), "--run", "CA:4", "--run", "CA:system"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "truncation-model.json").read_text())
    assert [set(found["by_text"]) for found in record["streams"]] == [{"text.txt", "said.jsonl"}, {"said.jsonl"}]
    assert re.search(r"CA, system part kept \| – \| \d", (tmp_path / "truncation-model.md").read_text())


def test_what_was_measured_is_written_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the old prince looked at the letter and said nothing " * 40)

    def cut_off(*args: object, **options: object) -> Stream:
        if args[2] == "CA":
            raise KeyboardInterrupt
        return stream(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(study, "stream", cut_off)
    arguments = ["lab", "truncation", "--model", str(model), "--dtype", "float32", "--chunk", "16", "--window", "64"]
    arguments += ["--resume-shape", "none", "--output", str(tmp_path), "--tokens", "150"]
    arguments += ["--text", str(tmp_path / "text.txt"), "--run", "TT:1", "--run", "CA:1"]
    assert CliRunner().invoke(cli.app, arguments).exit_code != 0
    record = json.loads((tmp_path / "truncation-model.json").read_text())
    assert [(found["method"], list(found["by_text"])) for found in record["streams"]] == [("TT", ["text.txt"])]


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
    dialogues = tmp_path / "said.jsonl"
    dialogues.write_text(
        '{"history": [{"user": "One day.", "bot": "So?"}, {"user": "Another.", "bot": "Well."}]}\n' * 2
    )
    said = tokenizer.decode(tokenised(tokenizer, dialogues, by_paragraph=False)[0], skip_special_tokens=True)
    places = [said.find(text) for text in ("One day.", "So?", "Another.", "Well.")]
    assert 0 <= places[0] < places[1] < places[2] < places[3] < said.rfind("One day.")
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


def test_single_truncations_are_taken_apart_by_the_command(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the old prince looked at the letter and said nothing " * 40)
    arguments = ["lab", "truncation", "--model", str(model), "--dtype", "float32", "--chunk", "16", "--parts", "2"]
    arguments += ["--text", str(tmp_path / "text.txt")]
    result = CliRunner().invoke(cli.app, [*arguments, "--window", "64"])
    assert result.exit_code == 0, result.output
    assert "each of 2 truncations" in result.output
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_the_published_results_are_of_the_small_model() -> None:
    record = json.loads((small_model_path().parents[1] / "docs/results/truncation-small-model.json").read_text())
    by_name = {(found["method"], found["keep_first"]): found["perplexity"] for found in record["streams"]}
    assert abs(by_name["CA", 0] - by_name["TT", 0]) < 0.02 * by_name["TT", 0]
    assert by_name["NKVT", 0] > 1.2 * by_name["TT", 0]
    assert torch.tensor(record["streams"][0]["tokens"]).sum() > 30_000


def test_single_methods_are_run_over_several_texts(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    arguments = ["lab", "truncation", "--model", str(model), "--dtype", "float32", "--chunk", "16", "--window", "64"]
    arguments += ["--resume-shape", "none", "--output", str(tmp_path)]
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"the old {name} looked at the letter and said nothing " * 40)
        arguments += ["--text", str(tmp_path / f"{name}.txt")]
    result = CliRunner().invoke(cli.app, [*arguments, "--tokens", "200", "--run", "TT:1", "--run", "CA:4"])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "truncation-model.json").read_text())
    assert [(found["method"], found["keep_first"]) for found in record["streams"]] == [("TT", 1), ("CA", 4)]
    assert all(set(found["by_text"]) == {"one.txt", "two.txt"} for found in record["streams"])
    assert "two.txt" in (tmp_path / "truncation-model.md").read_text()
    for wrong in ("CA", "XX:1", "CA:x", "CA:system"):  # no text here has messages
        assert CliRunner().invoke(cli.app, [*arguments, "--run", wrong]).exit_code == 2
