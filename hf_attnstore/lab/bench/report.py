"""What was measured as a plain record (JSON), as tables on a terminal, and as Markdown.

Both kinds of table are made from the same rows, so they say the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_attnstore.lab.bench.figures import Spread, Verdict, evaluate, ratio, spread
from hf_attnstore.lab.bench.machine import in_words, versions_in_words
from hf_attnstore.lab.bench.measure import PROBES, Measured
from hf_attnstore.lab.bench.methods import METHODS
from hf_attnstore.lab.bench.rss import MODES, Rss
from hf_attnstore.sizes import format_seconds

FORMAT = 1
TITLES: dict[str, str] = {method.key: method.title for method in METHODS}

Row = tuple[str, ...]


@dataclass(frozen=True)
class TableRows:
    """A table before it is drawn: the first column is text, the others are figures."""

    title: str
    columns: Row
    rows: Sequence[Row]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """All that one history length gave; `failure` says why some of it is missing, if it is."""

    measured: Measured
    rss: dict[str, list[Rss]]
    failure: str = ""

    @property
    def series(self) -> dict[str, list[float]]:
        """Figures by name, one per repeat: `ttft/…`, `decode/…`, `total/…` in seconds, `rss/…` in bytes."""
        found: dict[str, list[float]] = {}
        for key, samples in self.measured.samples.items():
            found[f"ttft/{key}"] = [sample.ttft for sample in samples]
            found[f"total/{key}"] = [sample.total for sample in samples]
            decode = [sample.decode for sample in samples]
            if not any(math.isnan(value) for value in decode):
                found[f"decode/{key}"] = decode
        for mode, peaks in self.rss.items():
            found[f"rss/{mode}"] = [float(rss.peak) for rss in peaks]
        return found

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        found = list(self.measured.notes)
        work = self.measured.workload
        if work.recomputed < work.repeats:
            found.append(f"Everything was computed anew in the first {work.recomputed} of {work.repeats} repeats only.")
        if self.measured.others > 0.03:
            found.append(
                f"Other processes used {self.measured.others:.0%} of the CPUs meanwhile, so figures are noisy and "
                "small differences mean nothing."
            )
        if self.failure:
            found.append(self.failure)
        return found

    @property
    def verdicts(self) -> list[Verdict]:
        return evaluate(self.series, self.measured.workload.history)


def as_record(result: Result) -> dict[str, Any]:
    """Everything measured, raw samples included, and the figures made from it."""
    measured = result.measured
    samples = {
        key: [{name: value for name, value in asdict(sample).items() if name != "tokens"} for sample in samples]
        for key, samples in measured.samples.items()
    }
    return {
        **asdict(measured.workload),
        "kv_bytes": measured.kv_bytes,
        "file_bytes": measured.file_bytes,
        "attach_seconds": measured.attach_seconds,
        "saved_bytes": measured.saved_bytes,
        "same_tokens": sorted(measured.samples),
        "others_share_of_cpus": measured.others,
        "notes": result.notes,
        "samples": samples,
        "flush_seconds": measured.flush,
        "probe_seconds": measured.probes,
        "page_cache_before_after": measured.evictions,
        "rss": {mode: [asdict(rss) for rss in found] for mode, found in result.rss.items()},
        "summary": {name: asdict(spread(values)) for name, values in sorted(result.series.items()) if values},
        "bars": [
            {
                "key": verdict.bar.key,
                "text": verdict.bar.text,
                "limit": verdict.bar.limit,
                "ratio": asdict(verdict.ratio) if verdict.ratio else None,
                "passed": verdict.passed,
                "why_not": verdict.why_not,
            }
            for verdict in result.verdicts
        ],
    }


def tables(result: Result) -> list[TableRows]:
    """The tables of one history length."""
    return [table for table in (_turns(result), _saving(result), _bandwidth(result), _rss(result)) if table.rows]


def verdict_lines(verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Each bar as (state, line); the state is "pass", "MISS" or "n/a"."""
    lines = []
    for verdict in verdicts:
        state = {True: "pass", False: "MISS", None: "n/a"}[verdict.passed]
        text = f"{verdict.bar.text}: "
        if verdict.ratio is not None:
            text += (
                f"{_times(verdict.ratio.paired)} "
                f"(middle half {_times(verdict.ratio.low)} to {_times(verdict.ratio.high)}, "
                f"of medians {_times(verdict.ratio.medians)}, of smallest {_times(verdict.ratio.smallest)}), "
            )
        text += f"bar ≤ {verdict.bar.limit:g} ×"
        lines.append((state, f"{text} ({verdict.why_not})" if verdict.why_not else text))
    return lines


def drawn(table: TableRows) -> Table:
    """A table for a terminal, without its notes."""
    found = Table(title=table.title, title_justify="left", title_style="bold")
    for index, column in enumerate(table.columns):
        found.add_column(column, justify="right" if index else "left")
    for row in table.rows:
        found.add_row(*row)
    return found


