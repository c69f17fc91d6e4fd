"""Pages that are open: who asks, which conversation a page shows, and what comes to it while that is answered.

Handlers are asynchronous: those that follow a turn only look at it now and then, and hold no thread meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import gradio as gr

from ..errors import SessionNotFoundError
from ..store import AttentionStore
from . import messages
from .identity import namespace_of
from .panel import store_panel
from .sessions import Conversation, Entry, UserSessions
from .turns import Running, Turns
from .view import Update, View, title

LOOK_EVERY = 0.2
"""Seconds between two looks at a running turn: often enough to read along, seldom enough to cost nothing."""
MOST_PAGES = 10_000

K = TypeVar("K")
T = TypeVar("T")


class Pages:
    """The open pages of all users."""

    def __init__(self, store: AttentionStore, turns: Turns, view: View) -> None:
        self.store = store
        self.turns = turns
        self.view = view
        self.parts = view.parts
        self._views: OrderedDict[str, int] = OrderedDict()
        self._states: OrderedDict[str, dict[str, str]] = OrderedDict()
        """What was running when a page's list was last made."""

    def sessions(self, request: gr.Request) -> UserSessions:
        """Those of who asks. Raises `NoIdentityError`."""
        namespace = namespace_of(request.cookies, getattr(request, "username", None))
        return UserSessions(self.store.in_namespace(namespace))

    def take(self, request: gr.Request) -> Callable[[], bool]:
        """From now on the page shows what the caller says, and no earlier handler of it says anything. Returns what
        tells whether that is still so."""
        page = str(request.session_hash)
        number = self._views.get(page, 0) + 1
        remember(self._views, page, number)
        return lambda: self._views.get(page) == number

    async def open(self, request: gr.Request, name: str | None, search: str = "") -> AsyncIterator[Update]:
        """Shows a conversation, and follows the turns that run on it; without a name, a new one."""
        mine = self.take(request)
        try:
            sessions = self.sessions(request)
            conversation, entries = await thread(lambda: self.look(sessions, name or "", search))
        except Exception as error:
            yield {**self.view.conversation(None), **self.view.wrong(error), **self.view.idle()}
            return
        if not mine():
            return
        update = {
            **self.view.conversation(conversation),
            **self._listed(request, sessions, entries, name or ""),
            **self.view.idle(),
        }
        running = self.turns.running(sessions, name) if name else ()
        if name and running:
            del update[self.parts.chat]
            yield {**update, self.parts.current: name, self.parts.title: title(name)}
            async for update in self.follow(request, sessions, running, mine, search):
                yield update
            return
        if name and conversation is None:
            update |= self.view.said(f"there is no conversation {name!r}")
        yield update
        if conversation is not None:
            await thread(lambda: self.turns.expectations.expect(sessions.store, conversation.name))

    async def follow(
        self,
        request: gr.Request,
        sessions: UserSessions,
        running: Sequence[Running],
        mine: Callable[[], bool],
        search: str,
    ) -> AsyncIterator[Update]:
        """What the page shows until nothing of a conversation is being answered any more, and then. `running` are turns
        of it that were, a moment ago."""
        name, seen = running[0].name, list(running)
        before: Any = None
        busy = self.view.busy()
        while mine():
            turns = self.turns.running(sessions, name)
            seen += [turn for turn in turns if turn not in seen]
            if not turns:
                break
            now = len(turns), turns[0], turns[0].answer, messages.progress(turns[0])
            if now != before and turns[0].earlier is not None:
                yield {self.parts.chat: messages.running(turns), **busy}
                before, busy = now, {}
            await asyncio.sleep(LOOK_EVERY)
        if not mine():
            return
        conversation, entries = await thread(lambda: self.look(sessions, name, search))
        if not mine():
            return
        seen.sort(key=lambda turn: turn.when)
        failures = [failure for turn in seen if (failure := turn.failure())]
        shown = self.view.conversation(conversation)
        if conversation is None:  # its first message has no answer: it goes on being a new one, as it was set up
            shown = {part: value for part, value in shown.items() if part not in self.parts.settings().values()}
        yield {
            **shown,
            **self._listed(request, sessions, entries, name),
            **(self.view.said(failures[0]) if failures else {}),
            **await self.numbers(),
            **self.view.idle("\n\n".join(turn.lost for turn in seen if turn.lost)),
        }

    def look(self, sessions: UserSessions, name: str, search: str) -> tuple[Conversation | None, LookedUp]:
        """A conversation, None if it is not there, and the list."""
        conversation = None
        if name:
            try:
                conversation = sessions.open(name)
            except SessionNotFoundError:
                conversation = None
        return conversation, sessions.entries(search)

    async def listed(self, request: gr.Request, search: str, current: str) -> Update:
        """The list, anew."""
        sessions = self.sessions(request)
        return self._listed(request, sessions, await thread(lambda: sessions.entries(search)), current)

    async def numbers(self) -> Update:
        """The store's."""
        return {self.parts.numbers: store_panel(await thread(self.store.stats))}

    # events

    async def loaded(self, request: gr.Request, name: str | None) -> AsyncIterator[Update]:
        yield await self.numbers()
        async for update in self.open(request, name):
            yield update

    async def selected(self, event: gr.SelectData, search: str, request: gr.Request) -> AsyncIterator[Update]:
        async for update in self.open(request, str(event.value), search):
            yield update

    async def new(self, request: gr.Request, search: str) -> AsyncIterator[Update]:
        async for update in self.open(request, None, search):
            yield update

    async def searched(self, request: gr.Request, search: str, current: str) -> Update:
        try:
            return await self.listed(request, search, current)
        except Exception as error:
            return self.view.wrong(error)

    async def typing(self, request: gr.Request, current: str) -> None:
        """Somebody is about to send a message: the KV should be on its way."""
        if current:
            sessions = self.sessions(request)
            await thread(lambda: self.turns.expectations.expect(sessions.store, current))

    async def tick(self, request: gr.Request, search: str, current: str) -> Update:
        """The store's numbers; and the list, if something runs or waits now that did not, or the other way round."""
        update = await self.numbers()
        try:
            states = self.turns.states(self.sessions(request))
            if states != self._states.get(str(request.session_hash), {}):
                update |= await self.listed(request, search, current)
        except Exception:  # who may not ask is told when they do something
            return update
        return update

    def _listed(self, request: gr.Request, sessions: UserSessions, entries: LookedUp, current: str) -> Update:
        """The list, in which what is being answered is marked; a conversation that is not kept yet comes first."""
        states = self.turns.states(sessions)
        remember(self._states, str(request.session_hash), states)
        found, more = entries
        marked = [
            replace(entry, details=f"{states[entry.name]} · {entry.details}") if entry.name in states else entry
            for entry in found
        ]
        new = [Entry(name, state) for name, state in states.items() if not sessions.exists(name)]
        return self.view.entries([*new, *marked], more, current)


LookedUp = tuple[list[Entry], int]
"""Conversations to list, and how many more there are."""


def remember(kept: OrderedDict[K, T], page: K, value: T) -> None:
    """Keeps something of a page, and forgets what is of the pages that did nothing for longest."""
    kept.pop(page, None)
    kept[page] = value
    while len(kept) > MOST_PAGES:
        kept.popitem(last=False)


async def thread(call: Callable[[], T]) -> T:
    """What a call gives that may wait for the disk."""
    return await asyncio.to_thread(call)
