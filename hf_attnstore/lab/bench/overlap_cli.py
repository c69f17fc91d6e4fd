"""`attnstore bench overlap`: what it brings to load and save beside computing. And `attnstore bench --timeline`."""

from __future__ import annotations

import gc
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hf_attnstore.lab.bench.one_line import errors_in_one_line

if TYPE_CHECKING:
    from hf_attnstore.lab.bench.overlap import Bench, Disk, Point, Way
    from hf_attnstore.lab.bench.report import TableRows
    from hf_attnstore.timeline import Event

_TRACES = 5


def overlap(
    shape: Annotated[
        str | None, typer.Option(help="Random weights: tiny, small, or llama-8b (needs a GPU). [default: small]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A hub name or local path instead of a shape.")] = None,
    points: Annotated[
        str, typer.Option(help="Tokens of history and new tokens of the turns, with commas between turns.")
    ] = "1024/100,2048/100,4096/100,4096/500",
    decode: Annotated[int, typer.Option(min=1, help="Tokens decoded after the first new one.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Times everything is measured, after a warm-up.")] = 5,
    slow: Annotated[
        str, typer.Option(help="Bytes per second of a simulated slow disk, such as 400MiB; 0 leaves it out.")
    ] = "400MiB",
    saving: Annotated[bool, typer.Option(help="Also measure saving, at the shortest history.")] = True,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON, PNG and Markdown.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="A folder on the disk to measure. [default: the folder for temporary files]")
    ] = None,
    seed: Annotated[int, typer.Option(help="For weights, token ids and the order of measurements.")] = 0,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Such as bfloat16; auto is that of the shape or checkpoint.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Threads that torch computes with; 0: its default.")] = 0,
) -> None:
    """Measure resumed turns with overlap of loading and computing, with less of it, and without; and saving likewise.

    Each from disk with its page cache warm, with it dropped, and from a simulated slow disk.
    """
    from hf_attnstore.lab.bench.overlap_report import (
        as_record,
        draw,
        draw_timelines,
        loading_table,
        reservations,
        saving_table,
    )
    from hf_attnstore.timeline import trace_json

    console = Console()
    with errors_in_one_line():
        plan, disks = parse_points(points), disks_of(slow)
        saving_disks = [disk for disk in disks if not disk.cold]  # what is written is in the page cache
        histories = list(dict.fromkeys(point.history for point in plan))
        longest = max(point.history + point.new for point in plan) + decode + 1
        setting = _Setting(shape, model, device, dtype, seed, block_size, decode, threads, longest, store)
        with setting.opened(console) as (loaded, root, about, machine), console.status("measuring") as status:
            from hf_attnstore.lab.bench.machine import ForeignLoad
            from hf_attnstore.lab.bench.overlap import ways_of

            ways = ways_of(loaded.device)
            others = ForeignLoad()
            results = []
            panels: list[tuple[str, Sequence[Event]]] = []
            saved = None
            for history in histories:
                with setting.bench(loaded, history, root / str(history)) as bench:
                    for point in (point for point in plan if point.history == history):
                        results.append(bench.point(point.new, disks, ways, repeats, status.update))
                    if saving and history == min(histories):
                        saved = bench.saving(plan[0].new, saving_disks, repeats, status.update)
                    if history == min(histories) and output is not None:
                        panels = _median_traces(bench, plan[0].new, disks[-1], ways, status.update)
        results.sort(key=lambda result: plan.index(result.point))
        tables = [loading_table(result, disks, ways) for result in results]
        tables += [saving_table(saved, plan[0].new, saving_disks)] if saved is not None else []
        for table in tables:
            _print(console, table)
        share = others.share()
        console.print(f"Other processes used {share:.0%} of the CPUs meanwhile.")
        doubts = reservations(results, share)
        console.print(escape(doubts.replace("**", "")), style="yellow", highlight=False)
        if output is None:
            return
        from hf_attnstore.lab.bench.machine import versions

        output.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": setting.label,
            "versions": versions(),
            "machine": machine,
            "others_share_of_cpus": share,
            "slow_disk": slow,
            "repeats": repeats,
            **as_record(results, saved),
        }
        (output / "overlap.json").write_text(json.dumps(record, indent=1) + "\n")
        (output / "overlap-trace.json").write_text(trace_json(panels[-1][1], panels[-1][0]) + "\n")
        draw(setting.label, results, disks, ways, output / "overlap.png")
        draw_timelines(panels, output / "overlap-timeline.png")
        (output / "overlap.md").write_text(_report(setting.label, about, share, doubts, repeats, slow, tables, ways))
        console.print(f"wrote {output / 'overlap.md'}, .json, .png, overlap-timeline.png, overlap-trace.json")


