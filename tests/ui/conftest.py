"""The page's parts over the tiny chat model, and, where there is one, a browser."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import APPEND_ONLY, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_attnstore import AttentionStore

pytest.importorskip("gradio", reason="the page needs the extra ui")

from hf_attnstore.ui.model import ModelLoader
from hf_attnstore.ui.sessions import UserSessions
from hf_attnstore.ui.turns import Running, Turns, Wish

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


class Gate(torch.nn.Module):
    """In place of a model's head: holds decoding back, or fails, when a test says so."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head
        self.open = threading.Event()
        self.open.set()
        self.free_forwards = 0
        self.reached = threading.Event()
        self.failure: Exception | None = None

    def hold_after(self, forwards: int) -> None:
        """So many forwards go through, the next waits; `reached` is set when it does."""
        self.free_forwards = forwards
        self.reached.clear()
        self.open.clear()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        if not self.open.is_set():
            if self.free_forwards:
                self.free_forwards -= 1
            else:
                self.reached.set()
                assert self.open.wait(60)
        return self.head(hidden)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(APPEND_ONLY)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_model(tokenizer)


@pytest.fixture
def plain(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The same weights in a model that no store ever touches."""
    return tiny_model(tokenizer)


@pytest.fixture
def gate(model: LlamaForCausalLM) -> Gate:
    model.lm_head = Gate(model.lm_head)
    return model.lm_head


@pytest.fixture
def turns(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, store: AttentionStore) -> Iterator[Turns]:
    opened = Turns(store, ModelLoader(lambda: (model, tokenizer)), **GREEDY)
    yield opened
    opened.close()


@pytest.fixture
def ann(store: AttentionStore) -> UserSessions:
    return UserSessions(store.in_namespace("ann"))


@pytest.fixture
def bob(store: AttentionStore) -> UserSessions:
    return UserSessions(store.in_namespace("bob"))


@pytest.fixture
def ask(turns: Turns) -> Callable[..., Running]:
    """Has a turn run to its end."""

    def run(sessions: UserSessions, name: str, *args: Any, **kwargs: Any) -> Running:
        running = turns.begin(sessions, name, Wish(*args, **kwargs))
        running.turn.result(60)
        return running

    return run


@pytest.fixture
def small_store(tmp_path: Path) -> Path:
    return tmp_path / "store"
