"""`attnstore serve`."""

from __future__ import annotations

import json
import logging
import socket
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..cli.options import CheckpointEvery, Device, Disk, Dtype, Memory, Model, OnDevice, Store
from ..errors import AttentionStoreError
from ..listening import bound_socket, is_loopback


def serve(
    model: Model = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="The name that clients ask for; by default the model's, or its folder's.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any that is free.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="A file with a name and an API key in each line: each name has conversations of its own.",
            envvar="ATTNSTORE_KEYS",
            show_default=False,
        ),
    ] = None,
    ui: Annotated[
        bool, typer.Option("--ui", help="Serve the page of `attnstore ui` too, at /ui, on the same model and store.")
    ] = False,
    auth: Annotated[
        list[str] | None,
        typer.Option(
            help="USER:PASSWORD of somebody who may use the page, once for each.",
            envvar="ATTNSTORE_UI_AUTH",
            show_default=False,
        ),
    ] = None,
    store: Store = None,
    memory: Memory = None,
    disk: Disk = None,
    on_device: OnDevice = None,
    checkpoint_every: CheckpointEvery = None,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Answer several requests at a time.")
    ] = False,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=512,
            help="With continuous batching: tokens that its paged cache has room for.",
            show_default="16384 on a CPU; else what the device has room for",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With continuous batching: tokens that are fed at once at most.",
            show_default="1024 on a CPU; else 8192",
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait beside the one that is answered; others get 429.")
    ] = 100,
    deadline: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds that an answer may take, waiting included.", show_default=False),
    ] = None,
    grace: Annotated[
        int, typer.Option(min=0, help="Seconds that answers have to come to their end after SIGTERM.")
    ] = 30,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(help="JSON for every chat template, unless a request has its own.", show_default=False),
    ] = None,
    traces: Annotated[
        bool, typer.Option("--traces", help="Make a span of OpenTelemetry of each turn, for the process's tracer.")
    ] = False,
    warm: Annotated[
        bool,
        typer.Option("--warm-up/--no-warm-up", help="Answer a short request before listening, so that nobody waits."),
    ] = True,
    attn_implementation: Annotated[
        str | None, typer.Option(help="Such as sdpa or flash_attention_2.", show_default=False)
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve a model by OpenAI's API: conversations are reused between requests, and after a restart."""
    console = Console(highlight=False, soft_wrap=True)
    template = _template_kwargs(chat_template_kwargs)
    import_module(f"{__package__}.seams")  # says what is missing
    from ..ui.cli import account
    from .callers import Keys

    known = Keys.read(keys) if keys is not None else None
    accounts = [account(entry) for entry in auth or ()]
    if ui and continuous_batching:
        raise AttentionStoreError(
            "--ui answers one after the other, and --continuous-batching side by side: choose one"
        )
    if ui and known is not None and not accounts:
        raise AttentionStoreError("with --keys the page needs accounts of its own: --auth USER:PASSWORD")
    if known is None and not is_loopback(host):
        console.print(
            f"[yellow]warning:[/] everybody who reaches {escape(host)} can use this model and its sessions; "
            "--keys FILE asks for keys"
        )
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # a warning of theirs for each request
    listening = bound_socket(host, port)
    from ..chat.model import default_device, first_line, model_source
    from ..store import AttentionStore
    from ..store.memory.freed import keep_freed_memory
    from .app import application
    from .generating import LoadedModel
    from .page import PATH, add_page
    from .running import run
    from .service import Service
    from .warming import warm_up

    keep_freed_memory()
    try:
        source = model_source(model)
        loaded = LoadedModel(
            source,
            name or (model if model and not Path(model).is_dir() else Path(source).name),
            device=device or default_device(),
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
    except (OSError, ValueError) as error:
        raise AttentionStoreError(f"the model can't be loaded: {first_line(error)}") from error
    if warm:
        warm_up(loaded, chat_template_kwargs=template)
    opened = AttentionStore(store, memory=memory, disk=disk, on_device=on_device)
    batched = None
    if continuous_batching:
        on_cpu = loaded.model.device.type == "cpu"  # of host memory transformers would take a large part
        batched = {
            "cache_tokens": cache_tokens or (16384 if on_cpu else None),
            "batch_tokens": batch_tokens or (1024 if on_cpu else None),
        }
    service = Service(
        loaded,
        opened,
        max_waiting=max_waiting,
        deadline=deadline,
        checkpoint_every=checkpoint_every,
        batched=batched,
        traced=traces,
    )
    said = f"serving [bold]{escape(service.name)}[/] at {_url(listening)}"
    app = application(service, known, template)
    if ui:
        add_page(app, service, accounts)
        said += f", the page at [bold]{_url(listening, PATH)}[/]"
    run(app, listening, grace, lambda: console.print(said))


def _template_kwargs(given: str | None) -> dict[str, Any]:
    try:
        found = json.loads(given or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise AttentionStoreError("--chat-template-kwargs is a JSON object")
    return found


def _url(listening: socket.socket, path: str = "/v1") -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"