def answer(result: Result) -> str:
    """What it came to, in a line: how much sooner a turn starts from disk than computed."""
    series, history = result.series, result.measured.workload.history
    computed, disk, memory = (series.get(f"ttft/{key}") for key in ("recompute", "disk", "memory"))
    if not computed or not disk:
        return f"A turn after {history:,} tokens: not measured."
    times = ratio(computed, disk).paired
    how = f"starts {times:,.1f} × sooner" if times >= 1 else f"starts {1 / times:,.1f} × later"
    held = f", {format_seconds(statistics.median(memory))} from memory" if memory else ""
    return (
        f"A turn after {history:,} tokens {how}: first token after {format_seconds(statistics.median(disk))} from disk"
        f"{held}, {format_seconds(statistics.median(computed))} computed."
    )


def print_result(console: Console, result: Result, *, bars: bool = True) -> None:
    """The answer in a line, tables, and the project's bars if they are asked for, on a terminal."""
    console.print(answer(result), style="bold", highlight=False)
    console.rule(f"[bold]{_headline(result)}")
    for table in tables(result):
        console.print(drawn(table))
        for note in table.notes:
            console.print(f"  {note}", style="dim")
    for note in result.notes:
        console.print(f"Note: {note}", style="yellow")
    if not bars:
        return
    console.print("[bold]Bars[/bold] (median of the ratios within each repeat)")
    for state, line in verdict_lines(result.verdicts):
        style = {"pass": "green", "MISS": "red", "n/a": "dim"}[state]
        console.print(f"  [{style}]{state:>4}[/{style}]  {line}", highlight=False)


def as_markdown(label: str, machine: dict[str, Any], versions: dict[str, str], results: Sequence[Result]) -> str:
    """The report for docs/results/."""
    parts = [
        f"# attnstore bench: {label}",
        "",
        f"Measured on {in_words(machine)}.",
        f"With {versions_in_words(versions)}.",
        "",
        "All methods ran in one process, interleaved: every repeat runs each of them once, in shuffled",
        "order, after a warm-up round. Figures are medians with the middle half of the repeats in brackets;",
        "“× kept” and “× recompute” are medians of the ratios within a repeat. Every method gave the same",
        "tokens.",
    ]
    for result in results:
        parts += ["", f"## {_headline(result)}"]
        for table in tables(result):
            parts += ["", f"**{table.title}**", ""]
            parts.append("| " + " | ".join(table.columns) + " |")
            parts.append("| " + " | ".join("---:" if i else "---" for i in range(len(table.columns))) + " |")
            parts += ["| " + " | ".join(row) + " |" for row in table.rows]
            parts += [f"\n{note}" for note in table.notes]
        parts += [f"\nNote: {note}" for note in result.notes]
        parts += ["", "**Bars** (median of the ratios within each repeat)", ""]
        parts += [f"- {state}: {line}" for state, line in verdict_lines(result.verdicts)]
    return "\n".join(parts) + "\n"


def _headline(result: Result) -> str:
    work = result.measured.workload
    return (
        f"{work.history:,} tokens of history, {work.new} new, {work.decode} decoded: "
        f"{_bytes(result.measured.kv_bytes)} of KV"
    )


def _turns(result: Result) -> TableRows:
    series, measured = result.series, result.measured
    rows = []
    for key, title in TITLES.items():
        samples = measured.samples.get(key)
        if not samples:
            continue
        ttft = series[f"ttft/{key}"]
        loads = [sample.load for sample in samples if sample.load is not None]
        exposed = [sample.exposed for sample in samples if sample.exposed is not None]
        rows.append(
            (
                title,
                _milliseconds(ttft),
                _against(ttft, series.get("ttft/kept")),
                _against(ttft, series.get("ttft/recompute")),
                _milliseconds(series.get(f"decode/{key}", [])),
                _against(series.get(f"decode/{key}", []), series.get("decode/kept")),
                _bytes(samples[0].loaded_bytes) if samples[0].loaded_bytes else "–",
                _milliseconds(loads),
                _milliseconds(exposed),
                _count([sample.faults for sample in samples if sample.faults is not None]),
            )
        )
    return TableRows(
        "A resumed turn",
        (
            "",
            "TTFT, ms",
            "× kept",
            "× recompute",
            "decode, ms/token",
            "× kept",
            "loaded",
            "load, ms",
            "exposed, ms",
            "page faults",
        ),
        rows,
        (
            "TTFT: from the call to the first new token, making the cache or reading a file included. "
            "Load: summed over I/O threads for the store; exposed: what compute had to wait for. "
            "Page faults: in that time; thousands mean that memory came fresh from the system instead of being used "
            "again. Left in place: by the device tier, as a store does without being asked on a CPU, for the "
            "conversations used last; from memory: of a store without one.",
            *([] if not measured.evictions else [_eviction_note(measured)]),
        ),
    )


