"""The truncation study as a table, as Markdown, and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_attnstore.lab.bench.machine import versions_in_words
from hf_attnstore.lab.bench.study import Resumed, Stream, by_distance, medians

RESUME_BAR = 1.15
"""What a truncated resume may cost, against an untruncated one of the same length."""

_COLOURS = {"TT": "#57606a", "CA": "#1f6feb", "NKVT": "#cf222e"}


def stream_rows(streams: Sequence[Stream]) -> list[tuple[str, ...]]:
    """Method, perplexity, prefill, truncations and time of each stream, as text."""
    anew = {found.keep_first: found for found in streams if found.method == "TT"}
    rows: list[tuple[str, ...]] = []
    for found in streams:
        against = _more(found, anew.get(1, anew.get(0)))
        same = _more(found, anew.get(found.keep_first))
        seconds = statistics.median(found.truncation_seconds) if found.truncation_seconds else 0.0
        rows.append(
            (
                found.label,
                f"{found.perplexity:,.2f}",
                f"{found.nats_per_token:.4f}",
                against,
                same,
                f"{found.prefilled:,}",
                f"{found.truncations:,}",
                f"{seconds * 1e3:,.1f}",
            )
        )
    return rows


def _more(found: Stream, other: Stream | None) -> str:
    """Nats a token more than those of another stream, as text; nothing where that is none of the same texts."""
    if other is None or found.by_text.keys() != other.by_text.keys():
        return ""
    return f"{found.nats_per_token - other.nats_per_token:+.4f}"


STREAM_COLUMNS = (
    "method",
    "perplexity",
    "nats a token",
    "against TT, first token kept",
    "against TT, as many kept",
    "tokens computed again",
    "truncations",
    "ms per truncated chunk",
)


def resume_rows(resumed: Resumed) -> list[tuple[str, str, str]]:
    """Kind, median milliseconds and ratio, as text."""
    found = medians(resumed)
    rows = []
    for tier in ("memory", "disk"):
        rows.append((f"untruncated, from {tier}", f"{found[f'whole/{tier}'] * 1e3:,.1f}", ""))
        ratio = f"{resumed.ratio(tier):.3f} ×"
        rows.append((f"truncated, from {tier}", f"{found[f'truncated/{tier}'] * 1e3:,.1f}", ratio))
    rows.append(("kept tokens computed again", f"{found['recompute'] * 1e3:,.1f}", ""))
    return rows


RESUME_COLUMNS = ("resumed turn", "ms to the first token", "against untruncated")


def text_rows(streams: Sequence[Stream]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of nats a token by text, as text; no rows unless there are several texts.

    In brackets: against the kept tokens computed again, the first among them, else as many.
    """
    names = list(dict.fromkeys(name for found in streams for name in found.by_text))
    anew = {found.keep_first: found.by_text for found in streams if found.method == "TT"}
    rows = []
    for found in streams if len(names) > 1 else ():
        best = anew.get(1, anew.get(found.keep_first, {}))
        cells = [_by_text(found.by_text, best, name) for name in names]
        rows.append((found.label, *cells))
    return ("nats a token", *names), rows


def _by_text(nats: Mapping[str, float], best: Mapping[str, float], name: str) -> str:
    """One cell: nats a token of a text, and in brackets against the best way."""
    if name not in nats:
        return "–"
    against = f" ({nats[name] - best[name]:+.4f})" if name in best and best is not nats else ""
    return f"{nats[name]:.4f}{against}"


def print_study(console: Console, about: str, streams: Sequence[Stream], resumed: Resumed | None) -> None:
    """Tables for a terminal."""
    console.print(_table(f"Past the window: {about}", STREAM_COLUMNS, stream_rows(streams)))
    columns, by_text = text_rows(streams)
    if by_text:
        console.print(_table("By text", columns, by_text))
    if resumed is not None:
        title = f"A turn resumed with {resumed.tokens:,} tokens in the window"
        console.print(_table(title, RESUME_COLUMNS, resume_rows(resumed)))
        for tier in ("memory", "disk"):
            verdict = "[green]pass[/]" if resumed.ratio(tier) <= RESUME_BAR else "[red]MISS[/]"
            console.print(
                f"  {verdict}  truncated against untruncated, from {tier}: {resumed.ratio(tier):.3f} ×, "
                f"bar ≤ {RESUME_BAR} ×",
                highlight=False,
            )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(
    about: str, streams: Sequence[Stream], resumed: Resumed | None, machine: str, versions: Mapping[str, Any]
) -> str:
    """The report for docs/results."""
    parts = [f"# Truncation: {about}", ""]
    parts += _markdown(STREAM_COLUMNS, stream_rows(streams))
    parts += [
        "",
        "`TT` computes the kept tokens again, `CA` keeps their keys and values and rotates the keys (this library), "
        "`NKVT` keeps keys that belong to other positions. Perplexity is per token, over everything after the first "
        "truncation; tokens computed again are those beyond the text itself.",
    ]
    columns, by_text = text_rows(streams)
    if by_text:
        parts += [
            "",
            "By text; in brackets against TT with the first token kept, or as many as here where that was not run:",
            "",
            *_markdown(columns, by_text),
        ]
    if resumed is not None:
        parts += ["", f"A turn resumed with {resumed.tokens:,} tokens in the window:", ""]
        parts += _markdown(RESUME_COLUMNS, resume_rows(resumed))
    parts += ["", f"Measured on {machine}; {versions_in_words(versions)}.", ""]
    return "\n".join(parts)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def draw(about: str, streams: Sequence[Stream], resumed: Resumed | None, window: int, path: Path) -> None:
    """Writes a PNG: perplexity along the text, tokens computed again, and the cost of resuming."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    panels = 3 if resumed is not None else 2
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    figure.suptitle(f"Past the window: {about}", fontsize=12)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for found in streams:
        places, values = by_distance(found, window)
        style = "--" if found.keep_first else "-"
        axes[0].plot(places, values, style, color=_COLOURS[found.method], label=found.label)
    axes[0].set_yscale("log")
    axes[0].set_xlabel("position in the text, in windows")
    axes[0].set_ylabel("perplexity (log scale)")
    axes[0].legend(fontsize=8)
    labels = [found.label for found in streams]
    colours = [_COLOURS[found.method] for found in streams]
    bars = axes[1].barh(labels, [found.prefilled for found in streams], color=colours)
    axes[1].bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=3)
    axes[1].set_xlabel("tokens computed again")
    axes[1].invert_yaxis()
    axes[1].margins(x=0.2)
    if resumed is not None:
        rows = [row for row in resume_rows(resumed) if not row[0].startswith("kept")]
        colours = [_COLOURS["CA"] if row[0].startswith("trunc") else _COLOURS["TT"] for row in rows]
        bars = axes[2].barh([row[0] for row in rows], [float(row[1].replace(",", "")) for row in rows], color=colours)
        axes[2].bar_label(bars, fmt="{:,.0f} ms", fontsize=8, padding=3)
        axes[2].set_xlabel(f"ms to the first token, {resumed.tokens:,} tokens in the window")
        axes[2].invert_yaxis()
        axes[2].margins(x=0.2)
    figure.savefig(path, dpi=130)
