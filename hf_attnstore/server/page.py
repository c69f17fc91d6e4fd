"""The page in a browser beside the API: the same model, store and queue of turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import AttentionStoreError
from .service import Service

PATH = "/ui"


def add_page(app: Any, service: Service, accounts: Sequence[tuple[str, str]] = ()) -> None:
    """Mounts the page at `/ui`. API keys do not count there: browsers are told apart as by `attnstore ui`.

    Args:
        accounts: names and passwords; without any, whoever reaches the page may use it.

    Raises:
        AttentionStoreError: the extra `ui` is not installed.
    """
    try:
        from ..ui.model import ModelLoader
        from ..ui.serve import mount
        from ..ui.turns import Turns
    except ImportError as error:
        raise AttentionStoreError(
            f'the page needs what is not installed ({error.name}): pip install "hf-attnstore[ui]"'
        ) from error
    loaded = service.loaded
    tokenizer: Any = getattr(loaded.processor, "tokenizer", loaded.processor)
    turns = Turns(service.store, ModelLoader(lambda: (loaded.model, tokenizer)), queue=service.queue)
    service.before_closing = turns.close
    mount(app, turns, path=PATH, model_name=service.name, accounts=accounts)
