"""Who is asking: cookies, accounts, and what a guess is worth."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from hf_attnstore import AttentionStore
from hf_attnstore.ui.identity import COOKIE, IdentityCookie, NoIdentityError, namespace_of, new_secret
from hf_attnstore.ui.restart import Restart, RestartNotAllowedError
from hf_attnstore.ui.serve import is_loopback


def set_cookie(path: str = "/", sent: str | None = None, scheme: str = "http") -> str | None:
    """The cookie that comes with a page, if one does."""

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    headers = [(b"cookie", f"theirs=1; {COOKIE}={sent}".encode())] if sent is not None else []
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers, "scheme": scheme}
    asyncio.run(IdentityCookie(page)(scope, None, send))
    found = [value.decode() for name, value in messages[0]["headers"] if name == b"set-cookie"]
    return found[0] if found else None


def test_a_new_browser_gets_a_secret_of_its_own_that_scripts_can_not_read() -> None:
    first, second = set_cookie(), set_cookie()
    assert first is not None
    assert second is not None
    assert first.split(";")[0] != second.split(";")[0]
    assert re.fullmatch(COOKIE + r"=[\w-]{43}; Path=/; Max-Age=\d+; HttpOnly; SameSite=Lax", first)
    assert (set_cookie(scheme="https") or "").endswith("; Secure")


def test_a_browser_keeps_its_secret_and_what_is_no_secret_is_replaced() -> None:
    secret = new_secret()
    assert (set_cookie(sent=secret) or "").startswith(f"{COOKIE}={secret};")
    for wrong in ("", "admin", secret[:-1], secret + "x", "../" + secret[3:]):
        assert not (set_cookie(sent=wrong) or "").startswith(f"{COOKIE}={wrong};")


def test_nothing_but_the_page_sets_cookies() -> None:
    assert set_cookie("/gradio_api/queue/join") is None


def test_namespaces_tell_browsers_and_accounts_apart_and_hide_the_secret() -> None:
    ann, bob = new_secret(), new_secret()
    spaces = {
        namespace_of({COOKIE: ann}),
        namespace_of({COOKIE: bob}),
        namespace_of({}, "ann"),
        namespace_of({COOKIE: ann}, "bob"),
    }
    assert len(spaces) == 4
    assert namespace_of({COOKIE: ann}) == namespace_of({COOKIE: ann})
    assert namespace_of({COOKIE: ann}, "bob") == namespace_of({COOKIE: bob}, "bob")
    assert not any(ann in space or bob in space for space in spaces)
    assert all(AttentionStore.check_namespace(space) == space for space in spaces)


@pytest.mark.parametrize("cookies", [{}, {COOKIE: ""}, {COOKIE: "ui-browser-0"}, {"other": new_secret()}])
def test_who_has_no_identity_has_no_namespace(cookies: dict[str, str]) -> None:
    with pytest.raises(NoIdentityError):
        namespace_of(cookies)


def test_the_cookie_of_an_account_names_no_browser() -> None:
    """A secret that says what an account's namespace is made of is another namespace."""
    assert namespace_of({COOKIE: "a" * 43}) != namespace_of({}, "a" * 43)


def test_a_restart_needs_a_ticket_of_the_page_and_each_is_for_one() -> None:
    ended: list[bool] = []
    restart = Restart(allowed=True)
    restart.shut_down = lambda: ended.append(True)
    assert not restart.redeem("")
    assert not restart.redeem("guess")
    ticket = restart.ticket()
    assert not restart.redeem(ticket[:-1])
    assert ended == []
    assert restart.redeem(ticket)
    assert not restart.redeem(ticket)
    assert (ended, restart.requested) == ([True], True)


def test_where_others_use_it_nobody_restarts_it() -> None:
    with pytest.raises(RestartNotAllowedError):
        Restart(allowed=False).ticket()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.4", False), ("example.org", False)],
)  # fmt: skip
def test_what_others_can_reach_is_known(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
