"""A network that is not there: a proxy on the loopback that lets so many bits a second through, and each after a delay.
And a server that sends and takes plain bytes, which says what a socket can do at best.

Both run in processes of their own (`python -m hf_attnstore.lab.bench.network link|bytes …`), which say their port on a
line.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_CHUNK = 256 << 10


@dataclass(frozen=True)
class Link:
    """A network between two machines."""

    name: str
    bits: float = 0.0
    """A second; 0 for no limit."""
    delay: float = 0.0
    """Seconds, one way."""


LINKS = (
    Link("10 Gbit/s", 10e9),
    Link("1 Gbit/s", 1e9),
    Link("10 Gbit/s, 20 ms there and back", 10e9, 0.01),
)


@contextmanager
def through(link: Link, port: int) -> Iterator[int]:
    """A port behind which, over that link, is another of the loopback."""
    with _process("link", port, link.bits, link.delay) as there:
        yield there


@contextmanager
def plain_bytes() -> Iterator[int]:
    """The port of a server of plain bytes; see `ask_bytes` and `give_bytes`."""
    with _process("bytes") as port:
        yield port


def ask_bytes(connection: socket.socket, buffer: memoryview) -> None:
    """Has as many bytes sent as the buffer takes."""
    connection.sendall(struct.pack(">q", buffer.nbytes))
    done = 0
    while done < buffer.nbytes:
        done += connection.recv_into(buffer[done:])


def give_bytes(connection: socket.socket, buffer: memoryview) -> None:
    """Sends bytes, and waits until they are there."""
    connection.sendall(struct.pack(">q", -buffer.nbytes))
    connection.sendall(buffer)
    connection.recv(1)


@contextmanager
def _process(*arguments: object) -> Iterator[int]:
    command = [sys.executable, "-m", "hf_attnstore.lab.bench.network", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 this very module
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def _listen() -> Iterator[socket.socket]:
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)  # noqa: T201 the other process reads it
    while True:
        connection, _ = listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def _serve_bytes(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(64 << 20))
    while head := connection.recv(8, socket.MSG_WAITALL):
        (count,) = struct.unpack(">q", head)
        if count > 0:
            connection.sendall(buffer[:count])
            continue
        done = 0
        while done < -count:
            done += connection.recv_into(buffer[done:-count])
        connection.sendall(b"1")


class _Wire:
    """One direction of a link, which all connections share: bytes leave when those before them have."""

    def __init__(self, bits: float) -> None:
        self.bits = bits
        self._lock = threading.Lock()
        self._free = 0.0

    def leave(self, nbytes: int) -> float:
        """When so many bytes have left, on the clock of `time.monotonic`."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + (nbytes * 8 / self.bits if self.bits else 0.0)
            return self._free


class _Direction:
    """One direction of a connection: bytes leave by the wire, and arrive a delay later."""

    def __init__(self, source: socket.socket, target: socket.socket, wire: _Wire, delay: float) -> None:
        self._source, self._target, self._wire, self._delay = source, target, wire, delay
        self._changed = threading.Condition()
        self._way: deque[tuple[float, bytes]] = deque()
        self._room = max(4 << 20, int(2 * wire.bits / 8 * delay))
        self._nbytes = 0
        for run in (self._read, self._write):
            threading.Thread(target=run, daemon=True).start()

    def _read(self) -> None:
        data = b"-"
        while data:
            try:
                data = self._source.recv(_CHUNK)
            except OSError:
                data = b""
            left = self._wire.leave(len(data))
            with self._changed:
                self._changed.wait_for(lambda: self._nbytes < self._room)
                self._way.append((left + self._delay, data))
                self._nbytes += len(data)
                self._changed.notify_all()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._way))
                due, data = self._way[0]
            left = due - time.monotonic()
            if left > 0:
                time.sleep(left)
            try:
                if not data:
                    self._target.shutdown(socket.SHUT_WR)
                    return
                self._target.sendall(data)
            except OSError:
                return
            with self._changed:
                self._way.popleft()
                self._nbytes -= len(data)
                self._changed.notify_all()


def _serve_link(connection: socket.socket, port: int, wires: tuple[_Wire, _Wire], delay: float) -> None:
    server = socket.create_connection(("127.0.0.1", port))
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _Direction(connection, server, wires[0], delay)
    _Direction(server, connection, wires[1], delay)


def main(what: str, port: str = "0", bits: str = "0", delay: str = "0") -> None:
    """Serves until it is killed."""
    wires = _Wire(float(bits)), _Wire(float(bits))
    for connection in _listen():
        if what == "bytes":
            threading.Thread(target=_serve_bytes, args=(connection,), daemon=True).start()
        else:
            _serve_link(connection, int(port), wires, float(delay))


if __name__ == "__main__":
    main(*sys.argv[1:])
