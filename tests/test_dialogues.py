"""Whole conversations through SmolLM2, token by token beside a kept cache and plain `generate`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import save_tiny_chat_model
from typer.testing import CliRunner

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.chat.model import load_chat_model
from hf_attnstore.chat.transcript import Transcript, encode
from hf_attnstore.cli import app as cli
from hf_attnstore.lab.bench import retokenised
from hf_attnstore.lab.bench.dialogues import ANOTHER, DIALOGUES, Answer, Study, study
from hf_attnstore.lab.demo.kept import KeptCache

KINDS = ["turn"] * 3 + ["fork", "again", "sampled", "edited"]


def assert_all_reused(result: Study) -> None:
    """Every answer but each conversation's first one reused all that was known, and loaded it."""
    for answer in result.answers:
        assert answer.reused_tokens >= max(answer.known_tokens - 1, 0)
        assert (answer.loaded_bytes > 0) == (answer.reused_tokens > 0)
    assert sum(answer.reused_tokens == 0 for answer in result.answers) <= result.dialogues


@pytest.mark.timeout(900)
def test_five_dialogues_with_smollm2_are_those_of_plain_generate(
    tmp_path: Path, real_model_folder: Callable[[str], Path]
) -> None:
    model, tokenizer = load_chat_model(real_model_folder("smollm2"), dtype="float32")
    result = study(model, tokenizer, [messages[:2] for messages in DIALOGUES], tmp_path, max_new_tokens=3)
    assert [answer.kind for answer in result.answers] == KINDS[1:] * 5
    assert all(answer.as_kept for answer in result.answers)
    assert all(answer.as_plain for answer in result.answers if answer.kind != "sampled")
    assert_all_reused(result)


def test_what_was_known_and_computed_leaves_the_last_token_out() -> None:
    reused = [Answer("turn", 10, known, 7, 0, 4, as_kept=True, as_plain=None) for known in (10, 8, 7, 0)]
    assert [answer.known_but_computed for answer in reused] == [2, 0, 0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_dialogues_are_a_kept_caches_in_any_dtype(dtype: str, tmp_path: Path) -> None:
    model, tokenizer = load_chat_model(save_tiny_chat_model(tmp_path / "model"), dtype=dtype)
    result = study(model, tokenizer, DIALOGUES[:2], tmp_path / "store", max_new_tokens=8)
    summary = result.summary()
    assert [answer.kind for answer in result.answers] == KINDS * 2
    assert summary["not_as_kept"] == 0
    assert summary["not_as_plain"] == 0 or dtype == "bfloat16"
    assert summary["reused_tokens"] > summary["prompt_tokens"] / 2
    assert_all_reused(result)


def test_in_a_shared_store_a_dialogue_is_that_of_a_kept_cache_that_is_split_alike(tmp_path: Path) -> None:
    model, tokenizer = load_chat_model(save_tiny_chat_model(tmp_path / "model"), dtype="bfloat16")
    begun = [(f"the old prince looked at the {text}", "and then?", "so?") for text in ("letter", "room", "old room")]
    result = study(model, tokenizer, begun, tmp_path / "store", max_new_tokens=8, plain=False, one_store=True)
    first = result.answers[:: len(KINDS)]
    assert [answer.reused_tokens > 0 for answer in first] == [False, True, True]
    assert result.summary()["not_as_kept"] == 0


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_reads_dialogues_and_fails_for_one_wrong_token(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    right = KeptCache.answer

    def answer(self: KeptCache, *args: Any, **kwargs: Any) -> list[int]:
        *tokens, last = right(self, *args, **kwargs)
        return [*tokens, last + 1]

    if wrong:
        monkeypatch.setattr(KeptCache, "answer", answer)
    with gzip.open(tmp_path / "said.jsonl.gz", "wt") as file:
        for text in ("the letter", "the room", "the prince"):
            print(json.dumps({"history": [{"user": text, "bot": "so"}]}), file=file)
    command = ["lab", "dialogues", "--model", str(model), "--data", str(tmp_path / "said.jsonl.gz")]
    command += ["--max-new-tokens", "4", "--every", "2", "--output", str(tmp_path / "out.json")]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == int(wrong), done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["dialogues"], report["answers"]) == (2, 8)
    assert report["not_as_kept"] == (8 if wrong else 0)
    assert len(report["each"]) == 8
    assert report["kept_not_as_plain"] == (6 if wrong else 0)


def test_a_study_goes_on_where_one_ended_and_the_same_comes_out(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    said, out = tmp_path / "said.jsonl", tmp_path / "out.json"
    said.write_text("".join(json.dumps({"history": [{"user": t}, {"user": "and"}]}) + "\n" for t in ("the room", "so")))
    command = ["lab", "dialogues", "--model", str(model), "--data", str(said), "--max-new-tokens", "4", "--turns", "1"]
    for file, count in ((out, 1), (out, 2), (tmp_path / "whole.json", 2)):
        done = CliRunner().invoke(cli.app, [*command, "--output", str(file), "--count", str(count)])
        assert done.exit_code == 0, done.output
        report = json.loads(file.read_text())
        assert report["dialogues"] == count
        assert report["kinds"] == dict.fromkeys(("turn", "fork", "again", "sampled"), count)
    assert json.loads(out.read_text())["each"][:4] == report["each"][:4]
    others = CliRunner().invoke(cli.app, [*command, "--output", str(out), "--max-new-tokens", "5"])
    assert others.exit_code == 2
    assert "answers of 4 tokens" in others.output


def test_what_a_returned_text_costs_is_what_the_store_reuses(tmp_path: Path) -> None:
    model, tokenizer = load_chat_model(save_tiny_chat_model(tmp_path / "model"))
    opened = Transcript().added("the old prince", "user")
    prompt = encode(tokenizer, retokenised._rendered(tokenizer, opened))
    answer = tuple(encode(tokenizer, letter)[0] for letter in "letter")
    found = retokenised._returned(tokenizer, opened, prompt, answer)
    known = prompt + answer
    whole = opened.closed().answered(
        "the old prince", opened.prompt(retokenised._rendered(tokenizer, opened), tokenizer), answer, tokenizer
    )
    sent = encode(tokenizer, retokenised._rendered(tokenizer, whole.added(ANOTHER, "user")))
    assert found.as_text < found.known == len(known)
    assert found.in_session == len(known)
    for resegment, expected in ((False, found.as_text), (True, found.resegmented)):
        with AttentionStore(tmp_path / f"store {resegment}") as store, torch.no_grad():
            cache = AttentionStoreCache(model, "alice", store)
            model(input_ids=torch.tensor([known]), past_key_values=cache)
            cache.save()
            del cache
            options = {"resegment": True, "tokenizer": tokenizer} if resegment else {}
            cache = AttentionStoreCache(model, "alice", store, **options)
            ids = torch.tensor([sent])
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1)
            assert cache.stats.reused_tokens == expected


def test_sampled_answers_of_a_model_without_a_chat_template_are_counted(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model", template=None)
    command = ["lab", "retokenise", "--model", str(model), "--max-new-tokens", "12", "--batch", "2"]
    done = CliRunner().invoke(cli.app, [*command, "--output", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["answers"] == len(report["each"]) == len(DIALOGUES)
    assert 0 < report["otherwise"] <= report["answers"]
    assert report["computed_again_as_text"] >= report["otherwise"]
    assert report["computed_again_in_session"] == 0
    assert report["computed_again_resegmented"] <= report["computed_again_as_text"]
