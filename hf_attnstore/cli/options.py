"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        help="Hub name or folder of a chat model, smollm2 or small; without it, smollm2 where `attnstore models fetch` "
        "brought it, else the small one of the repository.",
        show_default=False,
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        help="The store's directory; by default the setting store, else attnstore in the Hugging Face home.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where to compute, such as cuda or cpu; by default CUDA where there is one.", show_default=False),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Host memory for KV, such as 8GiB; auto follows what is free. [setting: memory]", show_default=False
    ),
]
Disk = Annotated[
    str | None, typer.Option(help="Disk space for KV, such as 100GiB. [setting: disk]", show_default=False)
]
Codec = Annotated[
    str | None,
    typer.Option(
        help="How KV is written: raw, lossless, or with loss fp16, int8, int8z, int4. What one wrote the others do not "
        "find. [setting: codec]",
        show_default=False,
    ),
]
WindowsEvery = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="For models with sliding layers (Gemma 3 …): let go of what these have outside their window, but for "
        "points to go back to at every so many tokens; 0: for the end only. [setting: windows_every]",
        show_default="keep all",
    ),
]
OnDevice = Annotated[
    str | None,
    typer.Option(
        help="KV that stays on the device between turns, such as 4GiB, for the conversations used last; "
        "auto: some on a CPU, none on a GPU. [setting: on_device]",
        show_default=False,
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
