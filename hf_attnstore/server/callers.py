"""Who asks: keys, the namespace of each, and who is asking now and has perhaps left."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from ..errors import AttentionStoreError
from ..store import AttentionStore
from .errors import ApiError

_OPEN = frozenset({"/health"})
"""What anybody may ask for."""
_PAGE = "/ui/"
"""Where the page is, if there is one: it knows its visitors by itself."""
_REQUEST_ID = b"x-request-id"
MOST_BYTES = 64 << 20
"""Of a request's body."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Keys:
    """API keys, and whose they are. Kept as digests: what compares them takes as long for any wrong one.

    Args:
        text: a name and a key in each line, apart by spaces; the same name may stand in several. A key may be given as
            `sha256:` and its digest in hex. Empty lines and what begins with `#` say nothing.

    Raises:
        AttentionStoreError: a line is none of that, a key stands for two names, or there is none.
    """

    def __init__(self, text: str) -> None:
        self._names: dict[bytes, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2:
                raise AttentionStoreError(f"line {number} of the keys is not a name and a key")
            digest = self._digest_of(words[1], number)
            if self._names.setdefault(digest, words[0]) != words[0]:
                raise AttentionStoreError(f"the key in line {number} belongs to somebody else already")
            AttentionStore.check_namespace(words[0])
        if not self._names:
            raise AttentionStoreError("there are no keys: write a name and a key into each line")

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Those of a file.

        Raises:
            AttentionStoreError: it can't be read, or see above.
        """
        try:
            return cls(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise AttentionStoreError(f"the keys can't be read: {error}") from error

    @staticmethod
    def _digest_of(written: str, number: int) -> bytes:
        kind, _, digest = written.rpartition(":")
        if kind != "sha256":
            return hashlib.sha256(written.encode()).digest()
        try:
            found = bytes.fromhex(digest)
        except ValueError:
            found = b""
        if len(found) != hashlib.sha256().digest_size:
            raise AttentionStoreError(f"line {number} of the keys: what follows sha256: is no digest in hex")
        return found

    def name_of(self, authorization: str) -> str | None:
        """Whose an `Authorization` header is; None if nobody's."""
        kind, _, key = authorization.partition(" ")
        if kind.lower() != "bearer":
            return None
        return self._names.get(hashlib.sha256(key.strip().encode()).digest())


@dataclass
class Exchange:
    """One request: in whose namespace it is, and whether there still is somebody who waits for the answer."""

    store: AttentionStore
    """The store in the caller's namespace."""
    began: float = field(default_factory=time.monotonic)
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """As the client names it, if it does."""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    left: bool = False
    _when_left: list[Callable[[], object]] = field(default_factory=list)

    def when_left(self, call: Callable[[], object]) -> None:
        """Has `call` called when the client leaves before its answer is complete."""
        self._when_left.append(call)

    def leave(self) -> None:
        """The client has left."""
        self.left = True
        for call in self._when_left:
            call()


_current: ContextVar[Exchange] = ContextVar("attnstore_exchange")


def current() -> Exchange:
    """The request that is being answered; for sessions' routes too, which run in threads."""
    return _current.get()


class Doorkeeper:
    """ASGI middleware: asks for a key, reads the body, notices when a client leaves, and gives a request its id, which
    transformers' routes read (their own middleware for that hands every piece of a stream from task to task).

    Args:
        keys: None lets everybody in, into the store's own namespace.
    """

    def __init__(self, app: Any, store: AttentionStore, keys: Keys | None) -> None:
        self._app, self._store, self._keys = app, store, keys
        self._views: dict[str, AttentionStore] = {}
        """Kept, so that a namespace stays one object for the queue."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or f"{scope['path']}/".startswith(_PAGE):
            await self._app(scope, receive, send)
            return
        store = self._store_of(scope)
        if store is None:
            refused = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
            await JSONResponse(refused.body, refused.status, {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        body = await _whole_body(receive)
        if body is None:
            refused = ApiError(413, f"a request has at most {MOST_BYTES:,} bytes")
            await JSONResponse(refused.body, refused.status)(scope, receive, send)
            return
        exchange = Exchange(store, headers=dict(scope["headers"]))
        exchange.id = exchange.headers.get(_REQUEST_ID, b"").decode("latin-1") or exchange.id
        scope.setdefault("state", {})["request_id"] = exchange.id
        token = _current.set(exchange)
        try:
            await self._answer(scope, body, receive, send, exchange)
        finally:
            _current.reset(token)

    def _store_of(self, scope: MutableMapping[str, Any]) -> AttentionStore | None:
        if self._keys is None or scope["path"] in _OPEN:
            return self._store
        given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        name = self._keys.name_of(given)
        if name is None:
            return None
        if name not in self._views:
            self._views[name] = self._store.in_namespace(name)
        return self._views[name]

    async def _answer(
        self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send, exchange: Exchange
    ) -> None:
        gone = asyncio.Event()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            exchange.leave()

        watching = asyncio.ensure_future(watch())
        given = False

        async def receive_again() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (_REQUEST_ID, exchange.id.encode("latin-1"))]
            if message["type"] == "http.response.body" and not message.get("more_body"):
                watching.cancel()  # who has the whole answer may go
            await send(message)

        try:
            await self._app(scope, receive_again, send_on)
        finally:
            watching.cancel()


async def _whole_body(receive: Receive) -> bytes | None:
    """A request's body; None where it is too long."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            return None
        if message["type"] != "http.request" or not message.get("more_body"):
            return b"".join(parts)
