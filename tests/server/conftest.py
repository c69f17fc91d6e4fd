"""A tiny chat model in a folder, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_attnstore import AttentionStoreError

try:
    from hf_attnstore.server import seams  # noqa: F401
except AttentionStoreError as error:  # says what is missing
    pytest.skip(str(error), allow_module_level=True)

from support.api_server import ApiServer, serving
from support.chat_fixtures import save_tiny_chat_model, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny", window=1024)


@pytest.fixture
def server(model_folder: Path, tmp_path: Path) -> Iterator[ApiServer]:
    with serving(model_folder, tmp_path / "store") as running:
        yield running


class Plain:
    """The same model without a store: what every answer is compared with."""

    def __init__(self) -> None:
        self.tokenizer: Any = tiny_tokenizer()
        self.model = tiny_model(self.tokenizer, window=1024)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return list(ids)

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="session")
def plain() -> Plain:
    return Plain()
