"""The command, in a process of its own: it is ended between two turns, and in the middle of one."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from server.conftest import Plain
from support.api_server import agreed, noted
from support.chat_fixtures import plain_answer
from support.fresh import Process
from support.turn_queue_fixtures import PATIENCE
from typer.testing import CliRunner

from hf_attnstore.cli.app import app

SAID = ["the old prince looked at the letter", "and the mother rose", "they were to march at three"]


@contextmanager
def command(model: Path, folder: Path, *more: str) -> Iterator[tuple[Process, str]]:
    """`attnstore serve`, and its address; ended by SIGTERM, unless the test has killed it."""
    options = ["--model", model, "--name", "tiny", "--store", folder, "--port", "0", "--device", "cpu", *more]
    run = "from hf_attnstore.cli.app import app; app()"
    process = Process([sys.executable, "-u", "-c", run, "serve", *options])
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("serving"))
        yield process, line.split()[-1]
        if process.poll() != -signal.SIGKILL:
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) in (0, -signal.SIGTERM)
    finally:
        process.kill()


def body(messages: Sequence[Any], **more: Any) -> dict[str, Any]:
    return {"messages": messages, "max_tokens": 12, "temperature": 0, **more}


def test_conversations_go_on_after_restarts_by_content_and_by_name(
    model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    talks: dict[str, Any] = {"": ([], []), "alice": ([], [])}
    for number, text in enumerate(SAID):
        with command(model_folder, tmp_path / "store") as (_, url):
            for name, (messages, known) in talks.items():
                messages.append({"role": "user", "content": f"{text} {name}"})
                ids = plain.prompt(messages)
                expected = plain_answer(plain.model, ids, max_new_tokens=12, do_sample=False)
                named = {"prompt_cache_key": name} if name else {}
                answer = httpx.post(f"{url}/chat/completions", json=body(messages, **named), timeout=PATIENCE)
                content = answer.json()["choices"][0]["message"]["content"]
                assert content == plain.text(expected)
                said = noted(answer.headers["x-attnstore"])
                if number:
                    assert said["reused"] == str(agreed([known], ids))
                    assert said["tier"].startswith("disk")
                known[:] = [*ids, *expected[:-1]]
                messages.append({"role": "assistant", "content": content})


@pytest.mark.parametrize("batched", [[], ["--continuous-batching"]], ids=["queue", "batches"])
def test_an_answer_that_is_being_made_comes_to_its_end_and_is_kept(
    batched: list[str], model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    messages = [{"role": "user", "content": SAID[0]}]
    ids = plain.prompt(messages)
    expected = plain_answer(plain.model, ids, max_new_tokens=300, do_sample=False)
    heard = ""
    with (
        command(model_folder, tmp_path / "store", *batched) as (process, url),
        httpx.stream(
            "POST", f"{url}/chat/completions", json=body(messages, max_tokens=300, stream=True), timeout=PATIENCE
        ) as stream,
    ):
        lines = stream.iter_lines()
        for line in lines:
            if re.search('"content":"', line):
                heard += json.loads(line[6:])["choices"][0]["delta"]["content"]
                process.send_signal(signal.SIGTERM)
                break
        for line in lines:
            if line.startswith("data: {"):
                heard += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert heard == plain.text(expected)
    with command(model_folder, tmp_path / "store", "--no-warm-up", *batched) as (_, url):
        again = httpx.post(f"{url}/chat/completions", json=body(messages, max_tokens=2), timeout=PATIENCE)
    assert noted(again.headers["x-attnstore"])["reused"] == str(len(ids) - 1)


def test_mistakes_in_the_command_line_are_one_line(model_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("")
    for options, said in (
        (["--keys", str(empty)], "there are no keys"),
        (["--chat-template-kwargs", "[]"], "is a JSON object"),
        (["--model", str(tmp_path / "none"), "--port", "0"], "there is no folder"),
        (["--host", "203.0.113.1"], "can't listen"),
    ):
        result = CliRunner().invoke(app, ["serve", *options], env={"COLUMNS": "200"})
        assert result.exit_code == 1
        assert said in result.output
        assert "Traceback" not in result.output
