"""The page's events that look after conversations: rename, copy, delete, export, import, restart."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import gradio as gr

from ..errors import AttentionStoreError
from ..sizes import format_bytes
from .pages import Pages, thread
from .restart import Restart
from .sessions import UserSessions
from .view import Update, note

NONE_OPEN = "open a conversation first"


class Keeping:
    """Events of all pages that change conversations as a whole."""

    def __init__(self, pages: Pages, restart: Restart) -> None:
        self.pages = pages
        self.restart = restart
        self.view, self.parts = pages.view, pages.parts

    async def ask_name(self, current: str) -> Update:
        return {**self._asking(current, self.parts.rename_row), self.parts.new_name: current}

    async def ask_delete(self, current: str) -> Update:
        return self._asking(current, self.parts.delete_row)

    def _asking(self, current: str, row: gr.Group) -> Update:
        shown = {**self.view.nothing_asked(), row: gr.update(visible=bool(current))}
        return shown if current else {**shown, **self.view.said(NONE_OPEN)}

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
        if not current:
            yield self.view.said(NONE_OPEN)
            return
        try:
            sessions = self.pages.sessions(request)
            name = await thread(lambda: self._untouched(sessions, current, change))
        except Exception as error:
            yield self.view.wrong(error)
            return
        async for update in self.pages.open(request, name, search):
            yield update

    def _untouched(self, sessions: UserSessions, name: str, change: Callable[[UserSessions], str | None]) -> str | None:
        with self.pages.turns.untouched(sessions, name):
            return change(sessions)

    async def export(self, request: gr.Request, current: str) -> Update:
        """Writes the conversation into a file that can be downloaded for a while."""
        if not current:
            return self.view.said(NONE_OPEN)
        # where Gradio serves files from; the folder's name can't be guessed, and Gradio deletes it some time later
        folder = Path(self.parts.download.GRADIO_CACHE) / secrets.token_hex(32)
        try:
            sessions = self.pages.sessions(request)
            folder.mkdir(mode=0o700, parents=True)
            file = await thread(lambda: sessions.export(current, folder))
        except Exception as error:
            return self.view.wrong(error)
        label = f"Download ({format_bytes(file.stat().st_size)})"
        return {
            **self.view.nothing_asked(),
            self.parts.download: gr.update(value=str(file), label=label, visible=True),
        }

    async def take_in(self, request: gr.Request, uploaded: str | None, search: str) -> AsyncIterator[Update]:
        """Imports what was uploaded."""
        if not uploaded:
            return
        file = Path(uploaded)
        try:
            sessions = self.pages.sessions(request)
            name = await thread(lambda: sessions.take_in(file))
        except Exception as error:
            yield self.view.wrong(error)
            return
        finally:
            file.unlink(missing_ok=True)
        async for update in self.pages.open(request, name, search):
            yield update

    async def arm_restart(self, request: gr.Request) -> tuple[str, str]:
        """Returns the ticket for the page that sees the process off, and what to say if there is none."""
        try:
            self.pages.sessions(request)
            return self.restart.ticket(), ""
        except AttentionStoreError as error:
            return "", note(str(error))
