"""The `attnstore` command: chat, inspect, what looks after a store, and by their names the commands of ui and lab."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .._version import __version__
from .group import Commands
from .lazy import add_lazily
from .options import CheckpointEvery, Codec, Device, Disk, Dtype, Memory, Model, OnDevice, Store, WindowsEvery
from .store_commands import add_to

app = typer.Typer(
    name="attnstore",
    help="Keep the attention state of conversations between turns and processes, for HuggingFace transformers.",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LAB = "hf_attnstore.lab"
"""What measures the product: only its names are known here, and it is imported when one of its commands is invoked."""

_MODELS = "Build a tiny model of every family of transformers, and see what the store does for it."
_SIM = "Simulate the store's tiers and policies: the paper's workload, traces, and the report on both."
_LAB = "Studies of the store: families of models, truncation, policies, load or recompute."
CHAT, STORE, MEASURE = "Talk", "Look after a store", "Try and measure"
"""What commands are for, as the help lists them."""


@app.callback()
def attnstore(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            help="Say which version this is.",
            is_eager=True,
            callback=lambda wanted: _version(wanted),
        ),
    ] = False,
) -> None:
    """Keep the attention state of conversations between turns and processes, for HuggingFace transformers."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnstore {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=CHAT, epilog="[dim]attnstore chat --session alice --model smollm2[/]")
def chat(
    session: Annotated[str, typer.Option(help="Name of the conversation; it goes on where it left off.")],
    model: Model = None,
    store: Store = None,
    url: Annotated[
        str | None,
        typer.Option(help="Talk to a server such as `attnstore serve`; it has model and store.", show_default=False),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="API key for --url.", envvar="OPENAI_API_KEY", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 200,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens the model sees at once; by default all it can.", show_default=False),
    ] = None,
    canonicalize: Annotated[
        bool,
        typer.Option(
            "--canonicalize", help="For models that reason: compute while you type what the next prompt begins with."
        ),
    ] = False,
    checkpoint_every: CheckpointEvery = None,
    sample: Annotated[bool, typer.Option(help="Sample answers instead of taking the likeliest token.")] = False,
    memory: Memory = None,
    disk: Disk = None,
    on_device: OnDevice = None,
    codec: Codec = None,
    windows_every: WindowsEvery = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Chat in the terminal; /help shows the commands."""
    if url is not None:
        from .remote import RemoteChat

        settings: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 1 if sample else 0}
        RemoteChat(url, key, session, system, Console(highlight=False), settings).run()
        return
    from transformers.utils.logging import disable_progress_bar

    from ..chat.model import load_chat_model
    from ..store import AttentionStore
    from ..store.memory.freed import keep_freed_memory
    from .terminal import TerminalChat

    keep_freed_memory()
    AttentionStore.check_name(session)  # said now, not when the model is there
    disable_progress_bar()  # a bar for the weights would stay between the prompt and the command
    console = Console(highlight=False)
    with console.status("loading the model"):
        loaded, tokenizer = load_chat_model(model, device=device, dtype=dtype)
    with AttentionStore(
        store, memory=memory, disk=disk, on_device=on_device, codec=codec, windows_every=windows_every
    ) as opened:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
        options |= {"window": window, "canonicalize": canonicalize}
        options["checkpoint_every"] = checkpoint_every
        TerminalChat(loaded, tokenizer, opened, session, system, console, options).run()


@app.command(rich_help_panel=MEASURE, epilog="[dim]attnstore inspect --model Qwen/Qwen3-0.6B[/]")
def inspect(
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="Of the conversations to say the size of.")] = 4096,
) -> None:
    """What the store makes of a model: its layers, its window, how positions are in its keys, and what its KV takes."""
    from ..cache.inspection import describe
    from ..cache.sizing import sizing
    from ..chat.model import load_chat_model

    console = Console(highlight=False, soft_wrap=True)
    with console.status("loading the model"):
        loaded, _ = load_chat_model(model, device=device, dtype=dtype)
    console.print(escape(describe(loaded)))
    with console.status("trying what it takes to compute and to load"):
        sizes = sizing(loaded, tokens)
    console.print(escape(sizes))


add_lazily(
    app,
    "ui",
    "hf_attnstore.ui.cli:ui",
    "Chat in the browser: conversations that go on where they were left, and what that saved.",
    panel=CHAT,
)
add_lazily(
    app,
    "serve",
    "hf_attnstore.server.cli:serve",
    "Serve a model by OpenAI's API: conversations are reused between requests, and after a restart.",
    panel=CHAT,
)
add_to(app, STORE)
add_lazily(
    app,
    "ping",
    "hf_attnstore.cli.ping:ping",
    "Ask the engine of a shared tier what it is, measure it, and say what is unsafe about it.",
    panel=STORE,
)
add_lazily(
    app,
    "demo",
    f"{LAB}.demo.cli:demo",
    "A scripted conversation, each turn in a new process, with the store and without.",
    panel=MEASURE,
)
add_lazily(
    app,
    "doctor",
    f"{LAB}.bench.codec_cli:doctor",
    "Measure what a lossy codec changes of a model's next tokens, on texts of your own.",
    panel=MEASURE,
)
add_lazily(app, "bench", f"{LAB}.bench.cli:app", "Measure what the store gives a model on this machine.", panel=MEASURE)
add_lazily(app, "models", f"{LAB}.families.cli:app", _MODELS, panel=MEASURE)
add_lazily(app, "lab", f"{LAB}.cli:app", _LAB, panel=MEASURE)
add_lazily(app, "sim", f"{LAB}.sim.cli:app", _SIM, hidden=True)
