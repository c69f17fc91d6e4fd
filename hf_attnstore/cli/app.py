"""The `attnstore` command: demo, chat, models, the tools that look after a store, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import AttentionStoreError
from ..lab.bench.cli import app as bench_app
from ..lab.families.cli import models
from ..lab.sim.cli import app as sim_app
from ..ui.cli import CheckpointEvery, ui
from .store_commands import add_to


class _OneLineErrors(typer.core.TyperGroup):
    """Shows this package's own errors as one line and exit code 1: they say what to do, a traceback does not."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AttentionStoreError as error:
            Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="attnstore",
    help="Keep the attention state of conversations between turns and processes, for HuggingFace transformers.",
    cls=_OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    add_completion=False,
)

Model = Annotated[
    str | None,
    typer.Option(
        help="Hub name or folder of a chat model, or smollm2, by pip; without it, the small model of the repository.",
        show_default=False,
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(help="The store's directory; without it, attnstore in the Hugging Face home.", show_default=False),
]
Device = Annotated[
    str | None,
    typer.Option(help="Such as cuda or cpu; without it, CUDA where there is one.", show_default=False),
]
Memory = Annotated[
    str,
    typer.Option(help="Host memory for KV, such as 8GiB; auto follows what is free."),
]
Disk = Annotated[str, typer.Option(help="Disk space for KV, such as 100GiB.")]
OnDevice = Annotated[
    str,
    typer.Option(
        help="KV that stays on the device between turns, such as 4GiB, for the conversations used last; "
        "auto: some on a CPU, none on a GPU."
    ),
]
Dtype = Annotated[str, typer.Option(help="Such as bfloat16 or float32; auto is what the checkpoint has.")]


@app.command()
def demo(
    model: Model = None,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("attnstore-demo"),
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each turn, with the store and without.")] = 3,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """A scripted conversation, each turn in a new process, with the store and without.

    Exits with 1 if any answer differs.
    """
    from ..lab.demo import run_demo

    result = run_demo(model, output, repeats=repeats, device=device, dtype=dtype)
    if not result.same_tokens:
        raise typer.Exit(1)


@app.command()
def chat(
    session: Annotated[str, typer.Option(help="Name of the conversation; it goes on where it left off.")],
    model: Model = None,
    store: Store = None,
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
    memory: Memory = "2GiB",
    disk: Disk = "50GiB",
    on_device: OnDevice = "auto",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Chat in the terminal; /help shows the commands."""
    from transformers.utils.logging import disable_progress_bar

    from ..chat.model import load_chat_model
    from ..store import AttentionStore
    from .terminal import TerminalChat

    disable_progress_bar()  # a bar for the weights would stay between the prompt and the command
    console = Console(highlight=False)
    with console.status("loading the model"):
        loaded, tokenizer = load_chat_model(model, device=device, dtype=dtype)
    with AttentionStore(store, memory=memory, disk=disk, device=on_device) as opened:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
        options |= {"window": window, "canonicalize": canonicalize}
        options["checkpoint_every"] = checkpoint_every
        TerminalChat(loaded, tokenizer, opened, session, system, console, options).run()


@app.command()
def inspect(model: Model = None, device: Device = None, dtype: Dtype = "auto") -> None:
    """What the store makes of a model: its layers, its window, and how positions are in its keys."""
    from ..cache.inspection import describe
    from ..chat.model import load_chat_model

    console = Console(highlight=False, soft_wrap=True)
    with console.status("loading the model"):
        loaded, _ = load_chat_model(model, device=device, dtype=dtype)
    console.print(escape(describe(loaded)))


app.command()(models)
app.command()(ui)
add_to(app)
app.add_typer(bench_app, name="bench")
app.add_typer(sim_app, name="sim")

if __name__ == "__main__":
    app()
