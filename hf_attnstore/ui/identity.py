"""Who is asking: each browser is known by a secret in a cookie, or by the account that it logged in with.

An identity is a namespace of the store, and all that a handler does is done in the namespace of the one who asks. What
others have can't even be named there.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from ..errors import AttentionStoreError

COOKIE = "attnstore-ui"
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")
_YEAR = 365 * 24 * 3600


class NoIdentityError(AttentionStoreError):
    """The browser sends no cookie, so its conversations can't be told from those of others."""


def new_secret() -> str:
    """32 random bytes as text."""
    return secrets.token_urlsafe(32)


def namespace_of(cookies: Mapping[str, str], account: str | None = None) -> str:
    """The namespace of whoever sent a request. It does not tell the secret.

    Args:
        account: the name that was logged in with; it comes before the browser, so that it has the same conversations
            everywhere.

    Raises:
        NoIdentityError: there is neither an account nor a cookie of ours.
    """
    if account:
        return _digest("account", account)
    secret = cookies.get(COOKIE, "")
    if not _SECRET.fullmatch(secret):
        raise NoIdentityError("your browser sent no cookie: allow cookies for this page, and load it again")
    return _digest("browser", secret)


def _digest(kind: str, what: str) -> str:
    return f"ui-{kind}-" + hashlib.sha256(f"attnstore-ui:{kind}:{what}".encode()).hexdigest()[:40]


class IdentityCookie:
    """ASGI middleware: gives each browser its cookie with the page at `path`, and the same one again at each visit."""

    def __init__(self, app: Any, path: str = "/") -> None:
        self.app = app
        self.paths = {path, path.rstrip("/"), path.rstrip("/") + "/"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] not in self.paths:
            await self.app(scope, receive, send)
            return
        secret = _sent_secret(scope) or new_secret()
        cookie = f"{COOKIE}={secret}; Path=/; Max-Age={_YEAR}; HttpOnly; SameSite=Lax"
        if scope.get("scheme") == "https":
            cookie += "; Secure"

        async def with_cookie(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
            await send(message)

        await self.app(scope, receive, with_cookie)


def _sent_secret(scope: Any) -> str | None:
    for name, value in scope["headers"]:
        if name == b"cookie":
            try:
                sent = SimpleCookie(value.decode("latin-1")).get(COOKIE)
            except CookieError:
                continue
            if sent is not None and _SECRET.fullmatch(sent.value):
                return sent.value
    return None
