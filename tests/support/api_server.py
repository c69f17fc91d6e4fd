"""An `attnstore serve` in this process, on the loopback, and what its tests ask of it."""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from hf_attnstore import AttentionStore
from hf_attnstore.server import answer
from hf_attnstore.server.app import application
from hf_attnstore.server.callers import Keys
from hf_attnstore.server.generating import LoadedModel
from hf_attnstore.server.page import add_page
from hf_attnstore.server.service import Service

from .turn_queue_fixtures import PATIENCE, until

NAME = "tiny"


class Fed:
    """Counts the tokens that a model is given."""

    def __init__(self, model: torch.nn.Module) -> None:
        counts: list[int] = []
        self._counts = counts
        # a hook of which it can be seen that it only looks
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )

    def take(self) -> int:
        """Tokens since this was asked last."""
        tokens = sum(self._counts)
        self._counts.clear()
        return tokens


class Paused:
    """Holds answers up before they are told of their token number `at`, counted from 1, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        put = answer._Both.put

        def pausing(both: Any, value: torch.Tensor) -> None:
            if both._count == at:  # the prompt comes first
                self.reached.set()
                assert self.go_on.wait(PATIENCE)
            put(both, value)

        monkeypatch.setattr(answer._Both, "put", pausing)


def held_up(batched: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Holds the next answer up before its third token: an event when it is there, and one that lets it go."""
    if not batched:
        paused = Paused(monkeypatch, at=3)
        return paused.reached, paused.go_on
    from hf_attnstore.server import batching

    reached, go_on = threading.Event(), threading.Event()
    choose, count = batching._Choosing.__call__, itertools.count()

    def holding(choosing: Any, *args: Any) -> Any:
        if next(count) == 2:
            reached.set()
            assert go_on.wait(PATIENCE)
        return choose(choosing, *args)

    monkeypatch.setattr(batching._Choosing, "__call__", holding)
    return reached, go_on


class ApiServer:
    """A server that runs in a thread of this process."""

    def __init__(self, service: Service, keys: Keys | None, page: bool = False) -> None:
        self.service = service
        self.fed = Fed(service.loaded.model)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.base}/v1"
        app = application(service, keys)
        if page:
            add_page(app, service)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([listening])))
        self._thread.start()
        self._client = httpx.Client(verify=False, timeout=PATIENCE)

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        if key is not None:
            options["headers"] = {"authorization": f"Bearer {key}", **options.get("headers", {})}
        return self._client.request(method, f"{self.base}{path}", **options)

    @property
    def started(self) -> bool:
        return self._server.started

    def stop(self) -> None:
        self._client.close()
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@contextmanager
def serving(
    model: Path,
    folder: Path,
    keys: str | None = None,
    *,
    page: bool = False,
    memory: int | None = None,
    disk: int | None = None,
    **options: Any,
) -> Iterator[ApiServer]:
    """A server of the model in a folder, until the end of the block."""
    loaded = LoadedModel(str(model), NAME, device="cpu", dtype="float32")
    service = Service(loaded, AttentionStore(folder, block_size=16, memory=memory, disk=disk), **options)
    server = ApiServer(service, Keys(keys) if keys is not None else None, page)
    until(lambda: server.started)
    try:
        yield server
    finally:
        server.stop()
        assert service.store.closed


def noted(header: str) -> dict[str, str]:
    """What the server's header says."""
    return {name: value.strip('"') for name, value in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^,]*)', header)}


def agreed(known: Sequence[Sequence[int]], ids: Sequence[int]) -> int:
    """How many leading tokens of a prompt can be reused where the KV of some texts is known."""
    best = 0
    for text in known:
        count = next((n for n, (a, b) in enumerate(zip(text, ids, strict=False)) if a != b), min(len(text), len(ids)))
        best = max(best, count)
    return min(best, len(ids) - 1)
