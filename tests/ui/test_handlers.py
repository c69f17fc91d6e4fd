"""The page's events, called as the server calls them: whoever asks, whatever they send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Gate

from hf_attnstore import AttentionStore
from hf_attnstore.ui.answering import Answering
from hf_attnstore.ui.identity import COOKIE, new_secret
from hf_attnstore.ui.keeping import Keeping
from hf_attnstore.ui.pages import Pages
from hf_attnstore.ui.restart import Restart
from hf_attnstore.ui.turns import Turns
from hf_attnstore.ui.view import Parts, View

PARTS = Parts(**{part.name: part.name for part in fields(Parts)})  # updates go by component: here, by name
PRINCE = "the old prince"


class Download(str):
    """The component, as a name that knows where its files are."""

    GRADIO_CACHE = ""


@pytest.fixture
def pages(store: AttentionStore, turns: Turns, tmp_path: Path) -> Pages:
    download: Any = Download("download")
    download.GRADIO_CACHE = str(tmp_path / "cache")
    return Pages(store, turns, View(replace(PARTS, download=download), turns.settings))


@pytest.fixture
def on(pages: Pages) -> Answering:
    return Answering(pages)


@pytest.fixture
def keeping(pages: Pages) -> Keeping:
    return Keeping(pages, Restart(allowed=True))


def browser(page: str = "page") -> Any:
    """The requests of a browser of its own."""
    return SimpleNamespace(cookies={COOKIE: new_secret()}, username=None, session_hash=page)


def said(text: str = "", current: str = "", number: int = 0, **more: Any) -> dict[str, Any]:
    """What a page says with a message, or another event that begins a turn."""
    settings = {"system": "", "temperature": 0, "top_p": 1, "max_new_tokens": 12, "settings_of": current}
    about = {"current": current, "draft": "0", "search": "", "without": False, "chat": [], "edited": None}
    return {"sent": f"{number} {text}", **about, **settings, **more}


async def collected(updates: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """What a page shows after all that a handler said."""
    shown: dict[str, Any] = {}
    async for update in updates:
        shown |= update
    return shown


def last(updates: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    return asyncio.run(collected(updates))


def names(shown: dict[str, Any]) -> list[str]:
    return [value for _, value in shown["entries"]["choices"]]


def asked(shown: dict[str, Any]) -> list[str]:
    return [m["content"] for m in shown["chat"] if m["role"] == "user"]


def test_no_handler_does_anything_with_a_conversation_of_another_browser(
    on: Answering, keeping: Keeping, pages: Pages
) -> None:
    ann, bob = browser("a"), browser("b")
    shown = last(on.send(said(PRINCE), ann))
    assert (shown["current"], names(shown)) == (PRINCE, [PRINCE])
    theirs = said(current=PRINCE, edited=(PRINCE, 0, "x"))
    attempts: list[Callable[[], AsyncIterator[dict[str, Any]]]] = [
        lambda: pages.open(bob, PRINCE),
        lambda: on.retry(theirs, bob),
        lambda: on.go_on(theirs, bob),
        lambda: on.edit(SimpleNamespace(index=0, value="x"), theirs, bob),
        lambda: on.edit_now(theirs, bob),
        lambda: on.edit_copy(theirs, bob),
        lambda: keeping.rename(bob, PRINCE, "stolen", ""),
        lambda: keeping.fork(bob, PRINCE, ""),
        lambda: keeping.delete(bob, PRINCE, ""),
    ]
    for attempt in attempts:
        told = last(attempt())
        assert "wrong" in told["note"]
        assert "prince" not in str(told.get("chat", ""))
    assert "wrong" in asyncio.run(on.undo(bob, PRINCE, ""))["note"]
    assert "wrong" in asyncio.run(keeping.export(bob, PRINCE))["note"]
    assert names(asyncio.run(pages.searched(bob, "", ""))) == []
    asyncio.run(on.stop(bob, PRINCE))
    asyncio.run(pages.typing(bob, PRINCE))
    shown = last(pages.open(ann, PRINCE))
    assert shown["chat"][0]["content"] == PRINCE

    mine = last(on.send(said("and then", PRINCE), bob))  # the same name is another conversation
    assert asked(mine) == ["and then"]
    assert last(pages.open(ann, PRINCE))["chat"] == shown["chat"]


def test_a_browser_without_cookies_is_told_so(on: Answering, pages: Pages, store: AttentionStore) -> None:
    nobody = SimpleNamespace(cookies={}, username=None, session_hash="page")
    assert "cookies" in last(on.send(said("hello"), nobody))["note"]
    assert "cookies" in last(pages.open(nobody, "talk"))["note"]
    assert store.stats()["sessions"] == 0


def test_an_account_has_its_conversations_in_every_browser(on: Answering, pages: Pages) -> None:
    desk, phone = browser("a"), browser("b")
    desk.username = phone.username = "ann"
    last(on.send(said(PRINCE), desk))
    assert names(last(pages.open(phone, None))) == [PRINCE]


def test_messages_that_are_sent_quickly_make_one_conversation_in_their_order(
    on: Answering, gate: Gate, pages: Pages
) -> None:
    ann = browser()
    texts = [f"message {n}" for n in range(10)]

    async def act() -> list[dict[str, Any]]:
        gate.hold_after(0)
        sends = [collected(on.send(said(text, number=n), ann)) for n, text in enumerate(texts)]
        sends[3], sends[4] = sends[4], sends[3]  # requests overtake each other
        running = [asyncio.create_task(send) for send in sends]
        await asyncio.to_thread(gate.reached.wait, 60)
        while len(pages.turns.running(pages.sessions(ann), "message 0")) < 10:
            await asyncio.sleep(0.01)
        listed = await pages.listed(ann, "", "")
        assert [(label.partition("\n")[2], name) for label, name in listed["entries"]["choices"]] == [
            ("answering", "message 0")
        ]
        gate.open.set()
        return await asyncio.gather(*running)

    shown = asyncio.run(act())[-1]
    assert asked(shown) == texts
    assert names(shown) == ["message 0"]
    new = last(on.send(said("another", draft="1", number=10), ann))
    assert names(new) == ["another", "message 0"]


def test_stopping_takes_back_what_waits_and_puts_it_into_the_box(on: Answering, gate: Gate, pages: Pages) -> None:
    ann = browser()

    async def act() -> dict[str, Any]:
        gate.hold_after(2)
        running = [asyncio.create_task(collected(on.send(said(f"message {n}", number=n), ann))) for n in range(3)]
        await asyncio.to_thread(gate.reached.wait, 60)
        while len(pages.turns.running(pages.sessions(ann), "message 0")) < 3:
            await asyncio.sleep(0.01)
        await on.stop(ann, "message 0")
        gate.open.set()
        return (await asyncio.gather(*running))[-1]

    shown = asyncio.run(act())
    assert asked(shown) == ["message 0"]
    assert shown["box"]["value"] == "message 1\n\nmessage 2"
    assert shown["go_on"]["visible"]
    whole = last(on.go_on(said(current="message 0"), ann))
    begun, gone_on = shown["chat"][1]["content"], whole["chat"][1]["content"]
    assert (gone_on.startswith(begun), len(gone_on) > len(begun)) == (True, True)
    assert asked(whole) == ["message 0"]


def test_what_another_page_of_the_browser_streams_does_not_come_to_a_page_that_moved_on(
    on: Answering, pages: Pages, gate: Gate
) -> None:
    ann = browser()

    async def act() -> list[dict[str, Any]]:
        gate.hold_after(2)
        seen = []
        async for update in on.send(said(PRINCE), ann):
            seen.append(update)
            if "chat" in update and any(m["role"] == "assistant" for m in update["chat"]):
                async for _ in pages.new(ann, ""):
                    pass
                seen.clear()
                gate.open.set()
        return seen

    assert asyncio.run(act()) == []
    shown = last(pages.open(ann, PRINCE))  # the turn itself went on
    assert shown["chat"][0]["content"] == PRINCE


def test_a_page_that_opens_a_conversation_being_answered_follows_it(on: Answering, pages: Pages, gate: Gate) -> None:
    ann = browser("first")

    async def act() -> tuple[dict[str, Any], dict[str, Any]]:
        gate.hold_after(2)
        here = asyncio.create_task(collected(on.send(said(PRINCE), ann)))
        await asyncio.to_thread(gate.reached.wait, 60)
        reloaded = SimpleNamespace(cookies=ann.cookies, username=None, session_hash="second")
        there = asyncio.create_task(collected(pages.open(reloaded, PRINCE)))
        await asyncio.sleep(0)
        gate.open.set()
        return await here, await there

    here, there = asyncio.run(act())
    assert here["chat"] == there["chat"]
    assert "tokens reused" in there["chat"][-1]["content"]


def test_a_message_that_nothing_answered_comes_back_to_be_sent_again(on: Answering, gate: Gate) -> None:
    gate.failure = RuntimeError("out of memory")
    shown = last(on.send(said(PRINCE, system="Be brief."), browser()))
    assert "the model failed: out of memory" in shown["note"]
    assert shown["box"]["value"] == PRINCE
    assert shown["chat"] == []
    assert "system" not in shown  # what was set for the new conversation stays


def test_long_and_odd_names_are_names_and_equal_ones_are_numbered(on: Answering) -> None:
    ann = browser()
    for n, text in enumerate(("<b>who</b> " + "and then " * 30, "<b>who</b> " + "and then " * 30, "\n \t ok \x00")):
        shown = last(on.send(said(text, number=n, draft=str(n)), ann))
        assert not shown["note"]
        assert "<b>" not in shown["title"]
    assert len(set(names(shown))) == 3


def test_an_edit_of_an_earlier_message_asks_before_it_drops_what_came_after(on: Answering, pages: Pages) -> None:
    ann = browser()
    for n, text in enumerate((PRINCE, "the letter", "the mother")):
        shown = last(on.send(said(text, PRINCE if n else "", number=n), ann))
    edit = SimpleNamespace(index=0, value="the young man")
    told = last(on.edit(edit, said(current=PRINCE, chat=shown["chat"]), ann))
    assert (told["asking"]["visible"], told["edited"]) == (True, (PRINCE, 0, "the young man"))
    assert "the 2 turns" in told["question"]
    assert asked(told) == [PRINCE, "the letter", "the mother"]

    copied = last(on.edit_copy(said(current=PRINCE, edited=told["edited"]), ann))
    assert (copied["current"], asked(copied)) == (f"{PRINCE}, copy", ["the young man"])
    assert asked(last(pages.open(ann, PRINCE))) == [PRINCE, "the letter", "the mother"]

    edited = last(on.edit_now(said(current=PRINCE, edited=told["edited"]), ann))
    assert (edited["edited"], edited["asking"]["visible"]) == (None, False)
    assert asked(edited) == ["the young man"]

    one = last(on.edit(edit, said(current=PRINCE, chat=edited["chat"]), ann))  # nothing is lost: nothing is asked
    assert not one["asking"]["visible"]


def test_settings_are_of_a_conversation_and_those_of_another_are_not_taken(
    on: Answering, pages: Pages, turns: Turns
) -> None:
    ann = browser()
    last(on.send(said(PRINCE, system="Be brief.", max_new_tokens=3), ann))
    shown = last(pages.open(ann, PRINCE))
    assert (shown["system"], shown["max_new_tokens"], shown["settings_of"]) == ("Be brief.", 3, PRINCE)
    stale = {**said("the letter", PRINCE), "settings_of": "another", "system": "of another", "max_new_tokens": 1}
    shown = last(on.send(stale, ann))
    assert (shown["system"], shown["max_new_tokens"]) == ("Be brief.", 3)
    records = pages.sessions(ann).open(PRINCE).records
    assert [record.generated for record in records if record is not None] == [3, 3]
    shown = last(on.send(said("the mother", PRINCE, max_new_tokens=5), ann))
    assert (shown["system"], shown["max_new_tokens"]) == ("", 5)
    assert last(pages.new(ann, ""))["max_new_tokens"] == turns.settings.max_new_tokens


def test_an_exported_conversation_is_imported_under_a_free_name_and_goes_on_from_its_kv(
    on: Answering, keeping: Keeping, pages: Pages
) -> None:
    ann, bob = browser("a"), browser("b")
    exported = last(on.send(said(PRINCE), ann))
    told = asyncio.run(keeping.export(ann, PRINCE))["download"]
    file = Path(told["value"])
    assert (told["visible"], file.name, file.stat().st_mode & 0o077) == (True, f"{PRINCE}.safetensors", 0)
    assert "wrong" in last(keeping.take_in(bob, str(_copied(file, b"no session")), ""))["note"]
    mine = last(keeping.take_in(ann, str(_copied(file)), ""))
    assert (mine["current"], mine["chat"]) == (f"{PRINCE} (2)", exported["chat"])
    uploaded = _copied(file)
    theirs = last(keeping.take_in(bob, str(uploaded), ""))
    assert (theirs["current"], theirs["chat"], uploaded.exists()) == (PRINCE, exported["chat"], False)
    last(on.send(said("and then", PRINCE), bob))
    record = pages.sessions(bob).open(PRINCE).records[-1]
    assert record is not None
    assert record.reused >= 12


def _copied(file: Path, content: bytes | None = None) -> Path:
    copy = file.parent / "uploaded" / file.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(file.read_bytes() if content is None else content)
    return copy
