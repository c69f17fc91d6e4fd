"""`attnstore demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...cli.options import Device, Dtype, Model
from .runner import run_demo


def demo(
    model: Model = None,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("attnstore-demo"),
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measurements of each turn, with the store and without; by default 1, in the small conversation 3.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small conversation with the small model.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """A scripted conversation, each turn in a new process, with the store and without.

    Exits with 1 if any answer differs.
    """
    result = run_demo(model, output, repeats=repeats, quick=quick, device=device, dtype=dtype)
    if not result.same_tokens:
        raise typer.Exit(1)
