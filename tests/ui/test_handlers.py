"""The page's events, called as the server calls them: whoever asks, whatever they send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Gate

from hf_attnstore import AttentionStore
from hf_attnstore.ui.handlers import Handlers, Parts
from hf_attnstore.ui.identity import COOKIE, new_secret
from hf_attnstore.ui.restart import Restart
from hf_attnstore.ui.turns import Turns

PARTS = Parts(**{part.name: part.name for part in fields(Parts)})  # updates go by component: here, by name


@pytest.fixture
def handlers(store: AttentionStore, turns: Turns) -> Handlers:
    return Handlers(store, turns, Restart(allowed=True), PARTS)


def browser(page: str = "page") -> Any:
    """The requests of a browser of its own."""
    return SimpleNamespace(cookies={COOKIE: new_secret()}, username=None, session_hash=page)


def last(updates: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """What a page shows after all that a handler said."""

    async def collect() -> dict[str, Any]:
        shown: dict[str, Any] = {}
        async for update in updates:
            shown |= update
        return shown

    return asyncio.run(collect())


def names(shown: dict[str, Any]) -> list[str]:
    return [value for _, value in shown["entries"]["choices"]]


def test_no_handler_does_anything_with_a_conversation_of_another_browser(handlers: Handlers) -> None:
    ann, bob = browser("a"), browser("b")
    shown = last(handlers.send(ann, "the old prince", "", False, ""))
    assert (shown["current"], names(shown)) == ("the old prince", ["the old prince"])
    name = "the old prince"
    attempts: list[Callable[[], AsyncIterator[dict[str, Any]]]] = [
        lambda: handlers.open(bob, name),
        lambda: handlers.retry(bob, name, False, ""),
        lambda: handlers.edit(SimpleNamespace(index=0, value="x"), [], name, False, "", bob),
        lambda: handlers.rename(bob, name, "stolen", ""),
        lambda: handlers.fork(bob, name, ""),
        lambda: handlers.delete(bob, name, ""),
    ]
    for attempt in attempts:
        told = last(attempt())
        assert "wrong" in told["note"]
        assert "prince" not in str(told.get("chat", ""))
    assert "wrong" in asyncio.run(handlers.undo(bob, name, ""))["note"]
    assert names(asyncio.run(handlers.searched(bob, "", ""))) == []
    asyncio.run(handlers.stop(bob, name))
    asyncio.run(handlers.typing(bob, name))
    shown = last(handlers.open(ann, name))
    assert shown["chat"][0]["content"] == "the old prince"

    mine = last(handlers.send(bob, "and then", name, False, ""))  # the same name is another conversation
    assert [m["content"] for m in mine["chat"] if m["role"] == "user"] == ["and then"]
    assert last(handlers.open(ann, name))["chat"] == shown["chat"]


def test_a_browser_without_cookies_is_told_so(handlers: Handlers, store: AttentionStore) -> None:
    nobody = SimpleNamespace(cookies={}, username=None, session_hash="page")
    assert "cookies" in last(handlers.send(nobody, "hello", "", False, ""))["note"]
    assert "cookies" in last(handlers.open(nobody, "talk"))["note"]
    assert store.stats()["sessions"] == 0


def test_an_account_has_its_conversations_in_every_browser(handlers: Handlers) -> None:
    desk, phone = browser("a"), browser("b")
    desk.username = phone.username = "ann"
    last(handlers.send(desk, "the old prince", "", False, ""))
    assert names(last(handlers.open(phone, None))) == ["the old prince"]


def test_what_another_page_of_the_browser_streams_does_not_come_to_a_page_that_moved_on(
    handlers: Handlers, gate: Gate
) -> None:
    ann = browser()

    async def act() -> list[dict[str, Any]]:
        gate.hold_after(2)
        seen = []
        async for update in handlers.send(ann, "the old prince", "", False, ""):
            seen.append(update)
            if "chat" in update and any(m["role"] == "assistant" for m in update["chat"]):
                async for _ in handlers.new(ann, ""):
                    pass
                seen.clear()
                gate.open.set()
        return seen

    assert asyncio.run(act()) == []
    shown = last(handlers.open(ann, "the old prince"))  # the turn itself went on
    assert shown["chat"][0]["content"] == "the old prince"


def test_a_page_that_opens_a_conversation_being_answered_follows_it(handlers: Handlers, gate: Gate) -> None:
    ann = browser("first")

    async def act() -> tuple[dict[str, Any], dict[str, Any]]:
        gate.hold_after(2)
        here = asyncio.create_task(_collected(handlers.send(ann, "the old prince", "", False, "")))
        await asyncio.to_thread(gate.reached.wait, 60)
        reloaded = SimpleNamespace(cookies=ann.cookies, username=None, session_hash="second")
        there = asyncio.create_task(_collected(handlers.open(reloaded, "the old prince")))
        await asyncio.sleep(0)
        gate.open.set()
        return await here, await there

    here, there = asyncio.run(act())
    assert here["chat"] == there["chat"]
    assert "tokens reused" in there["chat"][-1]["content"]


async def _collected(updates: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    async for update in updates:
        shown |= update
    return shown


def test_a_message_that_nothing_answered_comes_back_to_be_sent_again(handlers: Handlers, gate: Gate) -> None:
    gate.failure = RuntimeError("out of memory")
    shown = last(handlers.send(browser(), "the old prince", "", False, ""))
    assert "the model failed: out of memory" in shown["note"]
    assert shown["box"]["value"] == "the old prince"
    assert shown["chat"] == []


def test_long_and_odd_names_are_names_and_equal_ones_are_numbered(handlers: Handlers) -> None:
    ann = browser()
    for text in ("<b>who</b> " + "and then " * 30, "<b>who</b> " + "and then " * 30, "\n \t ok \x00"):
        shown = last(handlers.send(ann, text, "", False, ""))
        assert not shown["note"]
        assert "<b>" not in shown["title"]
    assert len(set(names(shown))) == 3
