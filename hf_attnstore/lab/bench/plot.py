"""The picture of a report: time to first token by method, and bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hf_attnstore.lab.bench.figures import Spread, spread
from hf_attnstore.lab.bench.report import TITLES, Result, bandwidths

_PLAIN, _STORE, _BOUND = "#9aa5b1", "#1f6feb", "#57606a"
_COLOURS = {"kept": _BOUND, "device": _STORE, "memory": _STORE, "disk": _STORE, "cold": _STORE}


def draw(label: str, results: Sequence[Result], path: Path) -> None:
    """Write a PNG: one row per history length, TTFT on a log axis on the left, bandwidth on the right.

    Bars are medians, whiskers the middle half of the repeats.
    """
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 0.8 + 3.6 * len(results)), layout="constrained")
    figure.suptitle(f"attnstore bench: {label}", fontsize=13)
    axes = figure.subplots(len(results), 2, squeeze=False, width_ratios=[1.1, 1])
    for row, result in zip(axes, results, strict=True):
        _ttft(row[0], result)
        _bandwidth(row[1], result)
    figure.savefig(path, dpi=130)


def _ttft(axis: matplotlib.axes.Axes, result: Result) -> None:
    keys = [key for key in TITLES if result.measured.samples.get(key)]
    spreads = [spread([value * 1000 for value in result.series[f"ttft/{key}"]]) for key in keys]
    medians = [found.median for found in spreads]
    colours = [_COLOURS.get(key, _PLAIN) for key in keys]
    _bars(axis, [TITLES[key] for key in keys], spreads, colours, "{:,.0f} ms")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(min(medians) / 2, max(medians) * 4)
    work = result.measured.workload
    axis.set_title(f"Time to first token: {work.history:,} tokens of history, {work.new} new", fontsize=11)
    axis.set_xlabel("milliseconds, log scale")
    _tidy(axis)


def _bandwidth(axis: matplotlib.axes.Axes, result: Result) -> None:
    found = bandwidths(result)
    spreads = [spread([nbytes / value / 2**30 for value in seconds]) for _, nbytes, seconds in found]
    colours = [_STORE if title.startswith("store") else _PLAIN for title, _, _ in found]
    _bars(axis, [title for title, _, _ in found], spreads, colours, "{:.1f}")
    axis.set_title("Bandwidth", fontsize=11)
    axis.set_xlabel("GiB/s")
    axis.margins(x=0.12)
    _tidy(axis)


def _bars(
    axis: matplotlib.axes.Axes, titles: Sequence[str], spreads: Sequence[Spread], colours: Sequence[str], words: str
) -> None:
    """Medians as bars with their middle half as whiskers, each with its median in `words` behind it."""
    axis.barh(
        titles,
        [found.median for found in spreads],
        xerr=[[found.median - found.low for found in spreads], [found.high - found.median for found in spreads]],
        color=colours,
        capsize=3,
    )
    for index, found in enumerate(spreads):
        axis.annotate(
            words.format(found.median),
            (found.high, index),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )


def _tidy(axis: matplotlib.axes.Axes) -> None:
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
