"""The page's events that have something answered, or take it back."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import gradio as gr

from . import messages
from .pages import Pages, remember, thread
from .sessions import UserSessions
from .turns import Running, Wish
from .view import Asked, Update, title

LATE = 5.0
"""Seconds that a message is waited for by those that were sent after it."""

Data = Mapping[Any, Any]
"""What the page says, by component; see `Parts.asked`."""


class Answering:
    """Events of all pages that begin, stop and take back turns."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.turns, self.view, self.parts = pages.turns, pages.view, pages.parts
        self._named: OrderedDict[tuple[str, str, str], str] = OrderedDict()
        """The names of conversations that began on a page: by namespace, page, and what that called it."""
        self._next: OrderedDict[tuple[str, str], int] = OrderedDict()
        """The number of the next message, by namespace and page."""
        self._one_by_one = ThreadPoolExecutor(1, "attnstore-begin")
        """Begins turns: no two find the same name free."""

    async def send(self, data: Data, request: gr.Request) -> AsyncIterator[Update]:
        number, _, text = str(data[self.parts.sent] or "").partition(" ")
        if text.strip() and number.isdigit():
            async for update in self._run(request, self._asked(data), Wish("send", text.strip()), int(number)):
                yield update

    async def retry(self, data: Data, request: gr.Request) -> AsyncIterator[Update]:
        async for update in self._run(request, self._asked(data), Wish("retry")):
            yield update

    async def go_on(self, data: Data, request: gr.Request) -> AsyncIterator[Update]:
        async for update in self._run(request, self._asked(data), Wish("go_on")):
            yield update

    async def edit(self, event: gr.EditData, data: Data, request: gr.Request) -> AsyncIterator[Update]:
        """Says something else in place of a message; asks first if later ones would go."""
        shown, asked = data[self.parts.chat], self._asked(data)
        turn, text = messages.turn_at(shown, event.index), str(event.value)
        later = messages.turn_at(shown, len(shown)) - turn - 1
        if later <= 0:
            async for update in self._run(request, asked, Wish("edit", text, turn)):
                yield update
            return
        async for update in self.pages.open(request, asked.current, asked.search):
            yield {
                **update,
                self.parts.edited: (asked.current, turn, text),
                self.parts.question: messages.question(later),
                self.parts.asking: gr.update(visible=True),
            }

    async def edit_now(self, data: Data, request: gr.Request) -> AsyncIterator[Update]:
        """The edit that was asked about. What came after it is dropped."""
        asked = self._asked(data)
        name, turn, text = data[self.parts.edited] or ("", 0, "")
        if name != asked.current:
            yield self.view.nothing_asked()
            return
        async for update in self._run(request, asked, Wish("edit", text, turn)):
            yield update

    async def edit_copy(self, data: Data, request: gr.Request) -> AsyncIterator[Update]:
        """The edit that was asked about, in a copy: the conversation stays as it is."""
        asked = self._asked(data)
        name, turn, text = data[self.parts.edited] or ("", 0, "")
        try:
            sessions = self.pages.sessions(request)
            with self.turns.untouched(sessions, name):
                copy = await thread(lambda: sessions.fork(name))
        except Exception as error:
            yield {**self.view.nothing_asked(), **self.view.wrong(error)}
            return
        async for update in self._run(request, replace(asked, current=copy), Wish("edit", text, turn)):
            yield update

    async def undo(self, request: gr.Request, current: str, search: str) -> Update:
        self.pages.take(request)
        try:
            sessions = self.pages.sessions(request)
            message = await thread(lambda: self.turns.undo(sessions, current))
            conversation = await thread(lambda: sessions.open(current))
            listed = await self.pages.listed(request, search, current)
        except Exception as error:
            return self.view.wrong(error)
        return {**self.view.conversation(conversation), **listed, **self.view.idle(message)}

    async def stop(self, request: gr.Request, current: str) -> None:
        if current:
            sessions = self.pages.sessions(request)
            await thread(lambda: self.turns.stop(sessions, current))

    def _asked(self, data: Data) -> Asked:
        return Asked.of(self.parts, data, self.turns.settings)

    async def _run(
        self, request: gr.Request, asked: Asked, wish: Wish, number: int | None = None
    ) -> AsyncIterator[Update]:
        mine = self.pages.take(request)
        wish = replace(wish, reuse=not asked.without, settings=asked.settings)
        quiet = {**self.view.nothing_asked(), **self.view.busy()}
        if not self.turns.model.ready:
            yield {**quiet, **self.view.said("the model is being loaded; the message is sent then", "waiting")}
        try:
            sessions = self.pages.sessions(request)
            page = sessions.store.namespace, str(request.session_hash), asked.draft
            running = await self._begun(page[:2], number, lambda: self._begin(sessions, page, asked.current, wish))
        except Exception as error:
            yield {**self.view.wrong(error), **self.view.idle(wish.text if wish.kind == "send" else None)}
            return
        name = running.name
        if not mine():
            return
        yield {**quiet, self.parts.current: name, self.parts.title: title(name), self.parts.settings_of: name}
        listed = await self.pages.listed(request, asked.search, name)
        if mine():
            yield listed
        async for update in self.pages.follow(request, sessions, [running], mine, asked.search):
            yield update

    def _begin(self, sessions: UserSessions, page: tuple[str, str, str], current: str, wish: Wish) -> Running:
        """Begins a turn; the name of a new conversation is made of its first message."""
        name = current or self._named.get(page) or self._free_name(sessions, wish.text)
        running = self.turns.begin(sessions, name, wish)
        if not current:
            remember(self._named, page, name)
        return running

    def _free_name(self, sessions: UserSessions, text: str) -> str:
        return sessions.free_name(text, self.turns.states(sessions))

    async def _begun(self, page: tuple[str, str], number: int | None, begin: Callable[[], Running]) -> Running:
        """What `begin` returns, once the messages of the page with lower numbers were begun."""
        deadline = time.monotonic() + LATE
        while number is not None and self._next.get(page, 0) < number and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._one_by_one, begin)
        finally:
            if number is not None:
                remember(self._next, page, max(number + 1, self._next.get(page, 0)))
