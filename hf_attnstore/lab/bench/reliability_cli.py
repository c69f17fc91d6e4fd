"""`attnstore bench index` and `attnstore bench store`: what the store itself costs, without any model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

Output = Annotated[Path | None, typer.Option(help="Folder for the report.")]
Where = Annotated[Path | None, typer.Option(help="Folder for what is measured; by default a temporary one.")]


def index(
    sizes: Annotated[str, typer.Option(help="Numbers of blocks, with commas.")] = "10000,100000,1000000",
    output: Output = None,
    folder: Where = None,
    check: Annotated[bool, typer.Option(help="Exit with 1 if the largest misses a bar.")] = False,
) -> None:
    """Fill synthetic stores, of ten blocks a session, and measure their index: opening, look-ups, commits, lists."""
    from .index_bench import run
    from .machine import ForeignLoad, describe_machine
    from .reliability_report import index_rows, missed_bars, write_index_report

    counts = [int(size) for size in sizes.split(",")]
    console = Console()
    load = ForeignLoad()
    with tempfile.TemporaryDirectory(dir=folder) as where:
        found = [
            run(count, max(count // 10, 2), Path(where))
            for count in track(counts, "measuring", console=Console(stderr=True), transient=True)
        ]
        facts, foreign = describe_machine(Path(where)), load.share()
    rows = index_rows(found)
    _print(console, rows)
    missed = missed_bars(found[-1])
    console.print(f"bars missed: {', '.join(missed)}" if missed else "[green]every bar is met[/]")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_index_report(output, found, facts, foreign, missed)
        console.print(f"wrote {output / 'index.md'}, index.json, index.png")
    if check and missed:
        raise typer.Exit(1)


def store(
    layers: Annotated[int, typer.Option(min=1, help="Layers of a block; each is 1 MiB.")] = 8,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks that are written.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each setting is measured.")] = 7,
    output: Output = None,
    folder: Where = None,
) -> None:
    """Measure what durability and encryption cost: writing, committing and loading, against the store as it comes."""
    from .machine import ForeignLoad, describe_machine
    from .reliability_report import store_rows, write_store_report
    from .store_bench import run

    console = Console()
    load = ForeignLoad()
    with tempfile.TemporaryDirectory(dir=folder) as where:
        with Console(stderr=True).status("measuring"):
            found = run(Path(where), layers, blocks, repeats)
        facts, foreign = describe_machine(Path(where)), load.share()
    rows = store_rows(found)
    _print(console, rows)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_store_report(
            output, found, facts, foreign, f"Blocks of {layers} MiB, {blocks} of them; medians of {repeats} repeats"
        )
        console.print(f"wrote {output / 'store.md'}, store.json")


def _print(console: Console, rows: list[list[str]]) -> None:
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
