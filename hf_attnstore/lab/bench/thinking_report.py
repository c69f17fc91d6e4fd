"""The thinking bench as a table, as Markdown, and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_attnstore.lab.bench.machine import versions_in_words
from hf_attnstore.lab.bench.thinking import METHODS, Lengths, Talk

COLUMNS = ("template", "method", "prefilled per turn", "in the last turn", "in all turns", "ms to the first token",
           "× recompute", "× store", "in the background")  # fmt: skip

_COLOURS = {"recompute": "#57606a", "store": "#cf8a00", "canonicalize": "#1f6feb"}
_LABELS = {"recompute": "recompute", "store": "store", "canonicalize": "store, canonicalize"}


def ttft(talk: Talk, method: str) -> float:
    """Median seconds to the first token, over all turns but the first and all repeats."""
    return statistics.median(seconds for turn in talk.turns[1:] for seconds in turn.ttft[method])


def ratio(talk: Talk, method: str, against: str) -> float:
    """The median, over all turns but the first and all repeats, of the ratios of two methods run side by side."""
    pairs = (zip(turn.ttft[method], turn.ttft[against], strict=True) for turn in talk.turns[1:])
    return statistics.median(a / b for pair in pairs for a, b in pair)


def rows(talks: Sequence[Talk]) -> list[tuple[str, ...]]:
    """One row for each style and method, as text."""
    found: list[tuple[str, ...]] = []
    for talk in talks:
        later = talk.turns[1:]
        for method in METHODS:
            counts = [turn.prefilled[method] for turn in later]
            background = ""
            if method == "canonicalize":
                tokens = statistics.median(turn.background_tokens for turn in later)
                seconds = statistics.median(s for turn in later for s in turn.background_seconds)
                background = f"{tokens:,.0f} tokens, {seconds * 1e3:,.0f} ms"
            found.append(
                (
                    talk.style,
                    _LABELS[method],
                    f"{statistics.median(counts):,.0f}",
                    f"{counts[-1]:,}",
                    f"{sum(turn.prefilled[method] for turn in talk.turns):,}",
                    f"{ttft(talk, method) * 1e3:,.1f}",
                    f"{ratio(talk, method, 'recompute'):.3f}",
                    f"{ratio(talk, method, 'store'):.3f}" if method != "recompute" else "",
                    background,
                )
            )
    return found


def print_talks(console: Console, about: str, talks: Sequence[Talk]) -> None:
    """A table for a terminal."""
    table = Table(title=f"Answers that reason: {about}", title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number > 1 else "left")
    for row in rows(talks):
        table.add_row(*row, end_section=row[1] == _LABELS["canonicalize"])
    console.print(table)


def as_markdown(
    about: str, lengths: Lengths, talks: Sequence[Talk], machine: str, others: float, versions: Mapping[str, Any]
) -> str:
    """The report for docs/results."""
    lines = [f"# Answers that reason: {about}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += [f"| {' | '.join(row)} |" for row in rows(talks)]
    lines += [
        "",
        f"{len(talks[0].turns)} turns: messages of about {lengths.message} tokens, then {lengths.reasoning} tokens of "
        f"reasoning and {lengths.answer} of answer. Prefilled are the tokens of a prompt that the model computed while "
        "the user waited; per turn, times and ratios are medians over all turns but the first, in which all is new. "
        "Every turn was run by all methods, one right after the other in changing order, and all gave the same tokens "
        "(in 16 bits: those of a cache kept in memory and prefilled in the same parts). "
        "What runs in the background ran alone, between the turns.",
        "",
    ]
    lines += [f"- `{talk.style}` is like {talk.like}" for talk in talks]
    busy = f" Other processes used {others:.0%} of the processors meanwhile"
    busy += ": the counts of tokens are exact, of the times only the ratios mean something." if others > 0.1 else "."
    lines += ["", f"Measured on {machine}; {versions_in_words(versions)}.{busy}", ""]
    return "\n".join(lines)


def draw(about: str, talks: Sequence[Talk], path: Path) -> None:
    """Writes a PNG: tokens prefilled and time to the first token, turn by turn, a column for each style."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(4.6 * len(talks), 7), layout="constrained")
    figure.suptitle(f"Answers that reason: {about}", fontsize=12)
    axes = figure.subplots(2, len(talks), squeeze=False, sharex=True, sharey="row")
    for column, talk in enumerate(talks):
        turns = range(1, len(talk.turns) + 1)
        for method in METHODS:
            style: dict[str, Any] = {
                "color": _COLOURS[method],
                "label": _LABELS[method],
                "marker": ".",
                "markersize": 4,
            }
            axes[0][column].plot(turns, [turn.prefilled[method] for turn in talk.turns], **style)
            medians = [statistics.median(turn.ttft[method]) * 1e3 for turn in talk.turns]
            axes[1][column].plot(turns, medians, **style)
        axes[0][column].set_title(f"{talk.style} ({talk.like.split(':')[0]})", fontsize=10)
        axes[1][column].set_xlabel("turn")
        for axis in (axes[0][column], axes[1][column]):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    axes[0][0].set_ylabel("tokens prefilled in the turn (log scale)")
    axes[1][0].set_ylabel("ms to the first token (log scale)")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
