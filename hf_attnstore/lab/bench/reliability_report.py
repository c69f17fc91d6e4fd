"""What the store itself costs, as tables, Markdown and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from ...sizes import format_bytes
from .index_bench import LONG, IndexFigures, p99
from .machine import in_words
from .store_bench import SETTINGS, Speeds

BARS = {"opening": 1.0, "lookup": 2e-3, "commit": 10e-3, "listing": 50e-3, "victim": 1e-3}
"""Seconds that 99 of 100 must not exceed, with a million blocks and a hundred thousand sessions."""
MEMORY_BAR = 300 << 20
"""Bytes that opening and using such an index may add to the process."""

_TITLES = {
    "opening": "open the store",
    "lookup": f"longest prefix of {LONG} blocks",
    "commit": f"commit a turn of {LONG} blocks",
    "listing": "list a page of 50 sessions",
    "victim": "choose a victim",
}


def index_rows(found: Sequence[IndexFigures]) -> list[list[str]]:
    """A table, its head first: median and 99th percentile in milliseconds, for each size."""
    rows = [["", *(f"{f.blocks:,} blocks, {f.sessions:,} sessions" for f in found), "bar (p99)"]]
    for name, title in _TITLES.items():
        series = [getattr(figures, name) for figures in found]
        cells = [f"{statistics.median(s) * 1e3:.2f} / {p99(s) * 1e3:.2f} ms" for s in series]
        rows.append([title, *cells, f"{BARS[name] * 1e3:g} ms"])
    rows.append(["memory added", *(format_bytes(f.resident_bytes) for f in found), format_bytes(MEMORY_BAR)])
    rows.append(["file", *(format_bytes(f.file_bytes) for f in found), ""])
    return rows


def missed_bars(figures: IndexFigures) -> list[str]:
    """What of the largest size is beyond its bar."""
    missed = [_TITLES[name] for name, bar in BARS.items() if p99(getattr(figures, name)) > bar]
    return missed + (["memory added"] if figures.resident_bytes > MEMORY_BAR else [])


def write_index_report(
    folder: Path, found: Sequence[IndexFigures], facts: dict[str, str | int], foreign: float, missed: list[str]
) -> None:
    """Markdown, JSON and a picture of the growth."""
    rows = index_rows(found)
    lines = [
        "# The index, as it grows",
        "",
        f"`attnstore bench index`, {datetime.now(UTC).date()}. {in_words(facts)}.",
        "",
        "Median / 99th percentile. The stores are synthetic: rows for every block and session, files only for the ends",
        "of the sessions that are looked up. Each size is measured in a process of its own; the files are in the page",
        "cache.",
        f"Other processes used {foreign:.0%} of the CPUs meanwhile.",
        "",
        *_markdown(rows),
        "",
        f"Bars missed: {', '.join(missed)}." if missed else "Every bar is met.",
        "",
        "![growth](index.png)",
        "",
    ]
    (folder / "index.md").write_text("\n".join(lines))
    content = {"machine": facts, "figures": [asdict(figures) for figures in found]}
    (folder / "index.json").write_text(json.dumps(content, indent=1) + "\n")
    _draw(found, folder / "index.png")


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in body]


def _draw(found: Sequence[IndexFigures], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, len(_TITLES))
    blocks = [figures.blocks for figures in found]
    for axis, (name, title) in zip(axes, _TITLES.items(), strict=True):
        series = [getattr(figures, name) for figures in found]
        axis.plot(blocks, [statistics.median(s) * 1e3 for s in series], "o-", color="#1f6feb", label="median")
        axis.plot(blocks, [p99(s) * 1e3 for s in series], "o--", color="#9aa5b1", label="99th percentile")
        axis.axhline(BARS[name] * 1e3, color="#cf222e", linewidth=1, label="bar")
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("blocks", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def write_store_report(
    folder: Path, found: Mapping[str, Speeds], facts: dict[str, str | int], foreign: float, about: str
) -> None:
    """Markdown and JSON."""
    lines = [
        "# What durability and encryption cost",
        "",
        f"`attnstore bench store`, {datetime.now(UTC).date()}. {in_words(facts)}.",
        "",
        f"{about} in turns, and ratios to the store as it comes.",
        f"Other processes used {foreign:.0%} of the CPUs meanwhile.",
        "",
        *_markdown(store_rows(found)),
        "",
    ]
    (folder / "store.md").write_text("\n".join(lines))
    content = {"machine": facts, "speeds": {name: asdict(speeds) for name, speeds in found.items()}}
    (folder / "store.json").write_text(json.dumps(content, indent=1) + "\n")


def store_rows(found: Mapping[str, Speeds]) -> list[list[str]]:
    """A table, its head first."""
    rows = [["", "write", "load", "commit of a turn"]]
    base = found[SETTINGS[0]].medians()
    for setting in SETTINGS:
        write, load, commit = found[setting].medians()
        rows.append(
            [
                setting,
                f"{format_bytes(write)}/s ({write / base[0]:.2f} ×)",
                f"{format_bytes(load)}/s ({load / base[1]:.2f} ×)",
                f"{commit * 1e3:.2f} ms ({commit / base[2]:.2f} ×)",
            ]
        )
    return rows