def write_timeline(
    console: Console,
    file: Path,
    *,
    shape: str | None,
    model: str | None,
    history: int,
    new: int,
    decode: int,
    device: str,
    dtype: str,
    seed: int,
    block_size: int,
    threads: int,
    store: Path | None,
    output: Path | None,
) -> None:
    """Writes the trace of one resumed turn, and says what it shows.

    The turn loads from disk with the page cache dropped, saves, and has the session after it fetched meanwhile.

    Args:
        output: a folder for a picture of it, if any.

    Raises:
        AttentionStoreError: the model can't be had, or the turn was not what it should be.
    """
    from hf_attnstore.cache.transfer.load import as_it_comes
    from hf_attnstore.lab.bench.overlap import Disk
    from hf_attnstore.lab.bench.overlap_report import draw_timelines, summary_table
    from hf_attnstore.timeline import trace_json

    setting = _Setting(
        shape, model, device, dtype, seed, block_size, decode, threads, history + new + decode + 1, store
    )
    cold = Disk("cold", "page cache dropped", cold=True)
    with (
        setting.opened(console) as (loaded, root, _, _),
        console.status("recording a turn"),
        setting.bench(loaded, history, root / "timeline") as bench,
    ):
        events, sample = bench.trace(new, cold, as_it_comes, upcoming=history)
    title = f"{setting.label}: a turn of {new} new tokens on {history:,} from disk, page cache dropped"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(trace_json(events, title) + "\n")
    _print(console, summary_table(events))
    console.print(f"Time to first token: {sample.ttft * 1000:,.1f} ms.", highlight=False)
    console.print(f"Trace: {file}. Open it at https://ui.perfetto.dev or in chrome://tracing.", highlight=False)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        picture = output / f"timeline-{re.sub(r'[^A-Za-z0-9._-]+', '-', setting.label)}.png"
        draw_timelines([(title, events)], picture)
        console.print(f"Picture: {picture}", highlight=False)


