"""One connection to a server that speaks RESP (Valkey, Redis): commands out, replies in, large values in place.

A value is sent from the buffers that it lies in, and received into those where it is to lie: copying it once more, as
the usual clients do, takes longer than the transfer.
"""

import queue
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

from ..blocks.block import Bytes
from .deadline import Deadline

_CHUNK = 4 << 10
"""Bytes that are received for the sake of a line: what comes after it is copied once more."""
_MOST_LINE = 64 << 10


class Refused(Exception):
    """The server's word that it will not. Returned, as the replies after it are still to come."""

    @property
    def code(self) -> str:
        """Its first word, such as OOM."""
        return str(self).partition(" ")[0]


Reply: TypeAlias = "bytes | int | list[Reply] | Refused | None"


def command(*arguments: str | bytes | int) -> bytes:
    """A command with all of its arguments."""
    encoded = [a if isinstance(a, bytes) else str(a).encode() for a in arguments]
    return b"".join([b"*%d\r\n" % len(encoded), *(b"$%d\r\n%b\r\n" % (len(a), a) for a in encoded)])


def open_bulk(before: Sequence[str | bytes | int], nbytes: int, after: int) -> bytes:
    """The beginning of a command up to an argument of so many bytes, which is sent next, with `\\r\\n` and `after` more
    arguments behind it."""
    whole = command(*before)
    first = whole.index(b"\r\n")
    return b"*%d%b$%d\r\n" % (len(before) + 1 + after, whole[first:], nbytes)


class Connection:
    """For one thread at a time. After an error it is of no use any more.

    All methods raise OSError (TimeoutError, ConnectionError …) and ValueError where the peer speaks something else.
    """

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

    def reply(self, deadline: Deadline) -> Reply:
        """The next reply, however it is made up."""
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            size = int(rest)
            return self._bulk(size, deadline) if size >= 0 else None
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        if kind == b"-":
            return Refused(rest.decode(errors="replace"))
        if kind == b"*":
            return [self.reply(deadline) for _ in range(int(rest))]
        raise ValueError("the server does not speak RESP")

    def integers(self, count: int, deadline: Deadline) -> "list[int] | Refused":
        """So many replies, each of which is a number."""
        while self._unread.count(b"\r\n") < count:
            self._more(deadline)
        *lines, rest = bytes(self._unread).split(b"\r\n", count)
        self._unread = bytearray(rest)
        refused = next((line for line in lines if line[:1] == b"-"), None)
        if refused is not None:
            return Refused(refused[1:].decode(errors="replace"))
        if any(line[:1] != b":" for line in lines):
            raise ValueError("the reply is no number")
        return [int(line[1:]) for line in lines]

    def bulk_into(self, buffers: Sequence[Bytes], deadline: Deadline) -> int | Refused:
        """A reply that is a value, into buffers that together take it. Returns its bytes; 0 where there is none."""
        line = self._line(deadline)
        if line[:1] == b"-":
            return Refused(line[1:].decode(errors="replace"))
        if line[:1] != b"$":
            raise ValueError("the reply is no value")
        size = int(line[1:])
        if size < 0:
            return 0
        left = size
        for buffer in buffers:
            part = memoryview(buffer)[:left]  # type: ignore[arg-type]
            self._fill(part, deadline)
            left -= part.nbytes
            if not left:
                break
        if left:
            raise ValueError("the value is larger than what was asked for")
        self._end(deadline)
        return size

    def close(self) -> None:
        self._socket.close()

    # bytes

    def _receive_into(self, view: memoryview, deadline: Deadline) -> int:
        self._socket.settimeout(deadline.left())
        count = self._socket.recv_into(view)
        if not count:
            raise ConnectionResetError("the server closed the connection")
        self.answered = True
        return count

    def _fill(self, view: memoryview, deadline: Deadline) -> None:
        """Fills a buffer: with what was received already, then straight from the socket."""
        done = min(len(self._unread), view.nbytes)
        if done:
            view[:done] = self._unread[:done]
            del self._unread[:done]
        while done < view.nbytes:
            done += self._receive_into(view[done:], deadline)

    def _more(self, deadline: Deadline) -> None:
        chunk = bytearray(_CHUNK)
        self._unread += memoryview(chunk)[: self._receive_into(memoryview(chunk), deadline)]

    def _line(self, deadline: Deadline) -> bytes:
        while (end := self._unread.find(b"\r\n")) < 0:
            if len(self._unread) > _MOST_LINE:
                raise ValueError("the server does not speak RESP")
            self._more(deadline)
        line = bytes(self._unread[:end])
        del self._unread[: end + 2]
        return line

    def _bulk(self, size: int, deadline: Deadline) -> bytes:
        if size > 512 << 20:
            raise ValueError("a reply of more than 512 MiB")
        found = bytearray(size)
        self._fill(memoryview(found), deadline)
        self._end(deadline)
        return bytes(found)

    def _end(self, deadline: Deadline) -> None:
        while len(self._unread) < 2:
            self._more(deadline)
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
