"""Answers before anybody asks: what a process pays once is paid while it starts, not by its first caller."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from typing import Any

import httpx

from ..store import AttentionStore
from .app import HEADER, application
from .generating import LoadedModel
from .service import Service

logger = logging.getLogger("hf_attnstore")

_MEMORY = 64 << 20
_MESSAGES = [{"role": "user", "content": "Say yes."}]


def warm_up(loaded: LoadedModel, **options: Any) -> None:
    """Has a server of the same model answer twice, from a store that is thrown away: once computing all, and once from
    disk. Kernels, the chat template, and the types of requests and answers are made then. A model that refuses says so
    to whoever asks it.

    Args:
        options: of `application`.
    """
    with tempfile.TemporaryDirectory(prefix="attnstore-warm-up-") as folder:
        for _ in range(2):
            service = Service(loaded, AttentionStore(folder, memory=_MEMORY, disk=_MEMORY, shared=""), counted=False)
            asyncio.run(_ask(application(service, **options)))


async def _ask(app: Any) -> None:
    body = {"messages": _MESSAGES, "max_tokens": 2, "temperature": 0, "stream": True}
    inside = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=inside, base_url="http://inside") as asking,
    ):
        answer = await asking.post("/v1/chat/completions", json=body, timeout=None)
        logger.debug("warming up: %s %s", answer.status_code, answer.headers.get(HEADER, answer.text))
