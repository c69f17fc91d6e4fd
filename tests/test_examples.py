"""Every example runs, against the small model, as a reader would run it, and reuses what it says that it does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from support import fresh

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.skipif(
    not (EXAMPLES / "small-model" / "config.json").is_file(), reason="the small model is not in this checkout"
)


ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "ATTNSTORE_GATE": "off",  # what is reused is not to depend on how fast this machine is today
}


class Turn(NamedTuple):
    """What an example printed about one turn."""

    reused: int
    prompt: int
    prefilled: int


def run(name: str, *arguments: str | Path, typed: str = "") -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = fresh.run(command, input=typed, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr
    return done.stdout


def turns(output: str) -> list[Turn]:
    """The turns in what an example printed; each says what it took."""
    found = re.findall(r"reused ([\d,]+) of ([\d,]+) tokens, prefilled ([\d,]+)", output)
    assert found
    parsed = [Turn(*(int(number.replace(",", "")) for number in numbers)) for numbers in found]
    assert all(turn.reused + turn.prefilled == turn.prompt for turn in parsed)
    return parsed


def without_numbers(output: str) -> list[str]:
    """What was said, without the lines that say what it took."""
    return [line for line in output.splitlines() if "prefilled" not in line]


def test_generate_reuses_its_prompt_when_it_is_run_again(tmp_path: Path) -> None:
    first, second = run("generate.py", "--store", tmp_path), run("generate.py", "--store", tmp_path)
    [(nothing, prompt, _)] = turns(first)
    assert (nothing, turns(second)) == (0, [(prompt - 1, prompt, 1)])
    assert without_numbers(first) == without_numbers(second)
    assert without_numbers(first)[0].strip()
    assert "from disk, first token after" in second


def test_chat_goes_on_when_it_is_run_again(tmp_path: Path) -> None:
    first = run("chat_cli.py", "--store", tmp_path, typed="Who came in, and what did he say?\n\nAnd then?\n")
    second = run("chat_cli.py", "--store", tmp_path, typed="What did the prince answer?\n")
    opening, after_one = turns(first)
    [after_two] = turns(second)
    assert opening.reused == 0
    assert opening.prompt < after_one.reused < after_one.prompt < after_two.reused
    assert after_two.prefilled < 20
    assert "tokens/s" in second


def test_a_system_prompt_is_computed_and_stored_once(tmp_path: Path) -> None:
    output = run("shared_system_prompt.py", "--store", tmp_path)
    first, *others = turns(output)
    assert first.reused == 0
    assert len(others) == 2
    for turn in others:
        assert turn.reused > 500  # the system prompt, to the token
        assert turn.prefilled < 30
    [(together, apart)] = re.findall(r"on disk: ([\d,]+) bytes .* would take ([\d,]+)", output)
    assert int(together.replace(",", "")) < int(apart.replace(",", "")) / 2


def test_a_document_is_there_for_other_questions_on_another_day(tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("The count had sold the wood, and nobody in the house dared to speak of it. " * 20)
    monday = run("long_document.py", document, "--store", tmp_path / "store", "--ask", "Who sold it?", "And what?")
    tuesday = run("long_document.py", document, "--store", tmp_path / "store", "--ask", "Who dared?", "Who sold it?")
    first, second = turns(monday)
    other, same = turns(tuesday)
    assert first.reused == 0
    assert first.prompt > 300
    for turn in (second, other):
        assert turn.prefilled < 15
    assert same == (first.prompt - 1, first.prompt, 1)
    assert without_numbers(monday)[:2] == without_numbers(tuesday)[3:5]  # the same question, the same answer


def test_rows_of_a_batch_go_on(tmp_path: Path) -> None:
    output = turns(run("batch.py", "--store", tmp_path))
    (*opening, all_opening), (*later, all_later) = output[:4], output[4:]
    assert [turn.reused for turn in opening[:1]] == [0]
    for before, after in zip(opening, later, strict=True):
        assert after.reused >= before.prompt
    assert len({turn.prefilled for turn in later}) == 1  # as many columns for all
    for rows, whole in ((opening, all_opening), (later, all_later)):
        assert whole == tuple(map(sum, zip(*rows, strict=True)))


def test_an_agent_computes_what_is_new_and_its_branches_nothing_again(tmp_path: Path) -> None:
    first, second = run("agent_loop.py", "--store", tmp_path), run("agent_loop.py", "--store", tmp_path)
    size = (EXAMPLES / "small-model" / "model.safetensors").stat().st_size
    assert f"model.safetensors {size}\n" in first  # what the tools gave
    assert "\n4.00217\n" in first
    task, listed, calculated, *branches = turns(first)
    assert task.reused == 0
    assert task.prompt < listed.reused < listed.prompt < calculated.reused < calculated.prompt
    assert len(branches) == 2
    for turn in branches:
        assert turn.reused > calculated.prompt
        assert turn.prefilled < 20
    again = turns(second)
    assert [turn.prompt for turn in again] == [turn.prompt for turn in turns(first)]
    assert {turn.prefilled for turn in again} == {1}  # a run of the same steps finds them by content


def test_an_agent_uses_the_roles_of_a_template_with_tools(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EXAMPLES / "small-model", model)
    (model / "chat_template.jinja").write_text(
        "{{- bos_token -}}{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}"
        "{%- for message in messages -%}{%- if message.role == 'tool' -%}"
        "{{- '<|user|>(a tool gave) ' + message.content + '<|end|>' -}}{%- else -%}"
        "{{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 2048  # descriptions of tools are long in this model's tokens
    (model / "config.json").write_text(json.dumps(config))
    output = run("agent_loop.py", "--model", model, "--store", tmp_path / "store", "--scripted")
    assert "\ntool: 4.00217\n" in output
    task, listed, calculated, *branches = turns(output)
    assert task.reused == 0
    assert task.prompt < listed.reused < listed.prompt < calculated.reused
    assert [turn.prefilled < 20 for turn in branches] == [True, True]


def test_the_demo_in_the_browser_serves_its_page_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the page needs the extra ui")
    command = [sys.executable, "-u", str(EXAMPLES / "gradio_demo.py"), "--store", str(tmp_path), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as demo:
        try:
            assert demo.stdout is not None
            address = demo.stdout.readline().strip()
            with urllib.request.urlopen(address, timeout=60) as page:
                assert "HttpOnly" in page.headers["set-cookie"]
                assert b"Say something to small-model" in page.read()
        finally:
            demo.send_signal(signal.SIGINT)
        assert str(tmp_path) in demo.stdout.read()
    assert demo.returncode == 0
    assert (tmp_path / "store.json").is_file()


def test_every_example_is_run_by_a_test() -> None:
    source = "".join(path.read_text() for path in sorted(Path(__file__).parent.rglob("*.py")))
    for example in EXAMPLES.glob("*.py"):
        assert f'"{example.name}"' in source
