"""What a page shows, as updates of its components: no events, no turns begun, nothing kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any

import gradio as gr

from ..chat.model import first_line
from ..errors import AttentionStoreError
from . import messages
from .panel import conversation_panel
from .sessions import Conversation, Entry, settings_of, shortened
from .settings import Settings

logger = logging.getLogger("hf_attnstore")

LABEL_CHARACTERS = 21
"""Of a name in the list, so that it is on one line."""

Update = dict[Any, Any]


@dataclass(frozen=True)
class Parts:
    """The components of the page that handlers read and change."""

    sent: gr.Textbox
    """The message that is on its way: its number on this page, counted from 0, a space, and what it says."""
    current: gr.Textbox
    """The name of the conversation that is open; empty for a new one."""
    draft: gr.Textbox
    """What the page calls a new conversation until that has a name."""
    title: gr.HTML
    chat: gr.Chatbot
    note: gr.HTML
    go_on: gr.Button
    asking: gr.Group
    """Asks what is to become of the turns after an edited message."""
    question: gr.HTML
    edited: gr.State
    """The conversation, turn and text of that edit."""
    box: gr.Textbox
    entries: gr.Radio
    search: gr.Textbox
    more: gr.HTML
    panel: gr.HTML
    numbers: gr.HTML
    without: gr.Checkbox
    rename_row: gr.Group
    new_name: gr.Textbox
    delete_row: gr.Group
    download: gr.DownloadButton
    settings_of: gr.Textbox
    """Of which conversation the settings are."""
    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    max_new_tokens: gr.Number

    def settings(self) -> dict[str, Any]:
        """The components of the settings, by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Settings)}

    def asked(self) -> set[Any]:
        """What events that begin a turn are told."""
        return {self.current, self.draft, self.search, self.without, self.settings_of, *self.settings().values()}

    def shown(self) -> list[Any]:
        """What may change when a conversation does."""
        asked_only = (self.sent, self.draft, self.search, self.without)
        return [part for part in vars(self).values() if all(part is not other for other in asked_only)]


@dataclass(frozen=True)
class Asked:
    """What a page says when it asks for a turn."""

    current: str
    draft: str
    search: str
    without: bool
    settings: Settings | None
    """None where the page shows those of another conversation still."""

    @classmethod
    def of(cls, parts: Parts, data: Mapping[Any, Any], default: Settings) -> Asked:
        current = str(data[parts.current] or "")
        values = {name: data[part] for name, part in parts.settings().items()}
        fits = data[parts.settings_of] == current
        return cls(
            current,
            str(data[parts.draft] or "")[:100],
            str(data[parts.search] or ""),
            bool(data[parts.without]),
            Settings.of(values, default) if fits else None,
        )


class View:
    """Updates of a page. `settings` are those of conversations that have none."""

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.parts = parts
        self.settings = settings

    def conversation(self, conversation: Conversation | None) -> Update:
        """All that is shown of a conversation, or of a new one."""
        name = conversation.name if conversation is not None else ""
        settings = settings_of(conversation, self.settings) if conversation is not None else self.settings
        records = conversation.records if conversation is not None else []
        cut = bool(records) and records[-1] is not None and records[-1].cut
        return {
            self.parts.current: name,
            self.parts.title: title(name),
            self.parts.chat: messages.shown(conversation.exchanges) if conversation is not None else [],
            self.parts.panel: conversation_panel(conversation),
            self.parts.go_on: gr.update(visible=cut),
            self.parts.settings_of: name,
            **{part: getattr(settings, name) for name, part in self.parts.settings().items()},
            **self.nothing_asked(),
        }

    def nothing_asked(self) -> Update:
        """No note, and no question that is open."""
        hidden = gr.update(visible=False)
        rows = (self.parts.asking, self.parts.rename_row, self.parts.delete_row, self.parts.download)
        return {self.parts.note: "", self.parts.edited: None, **dict.fromkeys(rows, hidden)}

    def entries(self, found: Sequence[Entry], more: int, current: str) -> Update:
        choices = [(f"{shortened(entry.name, LABEL_CHARACTERS)}\n{entry.details}", entry.name) for entry in found]
        value = current if any(entry.name == current for entry in found) else None
        said = f"and {more:,} more: search for them" if more else "" if found else "no conversation yet"
        return {
            self.parts.entries: gr.update(choices=choices, value=value),
            self.parts.more: f'<p class="nothing">{said}</p>' if said else "",
        }

    def busy(self) -> Update:
        """An answer is on its way. What is written meanwhile stays in the box."""
        return {
            self.parts.box: gr.update(submit_btn=False, stop_btn=True),
            self.parts.go_on: gr.update(visible=False),
        }

    def idle(self, text: str | None = None) -> Update:
        """Nothing is being answered; `text` is put into the box."""
        update: dict[str, Any] = {"submit_btn": True, "stop_btn": False, **({"value": text} if text else {})}
        return {self.parts.box: gr.update(**update)}

    def said(self, words: str, kind: str = "wrong") -> Update:
        return {self.parts.note: note(words, kind)}

    def wrong(self, error: BaseException) -> Update:
        if not isinstance(error, AttentionStoreError):
            logger.error("the page asked for something that failed", exc_info=error)
        return self.said(str(error) if isinstance(error, AttentionStoreError) else first_line(error))


def title(name: str) -> str:
    return f"<h1>{escape(name)}</h1>" if name else "<h1>New conversation</h1>"


def note(words: str, kind: str = "wrong") -> str:
    return f'<p class="note {kind}" role="alert">{escape(words)}</p>'
