"""The gate bench as a table, as Markdown, and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_attnstore.lab.bench.gate_bench import METHODS, Cell
from hf_attnstore.lab.bench.machine import versions_in_words

REGRET_BAR = 0.05
"""Of the mean over all cells."""

COLUMNS = (
    "from",
    "history",
    "load, ms",
    "recompute, ms",
    "gate, ms",
    "plain generate, ms",
    "gate reuses",
    "regret",
    "of the choice",
)

_COLOURS = {"load": "#1f6feb", "recompute": "#57606a", "gate": "#cf222e", "plain": "#c9d1d9"}
_LABELS = {
    "load": "always load",
    "recompute": "always recompute",
    "gate": "the gate",
    "plain": "plain generate",
}


def mean_regret(cells: Sequence[Cell]) -> float:
    return statistics.mean(cell.regret for cell in cells)


def mean_choice_regret(cells: Sequence[Cell]) -> float:
    return statistics.mean(cell.choice_regret for cell in cells)


def worst(cells: Sequence[Cell]) -> Cell:
    return max(cells, key=lambda cell: cell.regret)


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One row for each cell, as text."""
    return [
        (
            cell.tier,
            f"{cell.history:,}",
            *(f"{cell.median(method) * 1e3:,.1f}" for method in METHODS),
            f"{statistics.median(cell.reused):,.0f}",
            f"{cell.regret:+.1%}",
            f"{cell.choice_regret:+.1%}",
        )
        for cell in cells
    ]


def in_a_sentence(cells: Sequence[Cell]) -> str:
    found = worst(cells)
    loads, computes = (statistics.mean(c.median(m) / c.best - 1 for c in cells) for m in ("load", "recompute"))
    return (
        f"Regret of the gate: mean {mean_regret(cells):+.1%}, median "
        f"{statistics.median(cell.regret for cell in cells):+.1%}, largest {found.regret:+.1%} "
        f"({found.history:,} tokens, {found.tier}). Of its choices alone: mean {mean_choice_regret(cells):+.1%}, "
        f"largest {max(cell.choice_regret for cell in cells):+.1%}; {sum(cell.better_chosen for cell in cells)} of "
        f"{sum(len(cell.reused) for cell in cells)} were the better way, whole. Always loading would be {loads:+.1%} "
        f"in the mean, always recomputing {computes:+.1%}."
    )


def print_cells(console: Console, about: str, cells: Sequence[Cell]) -> None:
    """A table for a terminal."""
    table = Table(title=f"Load or recompute: {about}", title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number else "left")
    last = {cell.tier: cell.history for cell in cells}
    for cell, row in zip(cells, rows(cells), strict=True):
        table.add_row(*row, end_section=cell.history == last[cell.tier])
    console.print(table)
    console.print(in_a_sentence(cells), highlight=False)


def as_markdown(
    about: str, cells: Sequence[Cell], new: int, repeats: int, machine: str, others: float, versions: Mapping[str, Any]
) -> str:
    """The report for docs/results."""
    lines = [f"# Load or recompute: {about}", "", in_a_sentence(cells), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows(cells)]
    lines += [
        "",
        f"A conversation whose history the store has is resumed with {new} new tokens; times are medians of {repeats} "
        "turns from the call to the first token, the methods one right after the other in changing order, and all gave "
        "the same tokens (compared where the dtype has at least 32 bits). "
        "Regret is the gate's time against the better of always loading and always computing, both "
        "through the same cache; plain `generate`, without any, is beside them. The regret of the choice is by the "
        "times of the method that always does what the gate chose: it leaves out what choosing takes, and noise. In "
        "each tier the gate began knowing nothing, had a first turn of each length and four resumed ones to learn, and "
        "learned from its own turns only. Slow disks are the same disk, read no faster than they say.",
    ]
    busy = f" Other processes used {others:.0%} of the processors meanwhile"
    busy += ": differences of a few percent mean nothing here." if others > 0.1 else "."
    lines += ["", f"Measured on {machine}; {versions_in_words(versions)}.{busy}", ""]
    return "\n".join(lines)


def draw(about: str, cells: Sequence[Cell], path: Path) -> None:
    """Writes a PNG: time to the first token by history, a field for each tier."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    tiers = list(dict.fromkeys(cell.tier for cell in cells))
    columns = min(4, len(tiers))
    lines = -(-len(tiers) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * lines + 0.4), layout="constrained")
    figure.suptitle(f"Load or recompute: {about}", fontsize=12)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for number, axis in enumerate(axes.flat):
        if number >= len(tiers):
            axis.set_visible(False)
            continue
        here = [cell for cell in cells if cell.tier == tiers[number]]
        histories = [cell.history for cell in here]
        for method in ("load", "recompute", "gate"):
            style: dict[str, Any] = {"linewidth": 4, "alpha": 0.45} if method == "gate" else {"linewidth": 1.4}
            medians = [cell.median(method) * 1e3 for cell in here]
            axis.plot(histories, medians, marker=".", color=_COLOURS[method], label=_LABELS[method], **style)
        regret = statistics.mean(cell.regret for cell in here)
        axis.set_title(f"{tiers[number]}: regret {regret:+.1%}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.tick_params(labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("tokens of history", fontsize=8)
    for line in axes:
        line[0].set_ylabel("ms to the first token", fontsize=8)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)
