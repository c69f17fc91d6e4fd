"""What commands are, and the group of them all: errors as one line in the command line's words, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from ..errors import AttentionStoreError

DEBUG = "ATTNSTORE_DEBUG"
"""The environment variable by which errors that nobody expected come with where they happened."""
_WORDS = {
    "`sessions()` lists those there are": "`attnstore ls` lists those there are",
    "wait for it (`wait=` seconds), ": "wait for it, ",
    "pass encryption_key=, or set": "set",
    "a larger cap (`disk=`)": "a larger cap (--disk, or the setting disk)",
    "give it more with memory=": "give it more with --memory",
    "take turns back with undo()": "take turns back with /undo",
}
"""What the library says of its own functions and arguments, and what that is called here."""


class _Plain:
    """Begins sooner: typer loads pydantic (0.1 s) to convert values, and here those that need not be converted, or are
    not given at all, do without."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in found:
            if param.nargs == 1 and not param.multiple:
                vars(param).setdefault("process_value", partial(_value, param, param.process_value))
        return found


def _value(param: Any, convert: Any, ctx: Any, value: Any) -> Any:
    """A parameter's value as its command takes it; `convert` is typer's way."""
    kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    if kind is Path and isinstance(value, str):
        value = Path(value)
    elif type(value) is not kind and (value is not None or param.required):
        return convert(ctx, value)
    return value if param.callback is None else param.callback(ctx, param, value)


class Command(_Plain, TyperCommand):
    """A command whose errors and values are as `Commands` has them."""


class Commands(_Plain, TyperGroup):
    """Ends with 0 if all went well, 1 after an error, 2 after a mistake in the command line, 130 after Ctrl-C."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        run = partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except AttentionStoreError as error:
            _fail(_in_words(str(error)))
        except (typer.Abort, KeyboardInterrupt):
            _fail("interrupted", 130)
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            if hasattr(error, "format_message"):
                _mistake(error)
            first = next(iter(str(error).strip().splitlines()), "")
            _fail(f"{type(error).__name__}: {first} ({DEBUG}=1 shows where)")
        if code == 130:
            _fail("interrupted", 130)
        sys.exit(code if isinstance(code, int) else 0)


def _in_words(message: str) -> str:
    for library, here in _WORDS.items():
        message = message.replace(library, here)
    return " ".join(message.split())


def _mistake(error: Any) -> NoReturn:
    """What was typed makes no sense; without anything, it is asked what there is."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    where = f" ({context.command_path} --help shows what there is)" if context is not None else ""
    _fail(f"{_in_words(error.format_message()).rstrip('.')}{where}", error.exit_code)


def _fail(message: str, code: int = 1) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(message)}", highlight=False)
    sys.exit(code)
