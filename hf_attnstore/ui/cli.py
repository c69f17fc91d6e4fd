"""`attnstore ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..cli.lazy import named
from ..cli.options import CheckpointEvery, Codec, Disk, Memory, Model, Store, WindowsEvery
from ..errors import AttentionStoreError

TOUR = "hf_attnstore.lab.tour:look"
"""What takes pictures of the page and measures it: imported when it is asked for, and only by its name."""


def ui(
    model: Model = None,
    store: Store = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine can ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any that is free.")] = 7860,
    auth: Annotated[
        list[str] | None,
        typer.Option(
            help="USER:PASSWORD of somebody who may use it, once for each. An account has the same conversations in "
            "every browser.",
            envvar="ATTNSTORE_UI_AUTH",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of new turns.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 200,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens the model sees at once; by default all it can.", show_default=False),
    ] = None,
    checkpoint_every: CheckpointEvery = None,
    memory: Memory = None,
    disk: Disk = None,
    codec: Codec = None,
    windows_every: WindowsEvery = None,
    sample: Annotated[bool, typer.Option(help="Sample answers instead of taking the likeliest token.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="Such as bfloat16 or float32; auto is what the checkpoint has.")] = "auto",
    screenshots: Annotated[
        Path | None,
        typer.Option(help="Only take pictures of the page, into this folder; needs playwright.", show_default=False),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Only measure how fast the page is; needs playwright.")
    ] = False,
) -> None:
    """Chat in the browser: conversations that go on where they were left, and what that saved."""
    from ..chat.model import load_chat_model, model_source, model_title
    from ..store import AttentionStore
    from ..store.memory.freed import keep_freed_memory

    keep_freed_memory()
    serving = _serving()
    console = Console(highlight=False, soft_wrap=True)

    source = model_source(model)  # where it is not here, said now, not when somebody waits for an answer

    def load() -> Any:
        return load_chat_model(source, device=device, dtype=dtype)

    if screenshots is not None or measure:
        named(TOUR)(console, load, screenshots, measured=measure)
        return
    accounts = [account(entry) for entry in auth or ()]
    if not serving.is_loopback(host) and not accounts:
        console.print(
            f"[yellow]warning:[/] everybody who reaches {escape(host)} can use this model; "
            "--auth USER:PASSWORD asks for a password"
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample, "window": window}
    serving.serve(
        load,
        AttentionStore(store, memory=memory, disk=disk, codec=codec, windows_every=windows_every),
        model_name=model_title(source),
        host=host,
        port=port,
        accounts=accounts,
        ready=lambda address: console.print(f"open [bold]{address}[/] (Ctrl-C ends it)"),
        system=system,
        checkpoint_every=checkpoint_every,
        **options,
    )


def _serving() -> Any:
    try:
        from . import serve
    except ImportError as error:
        raise AttentionStoreError(
            f'the page needs what is not installed ({error.name}): pip install "hf-attnstore[ui]"'
        ) from error
    return serve


def account(entry: str) -> tuple[str, str]:
    """A name and a password, as `--auth` has them."""
    name, colon, password = entry.partition(":")
    if not name or not colon or not password:
        raise AttentionStoreError("--auth is USER:PASSWORD, both of at least one character")
    return name, password
