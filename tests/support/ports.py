"""Ports of the loopback for servers that can't be given a listening socket."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress


def free_port() -> int:
    """One that nobody listens at. It is below those that the kernel gives away, so that no connection goes out from
    it before the server has it, or while the server is away."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", secrets.choice(range(20_000, 32_000))))
            return int(probe.getsockname()[1])
