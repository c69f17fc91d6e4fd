"""Pictures of a study: hit rate by capacity, and by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.ticker import PercentFormatter

_COLOURS = {
    "predictive": "#1f6feb",
    "lru": "#57606a",
    "fifo": "#9aa5b1",
    "fifo (any block)": "#c9d1d9",
    "hyperbolic": "#bf8700",
    "optimum": "#1a7f37",
    "raw": "#57606a",
    "int8": "#1f6feb",
    "int4": "#bf8700",
}
"""By policy, or by codec."""


def draw_curves(
    title: str, capacities: Sequence[float], curves: Mapping[str, Sequence[float]], limit: float, path: Path
) -> None:
    """Writes a PNG: hit rate (share of tokens) by capacity (share of blocks, log axis), a line for every policy.

    Args:
        limit: what a store without a limit finds.
    """
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axis = figure.subplots()
    for name, rates in curves.items():
        style = "--" if name == "optimum" else ":" if name.endswith(", lru") else "-"
        colour = _COLOURS.get(name.partition(",")[0])
        axis.plot(capacities, rates, style, marker="o", markersize=4, label=name, color=colour)
    axis.axhline(limit, color="#d0d7de", linewidth=1, label="no limit")
    axis.set_xscale("log")
    axis.set_xticks(list(capacities), [f"{100 * c:g} %" for c in capacities])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("capacity, of all different blocks")
    axis.set_ylabel("tokens found")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def draw_models(names: Sequence[str], rates: Mapping[str, Sequence[float]], path: Path) -> None:
    """Writes a PNG: hit rates (shares of turns) of models, a bar for every policy."""
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / max(1, len(rates))
    for number, (policy, values) in enumerate(rates.items()):
        places = [place + number * width for place in range(len(names))]
        bars = axis.bar(places, values, width, label=policy)
        axis.bar_label(bars, [f"{100 * value:.0f}" for value in values], fontsize=8)
    axis.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], list(names))
    axis.set_ylim(0, 1.1)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylabel("turns that find their whole history")
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=130)
