"""What the page's events do. Each finds out who asks, and works in that user's namespace only.

Handlers are asynchronous: those that follow a turn only look at it now and then, and hold no thread meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

import gradio as gr

from ..chat.model import first_line
from ..errors import AttentionStoreError, SessionNotFoundError
from ..store import AttentionStore
from . import messages
from .identity import namespace_of
from .panel import conversation_panel, store_panel
from .restart import Restart
from .sessions import Conversation, Entry, UserSessions, shortened
from .turns import Running, Turns, Wish

logger = logging.getLogger("hf_attnstore")

LOOK_EVERY = 0.2
"""Seconds between two looks at a running turn: often enough to read along, seldom enough to cost nothing."""
MOST_PAGES = 10_000
LABEL_CHARACTERS = 21
"""Of a name in the list, so that it is on one line."""

T = TypeVar("T")
Update = dict[Any, Any]


@dataclass
class Parts:
    """The components of the page that handlers change."""

    current: gr.Textbox
    title: gr.HTML
    chat: gr.Chatbot
    note: gr.HTML
    box: gr.Textbox
    entries: gr.Radio
    search: gr.Textbox
    more: gr.HTML
    panel: gr.HTML
    store: gr.HTML
    rename_row: gr.Group
    new_name: gr.Textbox
    delete_row: gr.Group

    def all(self) -> list[Any]:
        return list(vars(self).values())


class Handlers:
    """The events of all pages."""

    def __init__(self, store: AttentionStore, turns: Turns, restart: Restart, parts: Parts) -> None:
        self.store = store
        self.turns = turns
        self.restart = restart
        self.parts = parts
        self._views: OrderedDict[str, int] = OrderedDict()

    # who asks, and what their page shows

    def _sessions(self, request: gr.Request) -> UserSessions:
        namespace = namespace_of(request.cookies, getattr(request, "username", None))
        return UserSessions(self.store.in_namespace(namespace))

    def _take_page(self, request: gr.Request) -> Callable[[], bool]:
        """From now on the page shows what the caller says, and no earlier handler of it says anything. Returns what
        tells whether that is still so."""
        page = str(request.session_hash)
        number = self._views.pop(page, 0) + 1
        self._views[page] = number
        while len(self._views) > MOST_PAGES:
            self._views.popitem(last=False)
        return lambda: self._views.get(page) == number

    def _listed(self, entries: tuple[list[Entry], int], current: str) -> Update:
        found, more = entries
        choices = [(f"{shortened(entry.name, LABEL_CHARACTERS)}\n{entry.details}", entry.name) for entry in found]
        value = current if any(entry.name == current for entry in found) else None
        said = f"and {more:,} more: search for them" if more else "" if found else "no conversation yet"
        return {
            self.parts.entries: gr.update(choices=choices, value=value),
            self.parts.more: f'<p class="nothing">{said}</p>' if said else "",
        }

    def _shown(self, conversation: Conversation | None) -> Update:
        name = conversation.name if conversation is not None else ""
        return {
            self.parts.current: name,
            self.parts.title: title(name),
            self.parts.chat: messages.shown(conversation.exchanges) if conversation is not None else [],
            self.parts.note: "",
            self.parts.panel: conversation_panel(conversation),
            self.parts.rename_row: gr.update(visible=False),
            self.parts.delete_row: gr.update(visible=False),
        }

    def _store_panel(self) -> Update:
        return {self.parts.store: store_panel(self.store.stats())}

    def _wrong(self, error: BaseException) -> Update:
        if not isinstance(error, AttentionStoreError):
            logger.error("the page asked for something that failed", exc_info=error)
        words = str(error) if isinstance(error, AttentionStoreError) else first_line(error)
        return {self.parts.note: note(words)}

    def _idle(self, text: str | None = None) -> Update:
        update: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
        if text is not None:
            update["value"] = text
        return {self.parts.box: gr.update(**update)}

    # opening

    async def open(self, request: gr.Request, name: str | None, search: str = "") -> AsyncIterator[Update]:
        """Shows a conversation, and follows the turn that runs on it; without a name, a new one."""
        mine = self._take_page(request)
        try:
            sessions = self._sessions(request)
            conversation, entries = await _thread(lambda: self._look(sessions, name or "", search))
        except Exception as error:
            yield {**self._shown(None), **self._wrong(error), **self._idle()}
            return
        if not mine():
            return
        update = {**self._shown(conversation), **self._listed(entries, name or ""), **self._idle()}
        if name and conversation is None:
            update |= {self.parts.note: note(f"there is no conversation {name!r}")}
        running = self.turns.running(sessions, name) if name else None
        if running is None:
            yield update
            if conversation is not None:
                await _thread(lambda: self.turns.expectations.expect(sessions.store, conversation.name))
            return
        del update[self.parts.chat]
        yield {**update, self.parts.current: running.name, self.parts.title: title(running.name), self.parts.note: ""}
        async for update in self._follow(sessions, running, mine, search):
            yield update

    @staticmethod
    def _look(sessions: UserSessions, name: str, search: str) -> tuple[Conversation | None, tuple[list[Entry], int]]:
        conversation = None
        if name:
            try:
                conversation = sessions.open(name)
            except SessionNotFoundError:
                conversation = None
        return conversation, sessions.entries(search)

    async def selected(self, event: gr.SelectData, search: str, request: gr.Request) -> AsyncIterator[Update]:
        async for update in self.open(request, str(event.value), search):
            yield update

    async def loaded(self, request: gr.Request, name: str | None) -> AsyncIterator[Update]:
        yield await _thread(self._store_panel)
        async for update in self.open(request, name):
            yield update

    async def searched(self, request: gr.Request, search: str, current: str) -> Update:
        try:
            sessions = self._sessions(request)
            return self._listed(await _thread(lambda: sessions.entries(search)), current)
        except Exception as error:
            return self._wrong(error)

    async def typing(self, request: gr.Request, current: str) -> None:
        """Somebody is about to send a message: the KV should be on its way."""
        if current:
            sessions = self._sessions(request)
            await _thread(lambda: self.turns.expectations.expect(sessions.store, current))

    async def tick(self) -> str:
        return store_panel(await _thread(self.store.stats))

    # turns

    async def send(
        self, request: gr.Request, text: str, current: str, without: bool, search: str
    ) -> AsyncIterator[Update]:
        text = (text or "").strip()
        if not text:
            return
        async for update in self._run(request, current, search, Wish("send", text, reuse=not without)):
            yield update

    async def retry(self, request: gr.Request, current: str, without: bool, search: str) -> AsyncIterator[Update]:
        async for update in self._run(request, current, search, Wish("retry", reuse=not without)):
            yield update

    async def edit(
        self, event: gr.EditData, shown: list[Any], current: str, without: bool, search: str, request: gr.Request
    ) -> AsyncIterator[Update]:
        wish = Wish("edit", str(event.value), messages.turn_at(shown, event.index), reuse=not without)
        async for update in self._run(request, current, search, wish):
            yield update

    async def _run(self, request: gr.Request, current: str, search: str, wish: Wish) -> AsyncIterator[Update]:
        mine = self._take_page(request)
        busy = {self.parts.box: gr.update(value="", submit_btn=False, stop_btn=True), self.parts.note: ""}
        if not self.turns.model.ready:
            yield {**busy, self.parts.note: note("the model is being loaded; the message is sent then", "waiting")}
        try:
            sessions = self._sessions(request)
            name = current or await _thread(lambda: sessions.free_name(wish.text))
            running = await _thread(lambda: self.turns.begin(sessions, name, wish))
        except Exception as error:
            yield {**self._wrong(error), **self._idle(wish.text)}
            return
        yield {**busy, self.parts.current: name, self.parts.title: title(name)}
        async for update in self._follow(sessions, running, mine, search):
            yield update

    async def _follow(
        self, sessions: UserSessions, running: Running, mine: Callable[[], bool], search: str
    ) -> AsyncIterator[Update]:
        busy: Update = {self.parts.box: gr.update(submit_btn=False, stop_btn=True)}
        before: Any = None
        while mine():
            done = running.done
            now = running.answer, running.turn.position
            if now != before:
                yield {self.parts.chat: messages.running(running.earlier, running.message, *now), **busy}
                before, busy = now, {}
            if done:
                break
            await asyncio.sleep(LOOK_EVERY)
        if not mine():
            return
        failure = running.failure()
        conversation, entries = await _thread(lambda: self._look(sessions, running.name, search))
        if not mine():
            return
        update = {**self._shown(conversation), **self._listed(entries, running.name)}
        if failure:
            update |= {self.parts.note: note(failure)}
        lost = failure and not running.answer and running.wish.kind == "send"
        yield {**update, **self._store_panel(), **self._idle(running.message if lost else None)}

    async def stop(self, request: gr.Request, current: str) -> None:
        running = self.turns.running(self._sessions(request), current) if current else None
        if running is not None:
            running.stop()

    async def undo(self, request: gr.Request, current: str, search: str) -> Update:
        self._take_page(request)
        try:
            sessions = self._sessions(request)
            message = await _thread(lambda: self.turns.undo(sessions, current))
            conversation, entries = await _thread(lambda: self._look(sessions, current, search))
        except Exception as error:
            return self._wrong(error)
        return {**self._shown(conversation), **self._listed(entries, current), **self._idle(message)}

    # looking after conversations

    async def new(self, request: gr.Request, search: str) -> AsyncIterator[Update]:
        async for update in self.open(request, None, search):
            yield update

    async def ask_name(self, request: gr.Request, current: str) -> Update:
        return {
            self.parts.rename_row: gr.update(visible=bool(current)),
            self.parts.delete_row: gr.update(visible=False),
            self.parts.new_name: current,
            self.parts.note: "" if current else note("open a conversation first"),
        }

    async def ask_delete(self, request: gr.Request, current: str) -> Update:
        return {
            self.parts.delete_row: gr.update(visible=bool(current)),
            self.parts.rename_row: gr.update(visible=False),
            self.parts.note: "" if current else note("open a conversation first"),
        }

    async def rename(self, request: gr.Request, current: str, name: str, search: str) -> AsyncIterator[Update]:
        async for update in self._change(request, current, search, lambda sessions: sessions.rename(current, name)):
            yield update

    async def fork(self, request: gr.Request, current: str, search: str) -> AsyncIterator[Update]:
        async for update in self._change(request, current, search, lambda sessions: sessions.fork(current)):
            yield update

    async def delete(self, request: gr.Request, current: str, search: str) -> AsyncIterator[Update]:
        async for update in self._change(request, current, search, lambda sessions: sessions.delete(current)):
            yield update

    async def _change(
        self, request: gr.Request, current: str, search: str, change: Callable[[UserSessions], str | None]
    ) -> AsyncIterator[Update]:
        """Changes a conversation that nothing runs on, and opens what `change` returns."""

        def work(sessions: UserSessions) -> str | None:
            with self.turns.untouched(sessions, current):
                return change(sessions)

        if not current:
            yield {self.parts.note: note("open a conversation first")}
            return
        try:
            sessions = self._sessions(request)
            name = await _thread(lambda: work(sessions))
        except Exception as error:
            yield self._wrong(error)
            return
        async for update in self.open(request, name, search):
            yield update

    async def arm_restart(self, request: gr.Request) -> tuple[str, str]:
        """Returns the ticket for the page that sees the process off, and what to say if there is none."""
        try:
            self._sessions(request)
            return self.restart.ticket(), ""
        except AttentionStoreError as error:
            return "", note(str(error))


def title(name: str) -> str:
    return f"<h2>{escape(name)}</h2>" if name else "<h2>New conversation</h2>"


def note(words: str, kind: str = "wrong") -> str:
    return f'<p class="note {kind}" role="alert">{escape(words)}</p>'


async def _thread(call: Callable[[], T]) -> T:
    return await asyncio.to_thread(call)
