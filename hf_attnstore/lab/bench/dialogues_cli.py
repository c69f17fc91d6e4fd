"""`attnstore lab dialogues`, and `retokenise`: conversations with real models."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
    turns: Annotated[
        int | None, typer.Option(min=1, help="The first turns only of each. [default: all]", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 24,
    plain: Annotated[bool, typer.Option(help="Compare with plain generate too.")] = True,
    one_store: Annotated[
        bool,
        typer.Option(
            "--one-store",
            help="In 16 bits, too, let all dialogues share a store; the kept cache then prefills the same parts.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file for every answer, written after each dialogue; one that is there is gone on with."
        ),
    ] = None,
) -> None:
    """Compare whole conversations, token by token: with a store that is opened anew for each turn, and without.

    Exits with 1 if an answer is not a kept cache's, or in float32 not plain generate's.
    """
    from hf_attnstore.chat.model import load_chat_model
    from hf_attnstore.lab.bench.dialogues import DIALOGUES, Study, read_dialogues, read_study, study
    from hf_attnstore.lab.bench.shapes import is_exact

    console = Console(highlight=False, soft_wrap=True)
    with errors_in_one_line(), tempfile.TemporaryDirectory(prefix="attnstore-dialogues-") as folder:
        said = [messages[:turns] for messages in (read_dialogues(data) if data else DIALOGUES)[::every][:count]]
        done = read_study(output) if output is not None and output.exists() else None
        loaded, tokenizer = load_chat_model(model, dtype=dtype)
        with console.status("") as status:

            def tell(so_far: Study) -> None:
                status.update(f"{so_far.dialogues} of {len(said)} dialogues")
                if output is not None:
                    so_far.write(output)

            result = study(
                loaded, tokenizer, said, Path(folder),
                max_new_tokens=max_new_tokens, plain=plain, one_store=one_store, tell=tell, done=done,
            )  # fmt: skip
        summary = result.summary()
    for name, value in summary.items():
        console.print(f"{name.replace('_', ' '):22} {value}")
    if summary["not_as_kept"] or (is_exact(loaded) and summary["not_as_plain"]):
        raise typer.Exit(1)


def retokenise(
    data: Annotated[
        Path | None, typer.Option(help="Dialogues, as for `lab dialogues`, of which the first messages are answered.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many answers.")] = 96,
    every: Annotated[int, typer.Option(min=1, help="Only one dialogue of so many.")] = 1,
    model: Annotated[str, typer.Option(help="Hub name, folder, smollm2 or gemma3.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="Such as float32 or bfloat16.")] = "float32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 96,
    batch: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="The likeliest tokens that are sampled from; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write, with every answer.")] = None,
) -> None:
    """Sample answers, and count how many become other tokens when their text comes back, and what that costs."""
    from hf_attnstore.chat.model import load_chat_model
    from hf_attnstore.lab.bench.dialogues import DIALOGUES, read_dialogues
    from hf_attnstore.lab.bench.retokenised import study, summary

    console = Console(highlight=False, soft_wrap=True)
    with errors_in_one_line(), console.status("") as status:
        said = [messages[0] for messages in (read_dialogues(data) if data else DIALOGUES)[::every][:count]]
        loaded, tokenizer = load_chat_model(model, dtype=dtype)
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "batch": batch,
            "temperature": temperature,
            "top_k": top_k,
        }
        found = list(
            study(
                loaded, tokenizer, said, seed=seed, **settings,
                tell=lambda done: status.update(f"{done} of {len(said)} answers"),
            )
        )  # fmt: skip
    numbers = summary(found)
    for name, value in numbers.items():
        console.print(f"{name.replace('_', ' '):28} {value:,}")
    if output is not None:
        record = {"model": model, "dtype": dtype, "seed": seed, **settings, **numbers}
        output.write_text(json.dumps({**record, "each": [asdict(answer) for answer in found]}, indent=1) + "\n")
