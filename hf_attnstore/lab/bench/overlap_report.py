"""What overlap brings, as tables, as a record and as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from hf_attnstore.lab.bench.figures import ratio, spread
from hf_attnstore.lab.bench.overlap import (
    ALL,
    ARMS,
    FETCHED,
    FIRST,
    MEASURED,
    MEMORY,
    ONE,
    THREADS,
    TURNS,
    Disk,
    PointResult,
    SavingResult,
    Way,
)
from hf_attnstore.lab.bench.report import TableRows
from hf_attnstore.timeline import TRACKS, Event, exposed_seconds, hidden_seconds, intervals, lanes, total

BUSY, NOISY = 0.1, 1.3
"""From what share of others, or from what factor between equal turns on, times are not to be compared."""

COLOURS = {
    "compute": "#1f6feb",
    "wait": "#cf222e",
    "load": "#2da44e",
    "save": "#8250df",
    "write": "#bf8700",
    "fetch": "#1b7c83",
}
_WAY_COLOURS = {
    FIRST.key: "#57606a", ONE.key: "#8bb4f0", MEASURED.key: "#1f6feb", ALL.key: "#0a3069", THREADS.key: "#2da44e",
    FETCHED.key: "#1b7c83",
}  # fmt: skip


def loading_table(result: PointResult, disks: Sequence[Disk], ways: Sequence[Way]) -> TableRows:
    """The resumed turns of one point."""
    samples = result.samples
    kept = [sample.ttft for sample in samples["kept"]]
    rows: list[tuple[str, ...]] = [("DynamicCache kept in memory", *_figures(kept, None, kept), "–")]
    rows.append(_row(MEMORY.title, result, "memory", kept, None))
    for disk in disks:
        first = [sample.ttft for sample in samples[f"{disk.key}/{FIRST.key}"]]
        for way in ways:
            against = None if way is FIRST else first
            rows.append(_row(f"{disk.title}: {way.title}", result, f"{disk.key}/{way.key}", kept, against))
    notes = [*result.notes]
    for name, shares in result.fetched.items():
        disk = next(disk for disk in disks if disk.key == name.split("/")[0])
        notes.append(f"{disk.title}: {median(shares):.0%} of the blocks were fetched when the turn began.")
    after = [after for _, after in result.evictions if after is not None]
    if after and max(after) > 0.01:
        notes.append(f"The page cache was NOT fully dropped: up to {max(after):.0%} of the files' pages stayed in it.")
    return TableRows(
        f"{result.point.label} tokens, {result.kv_bytes / 2**20:.0f} MiB of KV",
        ("", "TTFT, ms", "× kept", "exposed load, ms", "× no overlap"),
        rows,
        tuple(notes),
    )


def _row(title: str, result: PointResult, name: str, kept: list[float], first: list[float] | None) -> tuple[str, ...]:
    samples = result.samples[name]
    ttft = [sample.ttft for sample in samples]
    exposed = [sample.exposed or 0.0 for sample in samples]
    against = "–" if first is None else f"{ratio(ttft, first).paired:.2f}"
    return (title, *_figures(ttft, exposed, kept), against)


def _figures(ttft: list[float], exposed: list[float] | None, kept: list[float]) -> tuple[str, str, str]:
    return _ms(ttft), f"{ratio(ttft, kept).paired:.2f}", "–" if exposed is None else _ms(exposed)


def _ms(values: Sequence[float]) -> str:
    found = spread([value * 1000 for value in values])
    digits = 0 if found.median >= 100 else 1
    return f"{found.median:,.{digits}f} ({found.low:,.{digits}f}–{found.high:,.{digits}f})"


def control(points: Sequence[PointResult]) -> float:
    """By what factor the TTFT of one and the same way differs between repeats: the largest over the smallest, the
    median of all ways. Differences between ways that are not clearly larger say nothing."""
    spreads = []
    for result in points:
        for samples in result.samples.values():
            ttft = [sample.ttft for sample in samples]
            spreads.append(max(ttft) / min(ttft))
    return median(spreads)


def reservations(points: Sequence[PointResult], share: float) -> str:
    """What a reader must know before comparing times."""
    factor = control(points)
    text = (
        f"Between repeats, the TTFT of one and the same way differs by a factor of {factor:.2f} (median of all ways)."
    )
    if share > BUSY:
        text += (
            f" **The machine was busy: others used {share:.0%} of its CPUs. Differences of TTFT and of turn times are "
            "noise here and are not to be compared; and slower computing hides more of a load than it would alone.**"
        )
    elif factor > NOISY:
        text += (
            f" **Nobody else used the machine to speak of ({share:.0%} of its CPUs), and yet its speed is not steady: "
            "small differences of TTFT and of turn times are noise. What was exposed of a load is steadier.**"
        )
    return text


def saving_table(result: SavingResult, new: int, disks: Sequence[Disk]) -> TableRows:
    """The turns that save."""
    rows: list[tuple[str, ...]] = []
    for turn, words in TURNS.items():
        for disk in disks:
            late = result.seconds[f"{turn}/{disk.key}/after"]
            for arm, title in ARMS.items():
                name = f"{turn}/{disk.key}/{arm}"
                seconds = result.seconds[name]
                rows.append(
                    (
                        f"{words}, {disk.title}: {title}",
                        _ms(seconds),
                        "–" if arm == "after" else f"{ratio(seconds, late).paired:.2f}",
                        "–" if arm != "behind" else _ms(result.flush[name]),
                        "–" if arm == "none" else f"{result.saved_bytes[turn] / 2**20:.1f} MiB",
                    )
                )
    return TableRows(
        f"Saving: a first turn of {result.history:,} tokens, and one that resumes them with {new:,} new ones",
        ("saved …", "turn, ms", "× at its end", "goes on behind it, ms", "saved"),
        rows,
        ("Turn: from making the cache until its caller has all it waits for.",),
    )


def summary_table(events: Sequence[Event]) -> TableRows:
    """A timeline in numbers."""
    rows = []
    for track in TRACKS:
        found = [event for event in events if event.track == track]
        if found:
            busy = total(intervals(events, track))
            hidden = "–" if track in ("compute", "wait") else f"{hidden_seconds(events, track) * 1000:,.1f}"
            rows.append((track, f"{len(found):,}", f"{busy * 1000:,.1f}", hidden))
    load = total(intervals(events, "load"))
    note = (
        f"Exposed load time: {exposed_seconds(events) * 1000:,.1f} ms, of {load * 1000:,.1f} ms in which something was "
        "being put in place."
    )
    return TableRows("The turn", ("track", "events", "busy, ms", "of it under computing, ms"), rows, (note,))


def as_record(points: Sequence[PointResult], saving: SavingResult | None) -> dict[str, Any]:
    """Everything measured, raw samples included."""
    return {
        "points": [
            {
                **asdict(result.point),
                "kv_bytes": result.kv_bytes,
                "samples": {
                    name: [{k: v for k, v in asdict(sample).items() if k != "tokens"} for sample in samples]
                    for name, samples in result.samples.items()
                },
                "fetched_share": result.fetched,
                "page_cache_before_after": result.evictions,
            }
            for result in points
        ],
        "saving": asdict(saving) if saving is not None else None,
    }


def as_markdown(tables: Sequence[TableRows]) -> str:
    """Tables for docs/results."""
    parts: list[str] = []
    for table in tables:
        parts += [f"**{table.title}**", "", "| " + " | ".join(table.columns) + " |"]
        parts.append("| " + " | ".join("---:" if i else "---" for i in range(len(table.columns))) + " |")
        parts += ["| " + " | ".join(row) + " |" for row in table.rows]
        for note in table.notes:
            parts += ["", note]
        parts.append("")
    return "\n".join(parts)


def draw(label: str, points: Sequence[PointResult], disks: Sequence[Disk], ways: Sequence[Way], path: Path) -> None:
    """Writes a PNG: TTFT by way, of which the exposed load time is dark, for each disk; the line is a kept cache."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(1.5 + 4.6 * len(disks), 4.8), layout="constrained")
    figure.suptitle(f"Time to first token of a resumed turn: {label}", fontsize=12)
    axes = figure.subplots(1, len(disks), squeeze=False, sharey=True)[0]
    width = 0.8 / len(ways)
    for axis, disk in zip(axes, disks, strict=True):
        for place, result in enumerate(points):
            kept = median(sample.ttft for sample in result.samples["kept"]) * 1000
            axis.hlines(kept, place - 0.45, place + 0.45, color="#24292f", linewidth=1)
            for number, way in enumerate(ways):
                samples = result.samples[f"{disk.key}/{way.key}"]
                ttft = median(sample.ttft for sample in samples) * 1000
                exposed = median(sample.exposed or 0.0 for sample in samples) * 1000
                x = place - 0.4 + (number + 0.5) * width
                axis.bar(x, ttft, width * 0.92, color=_WAY_COLOURS[way.key], alpha=0.45)
                axis.bar(x, exposed, width * 0.92, color=_WAY_COLOURS[way.key])
        axis.set_title(disk.title, fontsize=10)
        axis.set_xticks(range(len(points)), [result.point.label for result in points], fontsize=8)
        axis.set_xlabel("tokens of history + new", fontsize=9)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("ms (dark: exposed load time; line: kept in memory)", fontsize=9)
    handles = [Patch(color=_WAY_COLOURS[way.key], label=f"{way.title}: {way.words}") for way in ways]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def draw_timelines(panels: Sequence[tuple[str, Sequence[Event]]], path: Path, steps: int = 3) -> None:
    """Writes a PNG: timelines one below the other, each up to its first few decoding steps, on one scale."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    shown = [(title, *_beginning(events, steps)) for title, events in panels]
    rows = [[(t, lane) for t in TRACKS for lane in lanes([e for e in found if e.track == t])] for _, found, _ in shown]
    figure = Figure(figsize=(11, sum(0.7 + 0.26 * len(lanes_) for lanes_ in rows) + 0.4), layout="constrained")
    axes = figure.subplots(
        len(shown), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [len(r) + 1.5 for r in rows]}
    )[:, 0]
    for axis, (title, _, begin), found in zip(axes, shown, rows, strict=True):
        for place, (track, lane) in enumerate(found):
            bars = [((event.begin - begin) * 1000, event.seconds * 1000) for event in lane]
            axis.broken_barh(bars, (place - 0.4, 0.8), color=COLOURS[track], edgecolor="white", linewidth=0.4)
            for (x, length), event in zip(bars, lane, strict=True):
                if event.name.startswith("layer ") and "," not in event.name and track in ("compute", "load"):
                    axis.annotate(
                        event.name.removeprefix("layer "), (x + length / 2, place), ha="center", va="center",
                        fontsize=6, color="white", clip_on=True,
                    )  # fmt: skip
        names = [track if n == 0 or found[n - 1][0] != track else "" for n, (track, _) in enumerate(found)]
        axis.set_yticks(range(len(found)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10, loc="left")
        axis.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    axes[-1].set_xlabel("ms; numbers are layers", fontsize=9)
    figure.savefig(path, dpi=130)


def _beginning(events: Sequence[Event], steps: int) -> tuple[list[Event], float]:
    """The events that begin before decoding has gone on for so many steps, and when the first of them does."""
    decoding = [event.end for event in events if event.track == "compute" and event.name.startswith("step")]
    end = decoding[min(steps, len(decoding)) - 1] if decoding else math.inf
    begin = min(event.begin for event in events)
    return [e._replace(end=min(e.end, end)) for e in events if e.begin < end], begin