def _median_traces(
    bench: Bench, new: int, disk: Disk, ways: Sequence[Way], progress: Callable[[str], None]
) -> list[tuple[str, Sequence[Event]]]:
    """A timeline for some of the ways: of a few turns each, in turns, the one with the median TTFT."""
    from hf_attnstore.lab.bench.overlap import FIRST, MEASURED, THREADS

    shown = [way for way in (FIRST, MEASURED, THREADS) if way in ways]
    found: dict[str, list[tuple[float, Sequence[Event]]]] = {way.key: [] for way in shown}
    for number in range(_TRACES):
        for way in shown[number % len(shown) :] + shown[: number % len(shown)]:
            progress(f"recording: {way.title}")
            events, sample = bench.trace(new, disk, way.begin)
            found[way.key].append((sample.ttft, events))
    middle = {key: sorted(traces, key=lambda trace: trace[0])[_TRACES // 2] for key, traces in found.items()}
    return [(f"{way.title} ({disk.title}), {middle[way.key][0] * 1000:,.0f} ms", middle[way.key][1]) for way in shown]


def parse_points(text: str) -> list[Point]:
    """Points such as "1024/100,4096/500".

    Raises:
        BenchError: it is something else.
    """
    from hf_attnstore.lab.bench.overlap import Point
    from hf_attnstore.lab.bench.shapes import BenchError

    found = []
    for part in text.split(","):
        numbers = part.strip().split("/")
        if len(numbers) != 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise BenchError(f"--points takes turns such as 1024/100 with commas between them, not {part!r}.")
        found.append(Point(int(numbers[0]), int(numbers[1])))
    return found


def disks_of(slow: str) -> list[Disk]:
    """The disks to measure; the last one is the slowest."""
    from hf_attnstore.lab.bench.overlap import Disk
    from hf_attnstore.sizes import parse_bytes

    rate = parse_bytes(slow)
    disks = [Disk("warm", "page cache warm"), Disk("cold", "page cache dropped", cold=True)]
    return [*disks, Disk("slow", f"a disk of {slow}/s", bytes_per_second=rate)] if rate else disks


class _Setting:
    """What both commands need: a model, a folder, and words for them."""

    def __init__(
        self,
        shape: str | None,
        model: str | None,
        device: str,
        dtype: str,
        seed: int,
        block_size: int,
        decode: int,
        threads: int,
        longest: int,
        store: Path | None,
    ) -> None:
        import torch

        from hf_attnstore.lab.bench.shapes import choose_model

        if threads:
            torch.set_num_threads(threads)
        if shape is None and model is None:
            shape = "small"
        self._spec = choose_model(shape, model, device=device, seed=seed, max_tokens=longest, dtype=dtype)
        self._seed, self._block_size, self._decode, self._store = seed, block_size, decode, store
        self.label = self._spec.label

    @contextmanager
    def opened(self, console: Console) -> Iterator[tuple[Any, Path, str, dict[str, str | int]]]:
        """The model, a folder for stores that is removed afterwards, and the machine in words and as a record."""
        import torch

        from hf_attnstore.lab.bench.machine import describe_machine, in_words
        from hf_attnstore.lab.bench.overlap import no_gate
        from hf_attnstore.lab.bench.shapes import load_model

        if self._store is not None:
            self._store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="attnstore-bench-", dir=self._store) as folder:
            root = Path(folder)
            machine = describe_machine(root)
            about = in_words(machine)
            console.print(f"{self.label} on {about}", highlight=False)
            model = load_model(self._spec)
            gc.collect()
            gc.freeze()  # what is there already need not be looked through before every turn that is timed
            try:
                with torch.inference_mode(), no_gate():
                    yield model, root, about, machine
            finally:
                gc.unfreeze()

    @contextmanager
    def bench(self, model: Any, history: int, folder: Path) -> Iterator[Bench]:
        """A history that is saved."""
        from hf_attnstore.lab.bench.overlap import Bench

        folder.mkdir()
        bench = Bench(model, history, folder, decode=self._decode, seed=self._seed, block_size=self._block_size)
        try:
            yield bench
        finally:
            bench.close()


def _report(
    label: str,
    about: str,
    share: float,
    doubts: str,
    repeats: int,
    slow: str,
    tables: list[TableRows],
    ways: Sequence[Way],
) -> str:
    from hf_attnstore.lab.bench.machine import versions, versions_in_words
    from hf_attnstore.lab.bench.overlap_report import as_markdown

    legend = "\n".join(f"- **{way.title}**: {way.words}" for way in ways)
    simulated = (
        f"The disk of {slow}/s is simulated: a queue in front of the real one, with its page cache warm, which hands "
        f"out {slow} per second; what the kernel was asked to read ahead is in that queue from then on. "
        if slow != "0"
        else ""
    )
    return f"""# Overlap: {label}

`attnstore bench overlap`. Measured on {about}; {versions_in_words(versions())}.

All ways are the same code with other settings, interleaved in one process in shuffled order; medians of {repeats}
repeats with the middle half in brackets, ratios are medians of those within a repeat. All ways gave the same tokens.
{simulated}Other processes used {share:.0%} of the CPUs meanwhile.

{doubts}

{legend}

![Time to first token](overlap.png)

{as_markdown(tables)}
![Timelines](overlap-timeline.png)

Each is the one with the median TTFT of {_TRACES} recorded turns, which were interleaved too.

The last of these as a [trace](overlap-trace.json) for [Perfetto](https://ui.perfetto.dev).
"""


def _print(console: Console, table: TableRows) -> None:
    from hf_attnstore.lab.bench.report import drawn

    console.print(drawn(table))
    for note in table.notes:
        console.print(f"  {note}", style="dim", highlight=False)