def _saving(result: Result) -> TableRows:
    series, measured = result.series, result.measured
    rows = []
    for key, title, against in (
        ("recompute", "first turn, plain generate", None),
        ("first", "first turn, empty store, saved", "recompute"),
        ("not_saving", "resumed turn from memory, not saved", None),
        ("saving", "resumed turn from memory, saved", "not_saving"),
    ):
        if key not in measured.samples:
            continue
        total = series[f"total/{key}"]
        rows.append(
            (
                title,
                _milliseconds(total),
                _against(total, series.get(f"total/{against}")) if against else "–",
                _milliseconds(series.get(f"decode/{key}", [])),
                _milliseconds(measured.flush.get(key, [])),
                _bytes(measured.saved_bytes[key]) if key in measured.saved_bytes else "–",
            )
        )
    return TableRows(
        "What saving costs",
        ("", "turn, ms", "× without", "decode, ms/token", "flush after, ms", "saved"),
        rows,
        (
            "Turn: until generate returned. The flush after it waits for the writes that went on behind the "
            "turn; no turn has to wait for it. "
            f"Attaching to the model took {measured.attach_seconds * 1000:.0f} ms, once.",
        ),
    )


def _bandwidth(result: Result) -> TableRows:
    rows: list[Row] = []
    for title, nbytes, seconds in bandwidths(result):
        rates = spread([nbytes / value / 2**30 for value in seconds])
        rows.append(
            (
                title,
                _with_middle_half(rates, 2),
                _milliseconds(seconds),
                _bytes(nbytes),
            )
        )
    note = ("safetensors is not listed: load_file maps the file, and the reading falls into the turn.",)
    return TableRows("Bandwidth", ("", "GiB/s", "ms", "bytes"), rows, note)


def bandwidths(result: Result) -> list[tuple[str, int, list[float]]]:
    """Title, bytes and seconds of everything that moved the history's bytes, in the order of a report."""
    measured = result.measured
    found: list[tuple[str, int, list[float]]] = []
    for key, title in PROBES.items():
        if seconds := measured.probes.get(key):
            nbytes = measured.file_bytes if key.startswith("read") else measured.kv_bytes
            found.append((title, nbytes, seconds))
    for key, title in TITLES.items():
        if key == "safetensors":  # a mapped file is read when it is used
            continue
        loads = [(sample.loaded_bytes, sample.load) for sample in measured.samples.get(key, []) if sample.load]
        if loads:
            found.append((f"{title} (load)", loads[0][0], [seconds for _, seconds in loads if seconds]))
    return found


def _rss(result: Result) -> TableRows:
    series = result.series
    rows = []
    for mode, title in MODES.items():
        found = result.rss.get(mode)
        if not found:
            continue
        rows.append(
            (
                title,
                _mebibytes(spread([rss.loaded for rss in found]).median),
                _mebibytes(spread([rss.before for rss in found]).median),
                _mebibytes(found[0].blocks) if found[0].blocks else "–",
                _mebibytes(found[0].buffers) if found[0].buffers else "–",
                _mebibytes(spread([rss.peak for rss in found]).median),
                _against(series[f"rss/{mode}"], series.get("rss/kept")),
            )
        )
    return TableRows(
        "Resident memory of a resumed turn, in a process of its own",
        ("", "model loaded", "before the turn", "of it blocks", "buffers for layers", "peak in the turn", "× kept"),
        rows,
        (
            "Blocks: what the memory tier holds. Buffers: left by the turn before, for layers to be used again; the "
            "blocks are copied into them, so that from memory the history is there twice.",
        ),
    )


def _eviction_note(measured: Measured) -> str:
    after = [fraction for _, fraction in measured.evictions if fraction is not None]
    if not after:
        return "Whether the page cache was really dropped could not be checked here."
    worst = max(after)
    if worst <= 0.01:
        return "The page cache was really dropped: none of the block files' pages were left in it (mincore)."
    return (
        f"The page cache was NOT fully dropped: up to {worst:.0%} of the block files' pages stayed in it "
        "(mincore), so the figures for a dropped page cache are those of a partly warm one."
    )


def _milliseconds(values: Sequence[float]) -> str:
    if not values:
        return "–"
    found = spread([value * 1000 for value in values])
    digits = 0 if found.median >= 1000 else 1 if found.median >= 10 else 2
    return _with_middle_half(found, digits)


def _count(values: Sequence[int]) -> str:
    if not values:
        return "–"
    return _with_middle_half(spread([float(value) for value in values]), 0)


def _with_middle_half(found: Spread, digits: int) -> str:
    return f"{found.median:,.{digits}f} ({found.low:,.{digits}f}–{found.high:,.{digits}f})"


def _against(above: Sequence[float], below: Sequence[float] | None) -> str:
    if not above or not below:
        return "–"
    return f"{ratio(above, below).paired:.3f}"


def _times(value: float) -> str:
    return f"{value:.3f} ×"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
