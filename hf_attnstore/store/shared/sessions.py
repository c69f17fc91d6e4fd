"""Sessions that machines share: the record of each under its name, replaced only by who has seen the one before."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from ...errors import LoadError
from ..blocks.keys import name_digest
from ..records.manifest import Manifest
from ..records.session_record import SessionRecord, decode_record, encode_record
from .deadline import Deadline
from .engine import TAG_BYTES, EngineError
from .leases import Head, Leases, Session, body_of
from .tier import SharedTier

GONE = b"-"
"""With which the record of a deleted session begins, and its time follows: others have to learn of it."""

NOTHING = bytes(16)
"""The tag of no record."""
_WHOLE, _PART = b"w", b"p"


class Seen:
    """The tags of the records that this store's folder has taken in or published last: for all processes that use it,
    and those that are to come. `NOTHING` for a session that another machine went on with: there its record holds.

    Args:
        is_whole: whether the index has all of a session, as it is now; else only the process that took it in does.
    """

    def __init__(
        self, folder: Path, names: Callable[[Session], tuple[str, str, bytes]], is_whole: Callable[[Session], bool]
    ) -> None:
        self._folder, self._names, self._is_whole = folder, names, is_whole
        self._tags: dict[Session, bytes] = {}

    def _path(self, session: Session) -> Path:
        return self._folder / self._names(session)[2].hex()[:40]

    def _read(self, session: Session) -> tuple[bytes, bool] | None:
        with suppress(OSError):
            found = self._path(session).read_bytes()
            if len(found) == len(NOTHING) + 1:
                return found[:-1], found[-1:] == _WHOLE
        return None

    def is_known(self, session: Session) -> bool:
        """Whether it was ever shared from here."""
        return session in self._tags or self._read(session) is not None

    def tag(self, session: Session) -> bytes:
        """That of the record which this process need not read again; empty if there is none."""
        if session in self._tags:
            return self._tags[session]
        tag, whole = self._read(session) or (b"", False)
        return tag if whole else b""

    def has(self, session: Session, tag: bytes) -> bool:
        """Whether a record is known here, from this process or another."""
        return tag == self._tags.get(session) or self._read(session) == (tag, True)

    def set(self, session: Session, tag: bytes) -> None:
        """That is the one from now on. Where it can't be written, for this process."""
        self._tags[session] = tag
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(self._path(session), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, tag + (_WHOLE if self._is_whole(session) else _PART), 0)
            finally:
                os.close(fd)


