"""One connection to a server that speaks HTTP: requests out, heads and bodies in, large bodies in place."""

from __future__ import annotations

import re
import select
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..blocks.block import Bytes
from .deadline import Deadline
from .wire import Wire

_MOST_HEADERS = 200
_MOST_BODY = 512 << 20


class Answer(NamedTuple):
    """The head of an answer."""

    status: int
    said: str
    headers: Mapping[str, str]
    """By their names in small letters."""
    size: int
    """Bytes of all of what was asked for, also where only a range of it comes."""


class Http(Wire):
    """See `Wire`. One answer at a time."""

    speaks = "HTTP"
    left = 0
    """Bytes of the body that are still to come."""
    _ends = True

    @property
    def usable(self) -> bool:
        """Whether another request may be sent: all of the last answer was read, and the server is still there."""
        return not self.left and not self._ends and not self._unread and not self._readable()

    def _readable(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])  # what comes unasked is its end

    def request(
        self, method: str, target: str, headers: Mapping[str, str], body: Sequence[bytes | Bytes], deadline: Deadline
    ) -> None:
        """Sends a request."""
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if method == "PUT":
            nbytes = sum(len(part) if isinstance(part, bytes) else part.nbytes for part in body)
            lines.append(f"Content-Length: {nbytes}")
        self.send(["\r\n".join([*lines, "", ""]).encode(), *body], deadline)

    def answer(self, deadline: Deadline, *, head_only: bool = False) -> Answer:
        """The head of the next answer; its body is to be read then.

        Args:
            head_only: of an answer to HEAD, which has no body, whatever it says.
        """
        status, said, headers = 100, "", dict[str, str]()
        while status < 200:
            begin = re.fullmatch(rb"HTTP/1\.[01] (\d{3}) ?(.*)", self.line(deadline))
            if begin is None:
                raise ValueError("the server does not speak HTTP")
            status, said = int(begin[1]), begin[2].decode("latin-1")
            headers = {}
            while line := self.line(deadline).decode("latin-1"):
                name, colon, value = line.partition(":")
                if not colon or len(headers) > _MOST_HEADERS:
                    raise ValueError("the server does not speak HTTP")
                headers[name.strip().lower()] = value.strip()
        bodiless = head_only or status in (204, 304)
        length = headers.get("content-length")
        self._ends = headers.get("connection", "").lower() == "close"
        self.left = int(length) if length is not None and not bodiless else 0
        if not bodiless and headers.get("transfer-encoding", "").lower() == "chunked":
            whole = self._chunks(deadline)
            self._unread[:0] = whole
            self.left = len(whole)
        elif not bodiless and length is None:
            raise ValueError("the server does not say how long its answer is")
        size = headers.get("content-range", "").rpartition("/")[2] or length or "0"
        return Answer(status, said, headers, int(size) if size != "*" else 0)

    def into(self, view: memoryview, deadline: Deadline) -> int:
        """Fills a buffer with what comes next of the body. Returns the bytes: fewer at its end only."""
        part = view[: self.left]
        self.fill(part, deadline)
        self.left -= part.nbytes
        return part.nbytes

    def body(self, deadline: Deadline) -> bytes:
        """What is left of the body."""
        if self.left > _MOST_BODY:
            raise ValueError("an answer of more than 512 MiB")
        whole = bytearray(self.left)
        self.into(memoryview(whole), deadline)
        return bytes(whole)

    def _chunks(self, deadline: Deadline) -> bytearray:
        whole = bytearray()
        while size := int(self.line(deadline).partition(b";")[0], 16):
            if size + len(whole) > _MOST_BODY:
                raise ValueError("an answer of more than 512 MiB")
            chunk = bytearray(size)
            self.fill(memoryview(chunk), deadline)
            self.end(deadline)
            whole += chunk
        while self.line(deadline):
            pass
        return whole
