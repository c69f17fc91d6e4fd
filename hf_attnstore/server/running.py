"""Running the application in uvicorn, until somebody ends the process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()


def run(app: Any, listening: socket.socket, grace: int, ready: Callable[[], object]) -> None:
    """Serves until SIGTERM or Ctrl-C. Answers that are being made have `grace` seconds then; what they are until then
    is kept. The application closes what it has in its lifespan.

    Args:
        ready: called when requests are answered.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=grace)
    _Server(config, ready).run(sockets=[listening])
