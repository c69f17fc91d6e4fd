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
from hf_attnstore.lab.bench.wanted import COLUMNS, Figure, as_markdown, rows
from hf_attnstore.lab.markdown import markdown_table

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
    turns_wanted: Annotated[int, typer.Option("--turns", min=1, help="Turns of the conversation.")] = 8,
    restart_before: Annotated[int, typer.Option(min=1, help="The turn before which the server is restarted.")] = 5,
    overhead: Annotated[
        int, typer.Option(min=0, help="Also compare so many short turns with `ChatSession`, by CPU time.")
    ] = 0,
    pairs: Annotated[
        int, typer.Option(min=0, help="Also take so many first turns, and so many turns after a restart, of both.")
    ] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter conversation, as for the small model.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON and Markdown.")] = None,
) -> None:
    """Talk to `attnstore serve`, restarted on the way, and to `transformers serve`, turn by turn.

    With `--pairs 5 --overhead 29` it takes every figure of which something is wanted, and says whether it is so.

    Exits with 1 if an answer differs.
    """
    from hf_attnstore.chat.model import model_source, model_title
    from hf_attnstore.lab.bench import serve_bench as bench
    from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine, in_words, versions
    from hf_attnstore.lab.demo.script import EVENING, reading

    console = Console()
    figures: list[Figure] = []
    first: list[Turn] = []
    anew: list[Turn] = []
    with errors_in_one_line(), tempfile.TemporaryDirectory(prefix="attnstore-serve-") as folder:
        source = model_source(model)
        script = EVENING if quick or Path(source).name == "small-model" else reading()
        others = ForeignLoad()
        with (
            console.status("starting") as status,
            bench.both_servers(source, Path(folder), dtype=dtype, device=device) as servers,
        ):
            turns, said = bench.converse(
                servers,
                script.system,
                script.messages[:turns_wanted],
                script.answer_tokens,
                restart_before=restart_before - 1,
                tell=status.update,
                heard=lambda turn: console.print(f"[dim]{turn.ours.text.strip()}[/]", highlight=False),
            )
            if pairs:
                first = bench.first_turns(servers, script.messages[0], pairs, status.update)
                anew = bench.after_restarts(servers, said, pairs, status.update)
                figures = _figures(turns, first, anew)
        beyond = ""
        if overhead:
            times = bench.overhead(source, overhead + 1, Path(folder) / "overhead")
            beyond = _in_words(times)
            console.print(beyond)
            figures += [
                Figure(f"a turn beyond a ChatSession's, {name}, ms of CPU", _beyond(times, name), 3.0)
                for name in ("http", "streamed")
            ]
        share = others.share()
        machine = describe_machine(Path(folder))
    table = Table(*_OF_TURNS, title=f"{model_title(source)}, {dtype}", caption="* after a restart")
    for row in _rows(turns):
        table.add_row(*row)
    console.print(table)
    if figures:
        held = Table(*COLUMNS, caption="ratios of CPU times, medians")
        for line in rows(figures):
            held.add_row(*line)
        console.print(held)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        record = {
            "turns": [asdict(turn) for turn in turns],
            "first_turns": [asdict(turn) for turn in first],
            "after_restarts": [asdict(turn) for turn in anew],
            "figures": [asdict(figure) for figure in figures],
            "machine": machine,
            "versions": versions(),
        }
        (output / "serve.json").write_text(json.dumps(record, indent=1) + "\n")
        about = f"{model_title(source)} in {dtype}, answers of up to {script.answer_tokens} tokens"
        report = _as_markdown(about, turns, in_words(machine), share) + beyond
        if figures:
            report += f"\nRatios are of CPU times, medians:\n\n{as_markdown(figures)}"
        (output / "serve.md").write_text(report)
    if dtype == "float32" and not all(turn.same for turn in turns):
        console.print("[red]an answer differs[/]")
        raise typer.Exit(1)


def _figures(turns: Sequence[Turn], first: Sequence[Turn], anew: Sequence[Turn]) -> list[Figure]:
    """What was measured over HTTP beside `transformers serve`."""
    later = [turn for turn in turns[1:] if not turn.restarted]
    compared = [*turns, *first, *anew]

    def median(of: Sequence[Turn]) -> float:
        return statistics.median(turn.ours.cpu_seconds / max(turn.plain.cpu_seconds, 0.01) for turn in of)

    figures = [
        Figure(f"first token / plain, {what}", median(of), bar)
        for what, of, bar in (
            ("later turns", later, 0.035),
            (f"first turn after a restart, {len(anew)} pairs", anew, 0.045),
            (f"first turn ever, {len(first)} pairs", first, 1.02),
        )
        if of
    ]
    return [*figures, Figure("answers that differ", sum(not turn.same for turn in compared), 0)]


def _beyond(times: dict[str, list[float]], name: str) -> float:
    """Milliseconds that turns took more than those of a `ChatSession`."""
    return statistics.median(a - b for a, b in zip(times[name], times["ChatSession"], strict=True)) * 1e3


def _in_words(times: dict[str, list[float]]) -> str:
    chat = statistics.median(times["ChatSession"])
    ways = [
        f"{name} {statistics.median(took) * 1e3:.1f} ms ({_beyond(times, name):+.1f})"
        for name, took in times.items()
        if name != "ChatSession"
    ]
    return (
        f"\nCPU time of a short turn, medians of {len(times['http'])}: by a ChatSession that is made for it "
        f"{chat * 1e3:.1f} ms, by {' and '.join(ways)}.\n"
    )


_OF_TURNS = ("turn", "prompt", "cached_tokens", "TTFT, s", "plain, s", "CPU, s", "plain CPU, s", "CPU ratio")


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
        *markdown_table(_OF_TURNS, _rows(turns)),
        "",
    ]
    return "\n".join(lines)
