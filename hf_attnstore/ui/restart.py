"""Restarting the process under the page: the same command again, in place of this process.

The listening socket goes over to what comes after, so that browsers that ask meanwhile are not refused: they wait.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable

from ..errors import AttentionStoreError
from ..listening import bound_socket

SOCKET = "ATTNSTORE_UI_SOCKET"
"""Environment variable with the number of the socket that was handed over."""


class RestartNotAllowedError(AttentionStoreError):
    """Others use the process too."""


class Restart:
    """Whether the process is to be restarted. A ticket is for one restart, so that no link can cause one.

    Args:
        allowed: False where others could restart what somebody is using.
    """

    def __init__(self, *, allowed: bool) -> None:
        self.allowed = allowed
        self.requested = False
        self.shut_down: Callable[[], None] = lambda: None
        """Has the server end; set by who runs it."""
        self._ticket = ""

    def ticket(self) -> str:
        """Raises:
        RestartNotAllowedError: see there.
        """
        if not self.allowed:
            raise RestartNotAllowedError("the process is for others too: who runs it restarts it")
        self._ticket = secrets.token_urlsafe(16)
        return self._ticket

    def armed_with(self, ticket: str) -> bool:
        """Whether that is the ticket."""
        return bool(self._ticket) and secrets.compare_digest(ticket.encode(), self._ticket.encode())

    def redeem(self, ticket: str) -> bool:
        """Begins the restart; False for a ticket that is none."""
        if not self.armed_with(ticket):
            return False
        self._ticket = ""
        self.requested = True
        self.shut_down()
        return True


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens: the one of the process before, or a new one.

    Raises:
        AttentionStoreError: the address can't be had.
    """
    handed_over = os.environ.pop(SOCKET, "")
    if handed_over:
        return socket.socket(fileno=int(handed_over))
    opened = bound_socket(host, port)
    opened.listen(128)
    return opened


def replace_process(listening: socket.socket) -> None:
    """Runs the same command again in place of this process. Does not return."""
    os.set_inheritable(listening.fileno(), True)
    environment = {**os.environ, SOCKET: str(listening.fileno())}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606


RESTARTING_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>restarting</title><link rel="icon" href="data:,">
<style>body{font:16px system-ui,sans-serif;display:grid;place-items:center;height:95vh;background:#fff;color:#1f2937}
@media(prefers-color-scheme:dark){body{background:#0b0f19;color:#f3f4f6}}p{opacity:.7}</style></head>
<body><main><h1>Restarting</h1><p>The process ends, and a new one begins. The conversations are in the store.</p></main>
<script>setTimeout(() => location.replace("./" + location.hash), 900)</script></body></html>
"""
