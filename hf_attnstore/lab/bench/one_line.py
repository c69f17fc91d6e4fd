"""Errors of the bench commands, as one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from hf_attnstore.errors import AttentionStoreError


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Shows this package's own errors as one line, and ends the command with exit code 2."""
    try:
        yield
    except AttentionStoreError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
