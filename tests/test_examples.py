"""Every example runs, against the small model, as a reader would run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOT_RUN_HERE = {"train_small_model.py"}  # it has tests of its own

pytestmark = pytest.mark.skipif(
    not (EXAMPLES / "small-model" / "config.json").is_file(), reason="the small model is not in this checkout"
)


def run(name: str, *arguments: str | Path, typed: str = "") -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        input=typed,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def reused(output: str) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in re.findall(r"reused (\d+) tokens, prefilled (\d+)", output)]


def test_generate_reuses_its_prompt_when_it_is_run_again(tmp_path: Path) -> None:
    first = run("generate.py", "--store", tmp_path)
    second = run("generate.py", "--store", tmp_path)
    [(nothing, prompt)] = reused(first)
    assert (nothing, reused(second)) == (0, [(prompt - 1, 1)])
    answer = [output.rsplit("\n", 2)[0] for output in (first, second)]
    assert answer[0] == answer[1]
    assert answer[0].strip()


def test_chat_goes_on_when_it_is_run_again(tmp_path: Path) -> None:
    first = run("chat_cli.py", "--store", tmp_path, typed="Who came in, and what did he say?\nAnd then?\n")
    second = run("chat_cli.py", "--store", tmp_path, typed="What did the prince answer?\n")
    (nothing, opening), (after_one, _) = reused(first)
    [(after_two, new)] = reused(second)
    assert nothing == 0
    assert opening < after_one < after_two
    assert new < after_two


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
    source = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f'"{example.name}"' in source
