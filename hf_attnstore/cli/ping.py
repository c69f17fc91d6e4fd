"""`attnstore ping`: whether the engine of a shared tier answers, what it is, how fast, and what is unsafe about it."""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import SharedTierError
from ..sizes import format_bytes
from ..store.shared.deadline import Deadline
from ..store.shared.engine import Engine, EngineError, Put, open_engine
from ..store.shared.url import VARIABLE, SharedURL

_SECONDS = 5.0
_BYTES = 8 << 20
_REPEATS = 5


def ping(
    url: Annotated[
        str, typer.Argument(help=f"Such as valkey://host:6379/0; without it, {VARIABLE}.", show_default=False)
    ] = "",
) -> None:
    """Ask the engine of a shared tier what it is, measure it, and say what is unsafe about it. What is written for that
    is removed. Exits with 1 if it does not answer.
    """
    where = SharedURL(url or os.environ.get(VARIABLE, ""))
    engine = open_engine(where)
    console = Console(highlight=False, soft_wrap=True)
    try:
        began = time.perf_counter()
        about = engine.about(Deadline(_SECONDS))
        connected = time.perf_counter() - began
        table = Table.grid(padding=(0, 2))
        facts = {"engine": about.what, "answers after": f"{connected * 1e3:.1f} ms", **about.facts}
        for name, value in {**facts, **_measured(engine, where.option("prefix", "attnstore"))}.items():
            table.add_row(f"[dim]{name}[/]", escape(value))
        console.print(table)
    except EngineError as error:
        raise SharedTierError(error.strerror) from error
    finally:
        engine.close()
    for text in about.unsafe:
        console.print(f"[yellow]unsafe:[/] {escape(text)}")


def _measured(engine: Engine, prefix: str) -> dict[str, str]:
    """What takes how long: medians."""
    data = os.urandom(_BYTES)
    target = bytearray(_BYTES)
    name = f"{prefix}:ping:{secrets.token_hex(8)}"
    many = [f"{name}:{number}" for number in range(1000)]

    def put() -> None:
        if engine.put(name, [memoryview(data)], Deadline(_SECONDS), 60) is Put.FULL:
            raise EngineError(f"there is no room for {format_bytes(_BYTES)}: nothing is kept there")

    def get() -> None:
        stream = engine.open_stream(Deadline(_SECONDS))
        stream.ask(name, 0, _BYTES, Deadline(_SECONDS))
        stream.take([memoryview(target)], Deadline(_SECONDS))
        stream.close(reuse=True)

    try:
        up, down = _median(put), _median(get)
        if target != data:
            raise EngineError("what it gives back is not what it was given: do not use it")
        one, all_ = (
            _median(lambda: engine.sizes(many[:1], Deadline(_SECONDS))),
            _median(lambda: engine.leading(many, Deadline(_SECONDS))),
        )
    finally:
        engine.delete([name], Deadline(_SECONDS))
    return {
        "up": f"{format_bytes(_BYTES / up)}/s",
        "down": f"{format_bytes(_BYTES / down)}/s",
        "one block looked up in": f"{one * 1e3:.2f} ms",
        "1,000 blocks in": f"{all_ * 1e3:.2f} ms",
    }


def _median(step: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
