"""Sessions that machines share: the record of each under its name, replaced only by who has seen the one before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal

from ...errors import LoadError
from ..blocks.keys import name_digest
from ..records.manifest import Manifest
from ..records.session_record import SessionRecord, decode_record, encode_record
from .deadline import Deadline
from .engine import TAG_BYTES, EngineError
from .tier import SharedTier

Session = tuple[str, str]
"""Namespace and name."""


class SharedSessions:
    """The records that an engine keeps, for one store. Nothing here raises for want of an engine."""

    def __init__(self, tier: SharedTier) -> None:
        self._tier = tier
        self._tags: dict[Session, bytes] = {}
        """Of the record that this machine has taken in or published last."""
        self._usable: bool | None = None

    def _names(self, session: Session) -> tuple[str, str, bytes]:
        """Of a session's record, of the list that it is in, and its member there."""
        secret = self._tier.vault.secret
        member = name_digest("shared", *session, secret=secret)
        space = name_digest("space", session[0], secret=secret)
        return f"{self._tier.prefix}:s:{member.hex()}", f"{self._tier.prefix}:n:{space.hex()}", member

    def _can(self) -> bool:
        """Whether the engine really compares before it sets; tried once, as some say that they do and do not."""
        tier = self._tier
        if not tier.breaker.well or self._usable is not None:
            return tier.breaker.well and bool(self._usable)
        name, one, two = f"{tier.prefix}:try:{os.urandom(8).hex()}", os.urandom(TAG_BYTES), os.urandom(TAG_BYTES)

        def swap(old: bytes, new: bytes) -> bool:
            return tier.engine.replace(name, old, new, f"{name}:list", b"m", b"e", Deadline(tier.timeout))

        with suppress(EngineError), tier.asking():
            self._usable = swap(b"", one) and not swap(b"", two) and not swap(two, two) and swap(one, two)
            tier.engine.delete([name, f"{name}:list"], Deadline(tier.timeout))
        if self._usable is False:
            tier.warn(
                "shared sessions", f"{tier.url} can't compare and set: blocks are shared, names of sessions are not"
            )
        return bool(self._usable)

    # reading

    def news(self, session: Session, last_used: Callable[[], float | None]) -> SessionRecord | Literal[False] | None:
        """The record of a session, if it is another than this machine knows; False if it was deleted; None if there is
        nothing new, or nobody knows.

        Args:
            last_used: when the session was last used here. A process that has just begun does not know which of both
                came after the other, and goes by that.
        """
        if not self._can():
            return None
        name = self._names(session)[0]
        with suppress(EngineError, LoadError), self._tier.asking():
            value = self._tier.engine.value(name, Deadline(self._tier.lookup))
            tag, encoded = value[:TAG_BYTES], value[TAG_BYTES:]
            if not tag or tag == self._tags.get(session):
                return None
            record = decode_record(encoded, self._tier.vault) if encoded else None
            if record is not None and (record.namespace, record.name) != session:
                return None
            known = session in self._tags
            self._tags[session] = tag
            if record is None:
                return False
            here = last_used() if not known else None
            return record if here is None or here <= record.last_used else None
        return None

    def changed(self, namespace: str) -> list[str]:
        """The names of the sessions of a namespace of which there may be `news`."""
        if not self._can():
            return []
        found: list[str] = []
        with suppress(EngineError), self._tier.asking():
            listed = self._tier.engine.noted([self._names((namespace, ""))[1]], Deadline(self._tier.timeout))[0]
            for sealed in listed.values():
                with suppress(LoadError, ValueError):
                    space, name, tag = json.loads(self._tier.vault.unseal(sealed))
                    if space == namespace and self._tags.get((space, name), b"").hex() != tag:
                        found.append(name)
        return found

    # writing, behind the turn

    def publish(self, session: Session, record: Callable[[], SessionRecord | None], done: Callable[[], None]) -> None:
        """Has a session's record go up after all blocks that were handed over before, those of it included.

        Args:
            record: what it is by then; None for one that is deleted.
            done: called when it is known by all, or that it will not be.
        """
        self._tier.behind(partial(self._publish, session, record, done))

    def _publish(self, session: Session, record: Callable[[], SessionRecord | None], done: Callable[[], None]) -> None:
        try:
            if not self._can():
                return
            found = record()
            if found is not None:
                self._tier.complete([span.block for span in found.manifest.spans if span.block])
            name, listed, member = self._names(session)
            tag, old = os.urandom(TAG_BYTES), self._tags.get(session, b"")
            value = tag + (encode_record(found, self._tier.vault) if found is not None else b"")
            entry = self._tier.vault.seal(json.dumps([*session, tag.hex()]).encode())
            with self._tier.asking():
                swap = self._tier.engine.replace
                published = swap(name, old, value, listed, member, entry, Deadline(self._tier.timeout))
            if published:
                self._tags[session] = tag
            else:
                self._tier.warn(
                    f"shared session {session}",
                    f"session {session[1]!r} was continued on another machine meanwhile, which keeps its name; what "
                    "was computed here is still found by its text",
                )
        except (EngineError, LoadError):
            return
        finally:
            done()


def as_record(record: SessionRecord, manifest: Manifest) -> SessionRecord:
    """A session's record with a manifest that may be of more blocks than the index has."""
    if len(record.manifest.spans) >= len(manifest.spans):
        return record
    counts = tuple(span.stop if span.block else 0 for span in manifest.spans)
    return replace(record, manifest=replace(manifest, beside=()), counts=counts)
