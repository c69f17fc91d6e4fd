"""Runs the scripted conversation, one new process per turn, and keeps it inside the model's context window.

The processes are forked from one that has imported torch and transformers, and has nothing else: neither model nor
store, nor anything of a turn before.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...chat.model import SMALL, ModelNotFoundError, first_line, model_source, model_title
from ...errors import AttentionStoreError
from .kept import KeptTask
from .script import Script, scripts
from .turn import TurnResult, TurnTask

LEAST_ANSWER_TOKENS = 4
SENTENCE_ENDS = (".", "!", "?")
WEIGHTS_AND_TOKENIZER = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Compute threads that wait by spinning keep a processor from other programs, and a busy machine makes such a wait
# a hundred times longer. Where the user has not chosen, they sleep: with the store and without alike.
CALM = {"OMP_WAIT_POLICY": "PASSIVE"}


class DemoError(AttentionStoreError):
    """The demonstration could not be run to its end."""


@dataclass(frozen=True)
class DemoResult:
    """A whole run: the model in words, and its turns."""

    model: str
    turns: list[TurnResult]

    @property
    def same_tokens(self) -> bool:
        """Whether every answer was that of plain generate; in 16 bits, that of a cache kept in memory."""
        return all(turn.same_tokens for turn in self.turns)


def run_demo(
    model: str | None = None,
    output: Path = Path("attnstore-demo"),
    *,
    repeats: int | None = None,
    quick: bool = False,
    device: str | None = None,
    dtype: str = "auto",
    console: Console | None = None,
) -> DemoResult:
    """Runs the conversation and shows it: a table on `console`; demo.json and demo.png in the folder
    `output`.

    `model` is what `model_source` takes; `quick` has the small model take the place of none. The script is the longest
    that fits into the model's window; each turn is measured `repeats` times with the store and without.
    Raises `ModelNotFoundError`, or `DemoError` if a turn's process fails or no script fits.
    """
    from .report import show, write_json, write_picture

    console = console or Console()
    name, source = _locate(SMALL if quick and model is None else model)
    script, budget = _longest_script(source)
    repeats = repeats or script.repeats
    output.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]{len(script.messages)} turns[/] with [bold]{name}[/], each in a new process, with the store and "
        f"without ({repeats} {'runs' if repeats > 1 else 'run'} each)"
    )
    if _busy():
        console.print("[yellow]other programs keep this machine busy: the times will be noisy[/]")
    turns: list[TurnResult] = []
    lengths: list[int] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(dir=output, prefix=".work-") as work,
        Progress(*columns, console=console, transient=True) as progress,
        _Processes(Path(work)) as processes,
    ):
        bar = progress.add_task("starting", total=len(script.messages))
        for i, message in enumerate(script.messages):
            progress.update(bar, description=f"turn {i + 1}: a new process")
            lengths.append(budget.answer_tokens(i, turns))
            task = TurnTask(
                model=source,
                store=str(Path(work) / "store"),
                scratch=work,
                system=script.system,
                message=message,
                max_new_tokens=lengths[-1],
                repeats=repeats,
                store_first=i % 2 == 0,
                stop_strings=list(SENTENCE_ENDS) if script.one_sentence else None,
                device=device,
                dtype=dtype,
            )
            Path(task.store).mkdir(mode=0o700, exist_ok=True)
            turns.append(TurnResult(**processes.run(task, f"turn {i + 1}")))
            progress.advance(bar)
            progress.console.print(_said(message, turns[-1].answer))
            progress.console.print(_line(i, turns[-1]))
        if not turns[0].exact:
            progress.update(bar, description="the same with a cache kept in memory")
            kept = KeptTask(source, [t.prompt_ids for t in turns], [t.answer_tokens for t in turns], device, dtype)
            answers = processes.run(kept, "the kept cache")["answers"]
            for turn, answer in zip(turns, answers, strict=True):
                turn.compare(answer)
    result = DemoResult(name, turns)
    show(result, console)
    console.print(f"numbers: {write_json(result, output)}")
    picture = write_picture(result, output)
    console.print(
        f"picture: {picture}" if picture else "no picture: pip install 'hf-attnstore\\[bench]' brings matplotlib"
    )
    return result


@dataclass(frozen=True)
class _Budget:
    """How the context window is shared out, so that the script never overflows it. All in tokens."""

    window: int | None
    said: tuple[int, ...]
    """What the conversation has in it when message i is asked, if every answer were empty."""
    most: int
    """The longest answer."""

    @classmethod
    def of(cls, script: Script, tokenizer: Any, window: int | None) -> _Budget:
        messages: list[dict[str, str]] = [{"role": "system", "content": script.system}]
        said = []
        for text in script.messages:
            messages.append({"role": "user", "content": text})
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            said.append(len(tokenizer.encode(rendered, add_special_tokens=False)))
            messages.append({"role": "assistant", "content": ""})
        return cls(window, tuple(said), script.answer_tokens)

    @property
    def fits(self) -> bool:
        """Whether every answer may be as long as it likes."""
        return self.window is None or self.said[-1] + self.most * len(self.said) <= self.window

    def answer_tokens(self, turn: int, before: list[TurnResult]) -> int:
        """How long the answer of `turn` may be: its share of the room that is left, at most `most`."""
        if self.window is None:
            return self.most
        answered = sum(t.answer_tokens for t in before)
        room = self.window - self.said[-1] - answered
        share = min(self.most, room // (len(self.said) - turn))
        if share < LEAST_ANSWER_TOKENS:
            raise DemoError(
                f"the script needs {self.said[-1]:,} tokens without any answer, too many for a context "
                f"window of {self.window:,}"
            )
        return share


def _longest_script(source: str) -> tuple[Script, _Budget]:
    """The first script that fits into the model's window with answers of any length, else the last one."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
        config: Any = AutoConfig.from_pretrained(source).get_text_config()
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"the model {source!r} can't be loaded: {first_line(error)}") from error
    if not tokenizer.chat_template:
        raise DemoError(f"the tokenizer of {source!r} has no chat template: name an instruction-tuned model")
    window = getattr(config, "max_position_embeddings", None)
    known = [(script, _Budget.of(script, tokenizer, window)) for script in scripts()]
    return next((found for found in known if found[1].fits), known[-1])


