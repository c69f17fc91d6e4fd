"""`attnstore lab batches`: continuous batching with the store behind it, beside plain continuous batching."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hf_attnstore.lab.bench.one_line import errors_in_one_line


def batches(
    model: Annotated[
        str | None,
        typer.Option(help="Hub name or folder of a model, smollm2 or small; as `attnstore chat`.", show_default=False),
    ] = None,
    history: Annotated[int, typer.Option(min=256, help="Tokens that are copied: blocks of 256.")] = 2048,
    resumed: Annotated[int, typer.Option(min=32, help="Tokens of the conversation after a restart.")] = 1300,
    of_users: Annotated[int, typer.Option(min=32, help="Tokens with which each of eight users begins.")] = 600,
    turns: Annotated[int, typer.Option(min=2, help="Turns of each of them.")] = 3,
    requests: Annotated[int, typer.Option(min=8, help="Short requests whose answers are compared.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Of what is timed; medians are taken.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON and Markdown.")] = None,
) -> None:
    """Serve requests by continuous batching on a CPU in float32, with a store and without, and compare.

    Exits with 1 if an answer differs or a namespace gets what another computed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_attnstore.chat.model import model_source, model_title
    from hf_attnstore.lab.bench.batches_bench import Bench
    from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine, in_words, versions
    from hf_attnstore.lab.bench.wanted import COLUMNS, as_markdown, rows
    from hf_attnstore.lab.demo.script import CHAPTER

    console = Console()
    with errors_in_one_line(), tempfile.TemporaryDirectory(prefix="attnstore-batches-") as folder:
        source = model_source(model)
        others = ForeignLoad()
        with console.status("loading the model") as status:
            loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
            ids = AutoTokenizer.from_pretrained(source)(CHAPTER.read_text(encoding="utf-8")).input_ids
            bench = Bench(loaded, ids, Path(folder), status.update)
            figures = [
                *bench.copies(history // 256 * 256, 5 * repeats),
                bench.first_token(resumed, repeats),
                bench.namespaces(resumed // 2),
                *bench.users(of_users, turns),
                *bench.equal(requests, 40),
            ]
        share, machine = others.share(), describe_machine(Path(folder))
    table = Table(*COLUMNS, title=model_title(source))
    for row in rows(figures):
        table.add_row(*row)
    console.print(table)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        record = {"figures": [asdict(figure) for figure in figures], "machine": machine, "versions": versions()}
        stem = f"batches-{Path(model or source).name}"
        (output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        (output / f"{stem}.md").write_text(
            f"# attnstore lab batches\n\n{model_title(source)} in float32, on {in_words(machine)}; other processes "
            f"took {share:.0%} of its cores meanwhile. Times are those of the process's CPU.\n\n{as_markdown(figures)}"
        )
    if not all(figure.met for figure in figures if figure.bar == 0):
        raise typer.Exit(1)
