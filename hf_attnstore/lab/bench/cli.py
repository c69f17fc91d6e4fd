"""`attnstore bench`: what the store gives your model on your machine."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hf_attnstore.lab.bench.beyond_cli import beyond
from hf_attnstore.lab.bench.codec_cli import codecs
from hf_attnstore.lab.bench.dialogues_cli import dialogues
from hf_attnstore.lab.bench.gate_cli import gate
from hf_attnstore.lab.bench.one_line import errors_in_one_line
from hf_attnstore.lab.bench.overlap_cli import overlap, write_timeline
from hf_attnstore.lab.bench.peers_cli import peers
from hf_attnstore.lab.bench.queue_cli import queue
from hf_attnstore.lab.bench.reliability_cli import index, store
from hf_attnstore.lab.bench.shared_cli import shared
from hf_attnstore.lab.bench.study_cli import truncation
from hf_attnstore.lab.bench.thinking_cli import thinking

if TYPE_CHECKING:
    from hf_attnstore.lab.bench.report import Result
    from hf_attnstore.lab.bench.shapes import ModelSpec

app = typer.Typer(help="Measure what the store gives a model on this machine.", add_completion=False)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights: tiny, small, or llama-8b (needs a GPU). [default: small]"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A hub name or local path instead of a shape.")] = None,
    history: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of history; repeat it, or give a comma list. [default: 4096]"),
    ] = None,
    new: Annotated[int, typer.Option(min=1, help="New prompt tokens on top of the history.")] = 32,
    decode: Annotated[int, typer.Option(min=1, help="Tokens decoded after the first new one.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Times everything is measured, after a warm-up.")] = 7,
    recompute: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Repeats in which everything is computed anew, which takes longest after a long history. "
            "[default: all]",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON, PNG and Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    seed: Annotated[int, typer.Option(help="For weights, token ids and the order of measurements.")] = 0,
    store: Annotated[
        Path | None,
        typer.Option(
            help="A folder on the disk to measure. The bench makes a folder of its own in it, and removes it "
            "at the end. [default: the system's folder for temporary files]"
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Such as bfloat16; auto is that of the shape or checkpoint.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Threads that torch computes with; 0: its default.")] = 0,
    rss: Annotated[bool, typer.Option(help="Also measure peak memory, each in a process of its own.")] = True,
    only: Annotated[
        str | None,
        typer.Option(
            help="A comma list of what to measure beside recompute and kept, for a quick look: device, memory, disk, "
            "cold, torch, safetensors, first, saving; none. [default: all]",
            show_default=False,
        ),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Instead of measuring, record one resumed turn (of the first history), and write what happened when "
            "to this file, as a trace for ui.perfetto.dev; with --output, a picture too.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[bool, typer.Option(help="Show the project's own bars, and exit with 1 if one is missed.")] = False,
) -> None:
    """Measure a resumed turn side by side: recomputed, kept in memory, from the store, from plain files.

    Tokens are compared on the way: if a method gives other tokens than plain generate (in 16 bits: than a cache
    kept in memory), the bench stops with an error.
    """
    if context.invoked_subcommand is not None:
        return
    console = Console(stderr=as_json)
    with errors_in_one_line():
        histories = parse_histories(history or ["4096"])
        if timeline is not None:
            write_timeline(
                console, timeline, shape=shape, model=model, history=histories[0], new=new, decode=decode,
                device=device, dtype=dtype, seed=seed, block_size=block_size, threads=threads, store=store,
                output=output,
            )  # fmt: skip
            return
        if model is None and shape is None:
            shape = "small"
        missed = _bench(
            console,
            shape=shape,
            name=model,
            histories=histories,
            new=new,
            decode=decode,
            repeats=repeats,
            recompute=recompute,
            output=output,
            as_json=as_json,
            seed=seed,
            store=store,
            block_size=block_size,
            device=device,
            dtype=dtype,
            threads=threads,
            rss=rss,
            check=check,
            steps=parse_steps(only),
        )
    if check and missed:
        raise typer.Exit(1)


# these are under `attnstore lab`, too
app.command("truncation", hidden=True)(truncation)
app.command("thinking", hidden=True)(thinking)
app.command("gate", hidden=True)(gate)
app.command("codecs")(codecs)
app.command("shared")(shared)
app.command("queue", hidden=True)(queue)
app.command("overlap", hidden=True)(overlap)
app.command("index", hidden=True)(index)
app.command("store", hidden=True)(store)
app.command("dialogues", hidden=True)(dialogues)
app.command("peers")(peers)
app.command("beyond")(beyond)


def parse_histories(values: list[str]) -> list[int]:
    """Token counts from repeated options and comma lists.

    Raises:
        BenchError: something that is not a positive whole number.
    """
    from hf_attnstore.lab.bench.shapes import BenchError

    found = []
    for value in values:
        for part in value.split(","):
            if not part.strip().isdecimal() or int(part) < 1:
                raise BenchError(f"--history takes positive whole numbers, not {part!r}.")
            found.append(int(part))
    return found


def parse_steps(only: str | None) -> list[str] | None:
    """Names for `measure` from a comma list; None for all.

    Raises:
        BenchError: there is no such method.
    """
    from hf_attnstore.lab.bench.methods import METHODS
    from hf_attnstore.lab.bench.shapes import BenchError

    if only is None:
        return None
    known = [*(method.key for method in METHODS), "first", "saving"]
    asked = [name.strip() for name in only.split(",") if name.strip() not in ("", "none")]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise BenchError(f"--only takes {', '.join(known)}, not {', '.join(unknown)}.")
    return ["recompute", "kept", *asked]


def _bench(
    console: Console,
    *,
    shape: str | None,
    name: str | None,
    histories: list[int],
    new: int,
    decode: int,
    repeats: int,
    recompute: int | None,
    output: Path | None,
    as_json: bool,
    seed: int,
    store: Path | None,
    block_size: int,
    device: str,
    dtype: str,
    threads: int,
    rss: bool,
    check: bool,
    steps: list[str] | None,
) -> bool:
    """Run it all and report; returns whether a bar was missed."""
    import torch

    from hf_attnstore.lab.bench.machine import describe_machine, in_words, versions
    from hf_attnstore.lab.bench.measure import Workload
    from hf_attnstore.lab.bench.report import FORMAT, as_record, print_result
    from hf_attnstore.lab.bench.shapes import BenchError, choose_model, load_model

    if threads:
        torch.set_num_threads(threads)
    spec = choose_model(
        shape, name, device=device, seed=seed, max_tokens=max(histories) + new + decode + 1, dtype=dtype
    )
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="attnstore-bench-", dir=store))
    try:
        machine = describe_machine(root)
        if machine["file_system"] in ("tmpfs", "ramfs"):
            console.print(
                "This folder is in memory, so figures for disk would be figures for memory: "
                "name a folder on a disk with --store.",
                style="yellow",
            )
        results = []
        with _progress(console) as progress:
            task = progress.add_task(f"loading {spec.label}", total=None)
            loaded = load_model(spec)
            for tokens in histories:
                folder = root / str(tokens)
                folder.mkdir()
                progress.reset(task, total=None)
                work = Workload(tokens, new, decode, repeats, seed, recompute)
                results.append(_measure_one(progress, task, loaded, spec, work, folder, block_size, rss, steps))
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)

    record: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": spec.label,
        "versions": versions(),
        "machine": machine,
        "block_size": block_size,
        "results": [as_record(result) for result in results],
    }
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        for result in results:
            print_result(console, result, bars=check)
        console.print(f"{spec.label} on {in_words(machine)}", highlight=False)
    if output is not None:
        _write(console, output, spec.label, record, results)
    failures = [result.failure for result in results if result.failure]
    if failures:
        raise BenchError("\n".join(failures))
    return any(verdict.passed is False for result in results for verdict in result.verdicts)


def _measure_one(
    progress: Progress,
    task: Any,
    model: Any,
    spec: ModelSpec,
    work: Any,
    folder: Path,
    block_size: int,
    with_rss: bool,
    steps: list[str] | None,
) -> Result:
    import torch

    from hf_attnstore.lab.bench.machine import ForeignLoad
    from hf_attnstore.lab.bench.measure import measure
    from hf_attnstore.lab.bench.report import Result
    from hf_attnstore.lab.bench.rss import MODES, Rss, RssJob, measure_rss
    from hf_attnstore.lab.bench.shapes import BenchError

    def show(doing: str, total: int) -> None:
        known = progress.tasks[0].total
        steps = total + (len(MODES) if with_rss else 0)
        progress.update(
            task,
            description=f"{work.history:,} tokens, {doing}",
            total=steps,
            advance=0 if known is None else 1,
        )

    others = ForeignLoad()
    measured = measure(model, work, folder, block_size=block_size, progress=show, steps=steps)
    measured.others = others.share()
    rss: dict[str, list[Rss]] = {}
    if with_rss:
        for mode in MODES:
            progress.update(task, description=f"{work.history:,} tokens, memory: {mode}", advance=1)
            reference = measured.samples["recompute" if mode == "recompute" else "kept"][0]
            job = RssJob(
                model=spec,
                mode=mode,
                history=work.history,
                new=work.new,
                decode=work.decode,
                seed=work.seed,
                block_size=block_size,
                kv_bytes=measured.kv_bytes,
                folder=str(folder),
                threads=torch.get_num_threads(),
                tokens=reference.tokens,
            )
            try:
                rss[mode] = [measure_rss(job)]
            except BenchError as error:  # what was measured before is still worth reporting
                return Result(measured, rss, failure=str(error))
    return Result(measured, rss)


def _write(console: Console, output: Path, label: str, record: dict[str, Any], results: list[Result]) -> None:
    """Write `bench-<label>.json`, `.png` and `.md` into a folder."""
    from hf_attnstore.lab.bench.report import as_markdown

    output.mkdir(parents=True, exist_ok=True)
    stem = "bench-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(label).name)
    (output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    picture = ""
    try:
        from hf_attnstore.lab.bench.plot import draw
    except ImportError:
        console.print("No picture: matplotlib is not installed (pip install 'hf-attnstore\\[bench]').", style="yellow")
    else:
        draw(label, results, output / f"{stem}.png")
        picture = f"\n![{label}]({stem}.png)\n"
    (output / f"{stem}.md").write_text(as_markdown(label, record["machine"], record["versions"], results) + picture)
    console.print(f"Report: {output / stem}.json, .md" + (", .png" if picture else ""), highlight=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
