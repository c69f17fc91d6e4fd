"""`attnstore lab dialogues`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_attnstore.lab.bench.one_line import errors_in_one_line


def dialogues(
    data: Annotated[
        Path | None,
        typer.Option(
            help='Dialogues, as JSON lines {"history": [{"user": …}, …]}, gzipped or not; by default five short ones.',
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of them.")] = 100,
    every: Annotated[int, typer.Option(min=1, help="Only one of so many.")] = 1,
    model: Annotated[str, typer.Option(help="Hub name, folder, or smollm2.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="Such as float32 or bfloat16.")] = "float32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 24,
    plain: Annotated[bool, typer.Option(help="Compare with plain generate too.")] = True,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write, with every answer.")] = None,
) -> None:
    """Compare whole conversations, token by token: with a store that is opened anew for each turn, and without.

    Exits with 1 if an answer is not a kept cache's, or in float32 not plain generate's.
    """
    from hf_attnstore.chat.model import load_chat_model
    from hf_attnstore.lab.bench.dialogues import DIALOGUES, Study, read_dialogues, study
    from hf_attnstore.lab.bench.shapes import is_exact

    console = Console(highlight=False, soft_wrap=True)
    with errors_in_one_line(), tempfile.TemporaryDirectory(prefix="attnstore-dialogues-") as folder:
        said = (read_dialogues(data) if data else list(DIALOGUES))[::every][:count]
        loaded, tokenizer = load_chat_model(model, dtype=dtype)
        with console.status("") as status:

            def tell(so_far: Study) -> None:
                status.update(f"{so_far.dialogues} of {len(said)} dialogues")

            result = study(loaded, tokenizer, said, Path(folder), max_new_tokens=max_new_tokens, plain=plain, tell=tell)
        summary = result.summary()
    if output is not None:
        output.write_text(
            json.dumps({**summary, "each": [asdict(answer) for answer in result.answers]}, indent=1) + "\n"
        )
    for name, value in summary.items():
        console.print(f"{name.replace('_', ' '):22} {value}")
    if summary["not_as_kept"] or (is_exact(loaded) and summary["not_as_plain"]):
        raise typer.Exit(1)
