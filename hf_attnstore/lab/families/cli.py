"""`attnstore models`: what the package does for every model family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ...cli.fetch import fetch
from ...errors import AttentionStoreError

app = typer.Typer()
app.command()(fetch)


@app.command()
def kinds(
    output: Annotated[Path | None, typer.Option(help="A page to write, such as docs/results/kinds.md.")] = None,
) -> None:
    """What is kept of every model folder of transformers, by token, by checkpoint, whole or not, and why."""
    from .kinds import grouped, markdown
    from .kinds import kinds as every_kind

    found = every_kind()
    if output is not None:
        output.write_text(markdown(found))
        Console(highlight=False).print(f"wrote {escape(str(output))}")
    else:
        Console(highlight=False, soft_wrap=True).print(escape(grouped(found)))


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    family: Annotated[
        list[str] | None,
        typer.Option(help="Only this one; may be given again. By default all of them.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A page to write, such as docs/models.md; JSON goes beside it.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 2,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that a family may take.")] = 120.0,
    variants: Annotated[
        bool, typer.Option("--variants", help="Other classes of each family too, and twins that see what comes later.")
    ] = False,
    verified: Annotated[
        Path | None,
        typer.Option(help="Write verified.json: the families that need not be asked whether they continue."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if any family is not as it should be.")] = False,
) -> None:
    """Build a tiny model of every family of transformers, and see what the store does for it.

    Needs no network and no checkpoints: the weights are random.
    """
    if context.invoked_subcommand is not None:
        return
    from .encoder_decoders import listed
    from .others import others
    from .report import COLUMNS, cells, summary, variants_in_words, write, write_verified
    from .sweep import Row, examine_family, examine_with_variants, sweep
    from .tiny import families

    known = [*families(), *listed(), *others()]
    unknown = [name for name in family or () if name not in known]
    if unknown:
        raise AttentionStoreError(f"there is no family called {', '.join(unknown)}")
    names = sorted(set(family)) if family else known
    told = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=told, transient=True, disable=not told.is_terminal) as progress:
        task = progress.add_task("models", total=len(names))

        def tell(row: Row) -> None:
            progress.update(task, advance=1, description=row.family)

        rows = sweep(names, workers, limit, tell, examine_with_variants if variants else examine_family)
    console = Console(highlight=False)
    if verified is not None:
        console.print(f"wrote {escape(str(write_verified(rows, verified)))}")
    if output is not None:
        data = write(rows, output)
        console.print(f"wrote {escape(str(output))} and {escape(data.name)}")
    else:
        shown = Table(*COLUMNS[:-1], box=None)
        shown.add_column(COLUMNS[-1], min_width=40, overflow="fold")
        for row in rows:
            shown.add_row(*map(escape, cells(row)), style=None if row.well else "yellow")
        console.print(shown)
    console.print(summary(rows))
    for row in rows:
        for line in variants_in_words(row):
            console.print(escape(line), style="yellow")
    if check and not all(row.well for row in rows):
        raise typer.Exit(1)
