"""The conversations of one user: listed, searched, opened, renamed, copied, deleted. No model is needed for any of it.

Everything here works on a store in that user's namespace, so a name of somebody else's conversation is no name at all.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat.session import METADATA_KEY, annotation_in
from ..errors import AttentionStoreError, SessionNotFoundError
from ..sizes import format_bytes
from ..store import AttentionStore, SessionInfo
from .records import TIMELINE, TURNS, TurnRecord, from_json
from .settings import SETTINGS, Settings

MOST_LISTED = 50
MOST_SEARCHED = 300
"""How many conversations, last used first, are searched for what was said in them."""
MOST_NAME_CHARACTERS = 60
EXPORTED = ".safetensors"


@dataclass(frozen=True)
class Exchange:
    """A message, its answer, and what is known of the turn."""

    message: str
    answer: str
    thinking: str = ""
    record: TurnRecord | None = None


@dataclass(frozen=True)
class Conversation:
    """A conversation as it is shown."""

    name: str
    exchanges: tuple[Exchange, ...] = ()
    timeline: tuple[tuple[str, str, float, float], ...] = ()
    """Of the last turn: track, name, begin and end in seconds."""
    system: str = ""
    settings: Any = None
    """As they are kept with it; None where none are."""

    @property
    def records(self) -> list[TurnRecord | None]:
        return [exchange.record for exchange in self.exchanges]


@dataclass(frozen=True)
class Entry:
    """A line of the list."""

    name: str
    details: str


class UserSessions:
    """What one user has.

    Args:
        store: in the user's namespace.
    """

    def __init__(self, store: AttentionStore) -> None:
        self.store = store

    def entries(self, search: str = "") -> tuple[list[Entry], int]:
        """The conversations to list, last used first, and how many more there are.

        Args:
            search: words; a conversation is listed if each of them is in its name or in what was said.
        """
        words = search.casefold().split()
        found = self.store.sessions()
        if words:
            found = [info for number, info in enumerate(found) if self._has(info, words, deep=number < MOST_SEARCHED)]
        return [self._entry(info) for info in found[:MOST_LISTED]], max(0, len(found) - MOST_LISTED)

    def _has(self, info: SessionInfo, words: Sequence[str], *, deep: bool) -> bool:
        text = info.name.casefold()
        if all(word in text for word in words) or not deep:
            return all(word in text for word in words)
        text += " " + " ".join(str(m.get("content", "")) for m in self._messages(self._metadata(info.name))).casefold()
        return all(word in text for word in words)

    def _entry(self, info: SessionInfo) -> Entry:
        parts = [
            f"{info.length or info.tokens:,} tokens",
            format_bytes(info.bytes),
            self._tier(info),
            ago(info.last_used),
        ]
        return Entry(info.name, " · ".join(part for part in parts if part))

    def _tier(self, info: SessionInfo) -> str:
        try:
            places = self.store.residence(info.name)
        except SessionNotFoundError:  # deleted meanwhile
            return ""
        memory, disk = places.get("memory", 0), places.get("disk", 0)
        if not memory:
            return "disk" if disk else ""
        return "memory" if memory >= 0.9 * info.bytes else "disk, partly memory"

    def exists(self, name: str) -> bool:
        try:
            self.store.session(name)
        except AttentionStoreError:
            return False
        return True

    def open(self, name: str) -> Conversation:
        """Raises:
        SessionNotFoundError: this user has no conversation of that name.
        """
        metadata = self.store.metadata(name)
        pairs: list[Exchange] = []
        question = ""
        for message in self._messages(metadata):
            if message.get("role") == "user":
                question = str(message.get("content", ""))
            elif message.get("role") == "assistant":
                pairs.append(Exchange(question, str(message.get("content", "")), str(message.get("thinking", ""))))
        records = from_json(annotation_in(metadata, TURNS), len(pairs))
        kept = annotation_in(metadata, TIMELINE)
        timeline = tuple((str(t), str(n), float(b), float(e)) for t, n, b, e in kept) if isinstance(kept, list) else ()
        exchanges = (
            Exchange(pair.message, pair.answer, pair.thinking, record)
            for pair, record in zip(pairs, records, strict=True)
        )
        first = next(iter(self._messages(metadata)), {})
        system = str(first.get("content", "")) if first.get("role") == "system" else ""
        return Conversation(name, tuple(exchanges), timeline, system, annotation_in(metadata, SETTINGS))

    def settings(self, name: str, default: Settings) -> Settings:
        """Those of a conversation; `default` for one that is new or has none."""
        try:
            return settings_of(self.open(name), default)
        except SessionNotFoundError:
            return default

    def rename(self, name: str, new: str) -> str:
        """Returns the new name. Raises what `AttentionStore.rename` does."""
        new = _tidy(new)
        if not new:
            raise AttentionStoreError("a conversation needs a name")
        if new != name:
            self.store.rename(name, new)
        return new

    def fork(self, name: str) -> str:
        """Copies a conversation, whose KV both then share, and returns the copy's name."""
        copy = self.free_name(f"{name}, copy")
        self.store.fork(name, copy)
        return copy

    def export(self, name: str, folder: Path) -> Path:
        """Writes a conversation, with its KV, into a file in `folder`.

        Raises what `AttentionStore.export_session` does.
        """
        file = folder / (re.sub(r"[^\w .,()-]+", "_", name).strip(" .")[:80] + EXPORTED)
        self.store.export_session(name, file)
        return file

    def take_in(self, file: Path) -> str:
        """Imports a file that `export` wrote, under its name or one like it, and returns that.

        Raises what `AttentionStore.import_session` does.
        """
        name = self.free_name(file.name.removesuffix(EXPORTED))
        self.store.import_session(file, name)
        return name

    def delete(self, name: str) -> None:
        """Raises what `AttentionStore.delete` does."""
        self.store.delete(name)

    def free_name(self, text: str, taken: Collection[str] = ()) -> str:
        """A name for a conversation that begins with `text`, none of those `taken`."""
        words = _tidy(text)
        name = shortened(words, MOST_NAME_CHARACTERS) or "conversation"
        number, found = 1, name
        while found in taken or self.exists(found):
            number += 1
            found = f"{name} ({number})"
        return found

    def _metadata(self, name: str) -> dict[str, Any]:
        try:
            return self.store.metadata(name)
        except SessionNotFoundError:
            return {}

    @staticmethod
    def _messages(metadata: dict[str, Any]) -> list[dict[str, Any]]:
        saved = metadata.get(METADATA_KEY)
        messages = saved.get("messages") if isinstance(saved, dict) else None
        return [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []


def settings_of(conversation: Conversation, default: Settings) -> Settings:
    """How a conversation is answered; its system message is the one that it has."""
    kept = conversation.settings if isinstance(conversation.settings, dict) else {}
    system = conversation.system if conversation.exchanges else default.system
    return Settings.of({**kept, "system": system}, default)


def _tidy(name: str) -> str:
    """A name on one line, without what is not shown."""
    return "".join(c for c in " ".join(name.split()) if c.isprintable())[:200]


def shortened(text: str, most: int) -> str:
    """At most so many characters of a text, with a mark where it was cut."""
    return text if len(text) <= most else text[: most - 1].rstrip(" ,.") + "…"


def ago(moment: float, now: float | None = None) -> str:
    """How long ago a time (seconds since the epoch) is, in words."""
    seconds = (time.time() if now is None else now) - moment
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // size)
        if count >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
