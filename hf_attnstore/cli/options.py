"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
CheckpointEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="For models with running states (Mamba, Qwen3-Next …): keep them at every so many tokens too, beside "
        "where messages begin and end.",
        show_default=False,
    ),
]
