"""What the demonstration shows: a table, a JSON file and a picture."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...sizes import format_bytes, format_seconds
from .turn import TurnResult

if TYPE_CHECKING:
    from .runner import DemoResult

WITH, WITHOUT, QUIET = "#0b7a75", "#b8b8b8", "#555555"


def show(result: DemoResult, console: Console) -> None:
    """Prints the table by turn and a sentence about what it says."""
    table = Table(
        title="Time to first token (TTFT), each turn in a new process",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("turn", "history\ntokens", "reused\ntokens", "prefilled\ntokens", "KV\nloaded"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("TTFT\nwithout", "TTFT\nwith", "speed\nup"):
        table.add_column(column, justify="right", style="bold", no_wrap=True)
    table.add_column("same\ntokens", justify="center", no_wrap=True)
    for i, turn in enumerate(result.turns, 1):
        with_store, without = statistics.median(turn.ttft_with), statistics.median(turn.ttft_without)
        table.add_row(
            str(i),
            f"{turn.history_tokens:,}",
            f"{turn.reused_tokens:,}",
            f"{turn.prefilled_tokens:,}",
            f"{turn.loaded_bytes / 2**20:.1f} MiB",
            f"{without * 1e3:.1f} ms",
            f"{with_store * 1e3:.1f} ms",
            f"{without / with_store:.1f}×",
            "[green]✓[/]" if turn.same_tokens else f"[red]✗ at {turn.first_difference}[/]",
        )
    console.print(table)
    identify = statistics.median(turn.identify_seconds for turn in result.turns)
    console.print(
        f"[dim]TTFT: median of {len(result.turns[0].ttft_with)}, from the call of generate; loading the model is not "
        "in it. With the store it includes what a new process pays once to identify the model's weights, about "
        f"{identify * 1e3:.0f} ms.[/]"
    )
    last = result.turns[-1]
    with_store, without = statistics.median(last.ttft_with), statistics.median(last.ttft_without)
    console.print(
        f"The last turn reused {last.reused_tokens:,} of {last.prompt_tokens:,} tokens and prefilled "
        f"{last.prefilled_tokens:,}, with {format_bytes(last.loaded_bytes)} from disk: first token after "
        f"{format_seconds(with_store)}; computing it all took {format_seconds(without)} (measured)."
    )
    first = result.turns[0]
    if not first.exact:
        plain = sum(turn.as_plain for turn in result.turns)
        console.print(
            "[dim]Compared with a DynamicCache kept in memory for the whole conversation. In "
            f"{first.dtype} a prompt that is prefilled in parts is rounded otherwise than in one go, whatever keeps "
            "the parts: plain generate gives "
            f"the same in {plain} of {len(result.turns)} turns. With --dtype float32 in all.[/]"
        )
    for i, turn in enumerate(result.turns, 1):
        if turn.recomputed:
            console.print(f"[yellow]turn {i} did not reuse all it could:[/] {escape(turn.recomputed)}")
    if not result.same_tokens:
        console.print(
            f"[red]Some answers are not those of {result.turns[0].reference}.[/] That is a bug: please report it."
        )


def write_json(result: DemoResult, output: Path) -> Path:
    """Writes every number to demo.json in `output`; returns its path."""
    path = output / "demo.json"
    report: dict[str, Any] = {
        "model": result.model,
        "parameters": result.turns[0].parameters,
        "dtype": result.turns[0].dtype,
        "device": result.turns[0].device,
        **_machine(output),
        "same_tokens": result.same_tokens,
        "compared_with": result.turns[0].reference,
        "turns": [asdict(turn) for turn in result.turns],
    }
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_picture(result: DemoResult, output: Path) -> Path | None:
    """Draws both times by turn into demo.png in `output`; returns its path, or `None` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    turns = result.turns
    without = [statistics.median(t.ttft_without) * 1e3 for t in turns]
    with_store = [statistics.median(t.ttft_with) * 1e3 for t in turns]
    figure = Figure(figsize=(9, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(turns))
    axes.bar([p - 0.2 for p in places], without, 0.4, color=WITHOUT, label="plain generate")
    axes.bar([p + 0.2 for p in places], with_store, 0.4, color=WITH, label="with hf-attnstore")
    _whiskers(axes, [p - 0.2 for p in places], [t.ttft_without for t in turns])
    _whiskers(axes, [p + 0.2 for p in places], [t.ttft_with for t in turns])
    for p in places:
        axes.annotate(
            f"{without[p] / with_store[p]:.1f}×",
            (p + 0.2, max(turns[p].ttft_with) * 1e3),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=WITH,
            fontsize=8,
        )
    axes.set_xticks(list(places), [f"{i}\n{t.prompt_tokens:,}" for i, t in enumerate(turns, 1)])
    axes.set_xlabel("turn, and tokens in its prompt", color=QUIET)
    axes.set_ylabel("time to first token (ms)", color=QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left")
    figure.suptitle("Time to first token, each turn in a new process", fontsize=13, fontweight="bold")
    axes.set_title(fill(_in_words(result, output), 110), fontsize=8.5, color=QUIET)
    path = output / "demo.png"
    figure.savefig(path)
    return path


def _whiskers(axes: Any, places: Sequence[float], times: Sequence[Sequence[float]]) -> None:
    """A thin line from the fastest to the slowest repeat."""
    low, high = [min(t) * 1e3 for t in times], [max(t) * 1e3 for t in times]
    axes.vlines(places, low, high, color="#333333", linewidth=0.8)


def _in_words(result: DemoResult, output: Path) -> str:
    first: TurnResult = result.turns[0]
    same = f"tokens of {first.reference} in every turn" if result.same_tokens else "tokens differ in some turns"
    model = f"{result.model}: {first.parameters / 1e6:,.1f} M parameters, {first.dtype}"
    return f"{model}, {_machine(output)['machine']}; {same}"


def _machine(output: Path) -> dict[str, Any]:
    """The machine in words, and versions."""
    try:
        from ..bench.machine import describe_machine, versions
    except ImportError:
        return {"machine": f"{platform.processor() or platform.machine()}, {platform.system()}"}
    facts = describe_machine(output)
    place = facts.get("gpu", f"{facts['cores']} cores ({facts['cpu']})")
    return {
        "machine": f"{place}, {facts['memory_gib']} GiB memory, store on {facts['file_system']}",
        "versions": versions(),
    }
