"""`attnstore lab serve`: a conversation over HTTP, with a restart in the middle, beside `transformers serve`."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from hf_attnstore.lab.bench.one_line import errors_in_one_line

if TYPE_CHECKING:
    from hf_attnstore.lab.bench.serve_bench import Turn


def serve(
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub name or folder of a chat model, smollm2 or small; as `attnstore chat`.", show_default=False
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="In float32 both have to say the same.")] = "float32",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    turns: Annotated[int, typer.Option(min=1, help="Turns of the conversation.")] = 8,
    restart_before: Annotated[int, typer.Option(min=1, help="The turn before which the server is restarted.")] = 5,
    overhead: Annotated[
        int, typer.Option(min=0, help="Also compare so many short turns with `ChatSession`, by CPU time.")
    ] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter conversation, as for the small model.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON and Markdown.")] = None,
) -> None:
    """Talk to `attnstore serve`, restarted on the way, and to `transformers serve`, turn by turn.

    Exits with 1 if an answer differs.
    """
    from hf_attnstore.chat.model import model_source, model_title
    from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine, in_words, versions
    from hf_attnstore.lab.bench.serve_bench import converse
    from hf_attnstore.lab.bench.serve_bench import overhead as measure_overhead
    from hf_attnstore.lab.demo.script import EVENING, reading

    console = Console()
    with errors_in_one_line(), tempfile.TemporaryDirectory(prefix="attnstore-serve-") as folder:
        source = model_source(model)
        script = EVENING if quick or Path(source).name == "small-model" else reading()
        others = ForeignLoad()
        with console.status("starting") as status:
            said = converse(
                source,
                script.system,
                script.messages[:turns],
                script.answer_tokens,
                Path(folder),
                restart_before=restart_before - 1,
                dtype=dtype,
                device=device,
                tell=status.update,
                heard=lambda turn: console.print(f"[dim]{turn.ours.text.strip()}[/]", highlight=False),
            )
        beyond = ""
        if overhead:
            times = measure_overhead(source, overhead + 1, Path(folder) / "overhead")
            beyond = _in_words(times)
            console.print(beyond)
        share = others.share()
        machine = describe_machine(Path(folder))
    table = Table(*_COLUMNS, title=f"{model_title(source)}, {dtype}", caption="* after a restart")
    for row in _rows(said):
        table.add_row(*row)
    console.print(table)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        record = {"turns": [asdict(turn) for turn in said], "machine": machine, "versions": versions()}
        (output / "serve.json").write_text(json.dumps(record, indent=1) + "\n")
        about = f"{model_title(source)} in {dtype}, answers of up to {script.answer_tokens} tokens"
        (output / "serve.md").write_text(_as_markdown(about, said, in_words(machine), share) + beyond)
    if dtype == "float32" and not all(turn.same for turn in said):
        console.print("[red]an answer differs[/]")
        raise typer.Exit(1)


def _in_words(times: dict[str, list[float]]) -> str:
    chat = statistics.median(times["ChatSession"])
    ways = [
        f"{name} {statistics.median(took) * 1e3:.1f} ms"
        f" ({statistics.median(a - b for a, b in zip(took, times['ChatSession'], strict=True)) * 1e3:+.1f})"
        for name, took in times.items()
        if name != "ChatSession"
    ]
    return (
        f"\nCPU time of a short turn, medians of {len(times['http'])}: by a ChatSession that is made for it "
        f"{chat * 1e3:.1f} ms, by {' and '.join(ways)}.\n"
    )


_COLUMNS = ("turn", "prompt", "cached_tokens", "TTFT, s", "plain, s", "CPU, s", "plain CPU, s", "CPU ratio")


def _rows(turns: Sequence[Turn]) -> list[list[str]]:
    return [
        [
            f"{number}{' *' if turn.restarted else ''}",
            f"{turn.ours.prompt_tokens:,}",
            f"{turn.ours.cached_tokens:,}",
            f"{turn.ours.ttft_seconds:.3f}",
            f"{turn.plain.ttft_seconds:.3f}",
            f"{turn.ours.cpu_seconds:.2f}",
            f"{turn.plain.cpu_seconds:.2f}",
            f"{turn.ours.cpu_seconds / max(turn.plain.cpu_seconds, 0.01):.3f}",
        ]
        for number, turn in enumerate(turns, 1)
    ]


def _as_markdown(about: str, turns: Sequence[Turn], machine: str, share: float) -> str:
    lines = [
        "# attnstore lab serve",
        "",
        f"Measured on {machine}; other processes took {share:.0%} of its cores meanwhile.",
        "",
        f"{about}: a conversation over HTTP, streamed and sent whole each time, by `attnstore serve` and, in the same "
        "run, by `transformers serve`. TTFT is what the client sees, CPU the server's time until then. "
        f"{sum(turn.same for turn in turns)} of {len(turns)} answers are the same. * after a restart.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(_COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in _rows(turns)),
        "",
    ]
    return "\n".join(lines)
