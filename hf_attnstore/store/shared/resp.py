"""One connection to a server that speaks RESP (Valkey, Redis): commands out, replies in, large values in place.

A value is sent from the buffers that it lies in, and received into those where it is to lie: copying it once more, as
the usual clients do, takes longer than the transfer.
"""

from collections.abc import Sequence
from typing import TypeAlias

from ..blocks.block import Bytes
from .deadline import Deadline
from .wire import Wire


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


class Connection(Wire):
    """For one thread at a time. After an error it is of no use any more.

    All methods raise OSError (TimeoutError, ConnectionError …) and ValueError where the peer speaks something else.
    """

    speaks = "RESP"

    def reply(self, deadline: Deadline) -> Reply:
        """The next reply, however it is made up."""
        line = self.line(deadline)
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
            self.more(deadline)
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
        line = self.line(deadline)
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
            self.fill(part, deadline)
            left -= part.nbytes
            if not left:
                break
        if left:
            raise ValueError("the value is larger than what was asked for")
        self.end(deadline)
        return size

    def _bulk(self, size: int, deadline: Deadline) -> bytes:
        if size > 512 << 20:
            raise ValueError("a reply of more than 512 MiB")
        found = bytearray(size)
        self.fill(memoryview(found), deadline)
        self.end(deadline)
        return bytes(found)
