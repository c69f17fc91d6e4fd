"""A connection to a server, for which deadlines hold: bytes out of the buffers that they lie in, and into those where
they are to lie."""

import queue
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import Any

from ..blocks.block import Bytes
from .deadline import Deadline

_CHUNK = 4 << 10
"""Bytes that are received for the sake of a line: what comes after it is copied once more."""
_MOST_LINE = 64 << 10


class Wire:
    """For one thread at a time. After an error it is of no use any more.

    All methods raise OSError (TimeoutError, ConnectionError …) and ValueError where the peer speaks something else.
    """

    speaks = "it"
    """What the peer is to speak."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, deadline: Deadline) -> None:
        self._socket: socket.socket = _connect(host, port, deadline)
        self.answered = False
        """Whether anything came since this was last set back."""
        self._unread = bytearray()
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if tls is not None:
                self._socket.settimeout(deadline.left())
                self._socket = tls.wrap_socket(self._socket, server_hostname=host)
        except BaseException:
            self._socket.close()
            raise

    def send(self, parts: Sequence[bytes | Bytes], deadline: Deadline) -> None:
        """Sends buffers, one after the other."""
        for part in parts:
            self._socket.settimeout(deadline.left())
            self._socket.sendall(part)  # type: ignore[arg-type]

    def close(self) -> None:
        self._socket.close()

    def receive_into(self, view: memoryview, deadline: Deadline) -> int:
        """Receives as much as there is. Returns the bytes, at least 1."""
        self._socket.settimeout(deadline.left())
        count = self._socket.recv_into(view)
        if not count:
            raise ConnectionResetError("the server closed the connection")
        self.answered = True
        return count

    def fill(self, view: memoryview, deadline: Deadline) -> None:
        """Fills a buffer: with what was received already, then straight from the socket."""
        done = min(len(self._unread), view.nbytes)
        if done:
            view[:done] = self._unread[:done]
            del self._unread[:done]
        while done < view.nbytes:
            done += self.receive_into(view[done:], deadline)

    def more(self, deadline: Deadline) -> None:
        """Receives something for the sake of a line."""
        chunk = bytearray(_CHUNK)
        self._unread += memoryview(chunk)[: self.receive_into(memoryview(chunk), deadline)]

    def line(self, deadline: Deadline) -> bytes:
        """The next line, without its end."""
        while (end := self._unread.find(b"\r\n")) < 0:
            if len(self._unread) > _MOST_LINE:
                raise ValueError(f"the server does not speak {self.speaks}")
            self.more(deadline)
        line = bytes(self._unread[:end])
        del self._unread[: end + 2]
        return line

    def end(self, deadline: Deadline) -> None:
        """Takes the end of a line that has to come next."""
        while len(self._unread) < 2:
            self.more(deadline)
        if self._unread[:2] != b"\r\n":
            raise ValueError("a value does not end where it should")
        del self._unread[:2]


def _connect(host: str, port: int, deadline: Deadline) -> socket.socket:
    """A socket connected to the first of a host's addresses that answers. Resolving names knows no deadline: a thread
    that is stuck in it is left behind."""
    found: queue.SimpleQueue[list[tuple[Any, ...]] | OSError] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            found.put(error)

    threading.Thread(target=resolve, name="attnstore-resolve", daemon=True).start()
    try:
        addresses = found.get(timeout=deadline.left())
    except queue.Empty:
        raise TimeoutError("the name was not resolved in time") from None
    if isinstance(addresses, OSError):
        raise addresses
    failed: OSError = ConnectionError("the host has no address")
    for family, kind, protocol, _, address in addresses:
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(deadline.left())
            made.connect(address)
            return made
        except OSError as error:
            made.close()
            failed = error
    raise failed