def _locate(model: str | None) -> tuple[str, str]:
    """A name to show, and the local folder to load from; a hub model is downloaded here, where its progress
    is seen.
    """
    source = model_source(model)
    if Path(source).exists():
        return model_title(source), str(Path(source).resolve())
    from huggingface_hub import snapshot_download

    try:
        return source, snapshot_download(source, allow_patterns=WEIGHTS_AND_TOKENIZER)
    except Exception as error:  # the hub client's own errors and those of several network libraries
        raise ModelNotFoundError(
            f"{source!r} is neither a folder here nor a model that can be fetched from the hub: {first_line(error)}"
        ) from error


def _busy() -> bool:
    """Whether the processors already have most of what they can do."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1)


class _Processes:
    """New processes for tasks, one after the other; their files are in the folder `work`."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def __enter__(self) -> _Processes:
        command = [sys.executable, "-m", "hf_attnstore.lab.demo"]
        self._forks = Popen(command, env={**CALM, **os.environ, **QUIET}, stdin=PIPE, stdout=PIPE, text=True)  # noqa: S603
        return self

    def __exit__(self, *error: object) -> None:
        assert self._forks.stdin is not None
        self._forks.stdin.close()
        self._forks.wait()

    def run(self, task: TurnTask | KeptTask, name: str) -> dict[str, Any]:
        """What the task gave.

        Raises:
            DemoError: its process failed.
        """
        task_file, result_file, printed = (self._work / f"{name} {what}" for what in ("task", "result", "printed"))
        task_file.write_text(json.dumps(asdict(task)))
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.write(json.dumps([str(task_file), str(result_file), str(printed)]) + "\n")
        self._forks.stdin.flush()
        code = self._forks.stdout.readline().strip()
        if code != "0" or not result_file.is_file():
            last = "\n".join(printed.read_text().strip().splitlines()[-8:]) if printed.is_file() else ""
            raise DemoError(f"{name}: its process ended with exit code {code or 'unknown'}:\n{last}")
        result = json.loads(result_file.read_text())
        if "error" in result:
            raise DemoError(f"{name}: {result['error']}")
        return dict(result)


def _said(message: str, answer: str) -> str:
    """What was asked, without what was pasted above it, and what the model said."""
    *pasted, asked = message.strip().split("\n\n")
    words = sum(len(part.split()) for part in pasted)
    shown = f"[dim]({words:,} words)[/] {escape(asked)}" if pasted else escape(asked)
    return f"\n[dim]you:[/]   {shown}\n[dim]model:[/] {escape(' '.join(answer.split()))}"


def _line(index: int, turn: TurnResult) -> str:
    if turn.exact:
        mark = "[green]same tokens ✓[/]" if turn.same_tokens else "[red]other tokens ✗[/]"
    else:  # it is compared at the end
        mark = "same tokens" if turn.as_plain else "other tokens than plain generate, by rounding"
    with_store, without = (f"{statistics.median(times) * 1e3:.1f} ms" for times in (turn.ttft_with, turn.ttft_without))
    return f"turn {index + 1:2}: first token after {with_store}, without the store {without}, {mark}"