class SharedSessions:
    """The records that an engine keeps, for one store. Nothing here raises for want of an engine.

    Args:
        folder: the store's.
        is_whole: see `Seen`.
    """

    def __init__(self, tier: SharedTier, folder: Path, is_whole: Callable[[Session], bool]) -> None:
        self._tier = tier
        self.leases = Leases(tier, folder, tier.lease)
        self._seen = Seen(folder / "shared", self._names, is_whole)
        self._offered: dict[Session, bytes] = {}
        """Tags of records that were told, and are not taken in yet."""
        self._usable: bool | None = None

    def _names(self, session: Session) -> tuple[str, str, bytes]:
        """Of a session's record, of the list that it is in, and its member there."""
        secret = self._tier.vault.secret
        member = name_digest("shared", *session, secret=secret)
        space = name_digest("space", session[0], secret=secret)
        return f"{self._tier.prefix}:s:{member.hex()}", f"{self._tier.prefix}:n:{space.hex()}", member

    def can(self) -> bool:
        """Whether the engine really compares before it sets; tried once, as some say that they do and do not."""
        tier = self._tier
        if not tier.breaker.well or self._usable is not None:
            return tier.breaker.well and bool(self._usable)
        name, one, two = f"{tier.prefix}:try:{os.urandom(8).hex()}", os.urandom(TAG_BYTES), os.urandom(TAG_BYTES)

        def swap(old: bytes, new: bytes) -> bool:
            return tier.engine.replace(name, old, new, f"{name}:list", b"m", b"e", Deadline(tier.timeout))

        with suppress(EngineError), tier.asking():
            self._usable = swap(b"", one) and not swap(b"", two) and not swap(two, two) and swap(one, two)
            self._usable = self._usable and self.leases.works(name)
            tier.engine.delete([name, f"{name}:list"], Deadline(tier.timeout))
        if self._usable is False:
            tier.warn(
                "shared sessions", f"{tier.url} can't compare and set: blocks are shared, names of sessions are not"
            )
        return bool(self._usable)

    # reading

    def begin(
        self, session: Session, last_used: Callable[[], float | None], wait: float, *, patient: bool, reads: bool
    ) -> SessionRecord | Literal[False] | None:
        """Has the session to this machine, until `leases.end`. Returns what `news` does, if it `reads`.

        Raises:
            SessionBusyError: a turn on it runs on another machine.
        """
        if not self.can():
            return None
        name = self._names(session)[0]
        value = self.leases.begin(session, name, self._seen.tag(session), wait, patient=patient)
        return self._read(session, value, last_used) if value is not None and reads else None

    def news(
        self, session: Session, last_used: Callable[[], float | None], *, settled: bool = False
    ) -> SessionRecord | Literal[False] | None:
        """The record of a session, if it is another than this machine knows; False if it was deleted; None if there is
        nothing new, or nobody knows.

        Args:
            last_used: when the session was last used here, for one that was never shared before: of two that were made
                under one name, that stays which was used last.
            settled: waits for what a turn of another machine made that is just over.
        """
        if not self.can() or self.leases.current(session) is not None:
            return None
        with suppress(EngineError), self._tier.asking():
            name = self._names(session)[0]
            value = self.leases.settled(session, name) if settled else self.leases.value(name)
            return self._read(session, value, last_used)
        return None

    def _read(
        self, session: Session, value: bytes, last_used: Callable[[], float | None]
    ) -> SessionRecord | Literal[False] | None:
        tag, encoded = Head.of(value).tag, body_of(value)
        if not encoded or self._seen.has(session, tag):
            return None
        try:
            record = self._decoded(encoded)
        except LoadError:
            return None
        if record is not None and (record.namespace, record.name) != session:
            return None
        here = last_used() if not self._seen.is_known(session) else None
        if record is not None and here is not None and here > record.last_used:
            self._seen.set(session, tag)
            return None
        self._offered[session] = tag
        return record or False

    def taken_in(self, session: Session) -> None:
        """What `news` or `begin` told is in the index now. Not before: who is killed between has it told again."""
        self._seen.set(session, self._offered.pop(session))

    def _decoded(self, encoded: bytes) -> SessionRecord | None:
        """Raises:
        LoadError: it is no record.
        """
        return None if encoded.startswith(GONE) else decode_record(encoded, self._tier.vault)

    def changed(self, namespace: str) -> list[str]:
        """The names of the sessions of a namespace of which there may be `news`."""
        if not self.can():
            return []
        found: list[str] = []
        with suppress(EngineError), self._tier.asking():
            listed = self._tier.engine.noted([self._names((namespace, ""))[1]], Deadline(self._tier.timeout))[0]
            for sealed in listed.values():
                with suppress(LoadError, ValueError):
                    space, name, tag = json.loads(self._tier.vault.unseal(sealed))
                    if space == namespace and not self._seen.has((space, name), bytes.fromhex(tag)):
                        found.append(name)
        return found

    # writing, behind the turn

    def publish(self, session: Session, record: Callable[[], SessionRecord | None], done: Callable[[], None]) -> None:
        """Has a session's record go up after all of its blocks.

        Args:
            record: what it is by then; None for one that is deleted.
            done: called when it is known by all, or that it will not be.
        """
        self.leases.keep(session)

        def over() -> None:
            self.leases.let_go(session)
            done()

        self._tier.behind(partial(self._publish, session, record, over), over)

    def _publish(self, session: Session, record: Callable[[], SessionRecord | None], over: Callable[[], None]) -> None:
        try:
            if not self.can():
                return
            found = record()
            if found is not None and not self._tier.complete([s.block for s in found.manifest.spans if s.block]):
                self._tier.warn(
                    "incomplete", f"session {session[1]!r} is not shared for now: not all of its KV could be sent"
                )
                return
            with self._tier.asking():
                self._replace(session, found)
        except (EngineError, LoadError):
            return
        finally:
            over()

    def _replace(self, session: Session, record: SessionRecord | None) -> None:
        """Puts a record in the place of the one that this machine knows, under its hold."""
        name, known = self._names(session)[0], self._seen.tag(session)
        hold, yields = self.leases.current(session), self.leases.yields(session)
        head = hold or Head.of(self.leases.take(session, name, known))
        fits = head.tag == NOTHING or self._seen.has(session, head.tag)
        if self.leases.is_ours(head) and fits and self._put(session, record, head):
            return
        value = self._tier.engine.value(name, Deadline(self._tier.timeout))
        head = Head.of(value)
        # another process with this folder, or a turn that has begun since: what is published is what the folder has
        if hold is not None and self.leases.is_ours(head) and self._put(session, record, head):
            return
        self.leases.drop(session)
        if body_of(value):
            with suppress(LoadError):
                if self._decoded(body_of(value)) == record:
                    self._seen.set(session, head.tag)
                    return
            self._seen.set(session, NOTHING)
            if not yields:
                self._tier.warn(
                    f"shared session {session}",
                    f"session {session[1]!r} was continued on another machine meanwhile, which keeps its name; what "
                    "was computed here is still found by its text",
                )

    def _put(self, session: Session, record: SessionRecord | None, head: Head) -> bool:
        name, listed, member = self._names(session)
        tag = os.urandom(16)
        new = self.leases.after(session, head, tag)
        gone = GONE + b"%d" % time.time()
        body = encode_record(record, self._tier.vault) if record is not None else gone
        entry = self._tier.vault.seal(json.dumps([*session, tag.hex()]).encode())
        swap, deadline = self._tier.engine.replace, Deadline(self._tier.timeout)
        done = swap(name, head.compared, new.encoded + body, listed, member, entry, deadline)
        if done:
            self._seen.set(session, tag)
            self.leases.replaced(session, new)
        return done


def as_record(record: SessionRecord, manifest: Manifest) -> SessionRecord:
    """A session's record with a manifest that may be of more blocks than the index has."""
    if len(record.manifest.spans) >= len(manifest.spans):
        return record
    counts = tuple(span.stop if span.block else 0 for span in manifest.spans)
    return replace(record, manifest=replace(manifest, beside=()), counts=counts)
