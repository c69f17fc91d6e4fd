"""One turn at a time on a session, over machines: a hold with a fencing number, in the head of the session's record.

A record is replaced only by who names the head that is there, tag, number and holder. So a holder that was taken for
dead, and has come back, changes nothing any more. No machine's clock is compared with another's: when a hold is over
says the engine by its own, or who has seen it unchanged for that long.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...errors import SessionBusyError
from ..blocks.keys import name_digest
from ..processes.forking import watch
from ..processes.locks import DRAIN_SECONDS, this_machine
from .deadline import Deadline
from .engine import TAG_BYTES, EngineError, Taken
from .tier import SharedTier

Session = tuple[str, str]
"""Namespace and name."""

RUNS, DRAINS, YIELDS = range(3)
"""What a holder does: a turn; what it made goes up; something that gives way to anybody."""

_LAYOUT = struct.Struct(">16sQ8sQII")
_FREE = bytes(8)
_GRACE = 1.0
"""Seconds that are waited even for a turn that seems to run: it may just have ended."""
_LINGER = 0.05
"""Seconds after a turn in which others are not told: what it made is mostly there by then, or another turn."""
_POLLS = 0.02, 0.2
"""Seconds between two looks, the first and the longest."""


class Head(NamedTuple):
    """The head of a record."""

    tag: bytes = bytes(16)
    """Of what the record says."""
    number: int = 0
    """Counts the holds."""
    holder: bytes = _FREE
    """Half of it names a store's folder, half the process."""
    until: int = 0
    """Milliseconds of the engine's clock; where it has none, a count of the signs of life."""
    milliseconds: int = 0
    """For which it is held without a sign of life."""
    state: int = RUNS

    @classmethod
    def of(cls, value: bytes) -> Head:
        """That of a value; of none, that of a record which nobody has written yet."""
        return cls(*_LAYOUT.unpack_from(value)) if len(value) >= _LAYOUT.size else cls()

    @property
    def encoded(self) -> bytes:
        return _LAYOUT.pack(*self)

    @property
    def compared(self) -> bytes:
        """What has to be there for a record to be replaced."""
        return self.encoded[:TAG_BYTES] if self != Head() else b""


def body_of(value: bytes) -> bytes:
    """What comes after the head."""
    return value[_LAYOUT.size :]


@dataclass
class _Hold:
    name: str
    head: Head
    turns: int = 0
    kept: int = 0
    """How often somebody asked for it to be kept until what a turn made is there."""
    surely: float = 0.0
    """Until when nobody else can have it, by this machine's monotonic clock."""
    due: float = 0.0
    """When the engine is to hear of it next."""


class Leases:
    """The holds of one store.

    Args:
        folder: the store's: who has its lock has what other processes held from there.
        seconds: after which a holder that gives no sign of life is taken for dead.
    """

    def __init__(self, tier: SharedTier, folder: Path, seconds: float) -> None:
        self._tier, self._seconds = tier, seconds
        there = folder.stat()
        place = name_digest("holder", this_machine(), f"{there.st_dev} {there.st_ino} {folder.resolve()}")
        self._place = place[:4]
        self._holder = self._place + os.urandom(4)
        self._watched: dict[Session, tuple[Head, float]] = {}
        """Holds of others, and since when they are like this."""
        self._begin()
        watch(self)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._holds: dict[Session, _Hold] = {}
        self._thread: threading.Thread | None = None
        self._ended = False

    def after_fork_in_child(self) -> None:
        self._begin()
        self._ended = True

    def works(self, name: str) -> bool:
        """Whether a hold on this record, of which nobody knows, is refused to others.

        Raises:
            EngineError: it is not known.
        """
        holders = os.urandom(8), os.urandom(8)
        takes = [Taken(holder, 4, 60_000, b"") for holder in holders]
        values = [self._tier.engine.take(name, taken, Deadline(self._tier.timeout)) for taken in takes]
        return all(value is None or Head.of(value).holder == holders[0] for value in values)

    # a turn

    def begin(self, session: Session, name: str, known: bytes, wait: float, *, patient: bool) -> bytes | None:
        """Takes the hold for a turn, which `end` ends.

        Args:
            name: of the session's record.
            known: the tag of what this machine knows of it.
            wait: seconds to wait for a turn of another machine.
            patient: waits a moment at least; what a turn made that is over is waited for in any case.

        Returns:
            The record as it is, or its head where `known` is its tag; None where that is known, or the engine is not
            well: then there is no hold.

        Raises:
            SessionBusyError: another machine has it.
        """
        with self._changed:
            hold = self._holds.get(session)
            if hold is None:
                hold = self._holds[session] = _Hold(name, Head())
            hold.turns += 1  # what is published meanwhile must not let go of it
            if hold.surely > time.monotonic() and hold.head.state != YIELDS:
                hold.head = hold.head._replace(state=RUNS)
                return None
        began, pause = time.monotonic(), _POLLS[0]
        while True:
            try:
                value = self.take(session, name, known)
            except EngineError:
                return None
            head = Head.of(value)
            if head.holder == self._holder:
                return value
            most = DRAIN_SECONDS if head.state == DRAINS else _GRACE if patient else 0.0
            if time.monotonic() - began >= max(wait, most):
                self._less(session, turns=1)
                raise SessionBusyError(
                    f"session {session[1]!r} is in the middle of a turn on another machine; wait for it (`wait=` "
                    "seconds), or `store.fork` the session and use the copy"
                )
            time.sleep(pause)
            pause = min(2 * pause, _POLLS[1])

    def end(self, session: Session) -> None:
        """The turn is over."""
        self._less(session, turns=1)

    def keep(self, session: Session) -> None:
        """What is made now is one step for others, until `let_go`."""
        with self._changed:
            hold = self._holds.get(session)
            if hold is None:
                hold = self._holds[session] = _Hold("", Head())
            hold.kept += 1

    def let_go(self, session: Session) -> None:
        """Ends what `keep` began."""
        self._less(session, kept=1)

    def give_way(self, session: Session) -> None:
        """Whoever wants to may take the hold from the turn that runs."""
        with self._changed:
            hold = self._holds.get(session)
            if hold is not None and hold.surely:
                hold.head = hold.head._replace(state=YIELDS)
                self._tell(hold, 0.0)

    def _less(self, session: Session, turns: int = 0, kept: int = 0) -> None:
        with self._changed:
            hold = self._holds.get(session)
            if hold is None:
                return
            hold.turns, hold.kept = max(hold.turns - turns, 0), max(hold.kept - kept, 0)
            if hold.turns:
                return
            if not hold.surely:
                if not hold.kept:
                    del self._holds[session]
                return
            if hold.head.state == RUNS:
                hold.head = hold.head._replace(state=DRAINS)
            self._tell(hold, _LINGER)

    def _tell(self, hold: _Hold, seconds: float) -> None:
        hold.due = min(hold.due, time.monotonic() + seconds)
        if self._thread is None and not self._ended:
            self._thread = threading.Thread(target=self._run, name="attnstore-lease", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # for who replaces records

    def current(self, session: Session) -> Head | None:
        """The head that a record has, as far as this machine's hold tells; None where it has none."""
        with self._changed:
            hold = self._holds.get(session)
            return hold.head if hold is not None and hold.surely > time.monotonic() else None

    def yields(self, session: Session) -> bool:
        """Whether what is made now gives way to others."""
        with self._changed:
            hold = self._holds.get(session)
            return hold is not None and hold.head.state == YIELDS

    def after(self, session: Session, head: Head, tag: bytes) -> Head:
        """The head with which a record takes the place of that with `head`: free, if this is the last thing that is
        done to it."""
        with self._changed:
            hold = self._holds.get(session)
            last = hold is None or (not hold.turns and hold.kept <= 1)
            if last and hold is not None:  # a turn that begins now asks the engine
                hold.surely = 0.0
        return head._replace(tag=tag, holder=_FREE if last and head.holder == self._holder else head.holder)

    def replaced(self, session: Session, head: Head) -> None:
        """A record has got this head."""
        with self._changed:
            hold = self._holds.get(session)
            if hold is not None and hold.head.number == head.number and head.holder == self._holder:
                hold.head = head._replace(state=hold.head.state)

    def drop(self, session: Session) -> None:
        """What this machine knows is not what the record is: the hold is of no use.

        Raises:
            EngineError: others have to wait until it is over.
        """
        with self._changed:
            hold = self._holds.get(session)
            held, head = hold is not None and hold.surely > 0, hold.head if hold is not None else Head()
            if hold is not None:
                hold.surely = 0.0
        if hold is not None and held:
            self._change(hold.name, head, head._replace(holder=_FREE))

    def is_ours(self, head: Head) -> bool:
        """Whether this store's folder has the hold, through whatever process."""
        return head.holder[:4] == self._place

    # speaking to the engine

    def value(self, name: str) -> bytes:
        """A record as it is.

        Raises:
            EngineError: it is not known.
        """
        return self._tier.engine.value(name, Deadline(self._tier.lookup))

    def settled(self, session: Session, name: str) -> bytes:
        """A record, once what a turn made is there that has just ended on another machine: within the time in which
        that is taken for dead.

        Raises:
            EngineError: it is not known.
        """
        began, pause = time.monotonic(), _POLLS[0]
        while True:
            value = self.value(name)
            head = Head.of(value)
            most = head.milliseconds / 1e3 if head.state == DRAINS else 2 * _LINGER if head.state == RUNS else 0.0
            theirs = head.holder != _FREE and not self.is_ours(head) and self._watched.get(session) != (head, 0.0)
            if not theirs or time.monotonic() - began >= most:
                if theirs and head.state == DRAINS:  # nobody waits for it twice
                    self._watched[session] = head, 0.0
                return value
            time.sleep(pause)
            pause = min(2 * pause, _POLLS[1])

    def take(self, session: Session, name: str, known: bytes = b"") -> bytes:
        """Takes the hold, if it is free. Returns the value as it is then, or its head: that says whose it is.

        Raises:
            EngineError: it is not known.
        """
        tier, asked = self._tier, time.monotonic()
        with tier.asking():
            milliseconds = round(self._seconds * 1e3)
            found = tier.engine.take(name, Taken(self._holder, 4, milliseconds, known), Deadline(tier.lookup))
            value = found if found is not None else self._take_by_comparing(session, name)
        head = Head.of(value)
        with self._changed:
            if head.holder == self._holder:
                hold = self._holds.setdefault(session, _Hold(name, head))
                hold.name, hold.head, hold.surely = name, head, asked + self._seconds
                hold.due = asked + self._seconds / 3
                self._tell(hold, self._seconds / 3)
        return value

    def _take_by_comparing(self, session: Session, name: str) -> bytes:
        """The same on an engine that has no clock: who has not been heard of for as long as it said is dead."""
        engine, now = self._tier.engine, time.monotonic()
        value = engine.value(name, Deadline(self._tier.lookup))
        head = Head.of(value)
        seen, since = self._watched.get(session, (Head(), 0.0))
        if seen != head or not since:
            since = now
            self._watched[session] = head, now
        dead = now - since > head.milliseconds / 1e3
        if head.holder != _FREE and not (self.is_ours(head) or head.state == YIELDS or dead):
            return value
        self._watched.pop(session, None)
        taken = Head(head.tag, head.number + 1, self._holder, 0, round(self._seconds * 1e3), RUNS)
        new = taken.encoded + body_of(value)
        if engine.replace(name, head.compared, new, "", b"", b"", Deadline(self._tier.lookup)):
            return new
        return engine.value(name, Deadline(self._tier.lookup))

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                held = {session: hold for session, hold in self._holds.items() if hold.surely}
                due = [session for session, hold in held.items() if hold.due <= now]
                if self._ended:
                    return
                if not due:
                    self._changed.wait(min((hold.due for hold in held.values()), default=now + 60) - now)
                    continue
            for session in due:
                self._renew(session)

    def _renew(self, session: Session) -> None:
        """Tells the engine that a hold goes on, or is over."""
        with self._changed:
            hold = self._holds.get(session)
            if hold is None or not hold.surely:
                return
            over = not hold.turns and not hold.kept
            if over:
                del self._holds[session]
            asked, head = time.monotonic(), hold.head
            hold.due = asked + self._seconds / 3
        told = head._replace(holder=_FREE) if over else head
        with suppress(EngineError):
            if self._tier.breaker.well:
                with self._tier.asking():
                    until = self._change(hold.name, head, told)
                with self._changed:
                    if hold.head.number == head.number:
                        hold.head = hold.head._replace(until=max(until, 0))
                        hold.surely = asked + self._seconds if until >= 0 else 0.0

    def _change(self, name: str, head: Head, told: Head) -> int:
        """Sets the holder and the state of a hold, if it is still the one. Returns until when; -1 if it is not."""
        engine, deadline = self._tier.engine, Deadline(self._tier.timeout)
        until = engine.renew(name, head.compared[16:], told.holder, head.milliseconds, told.state, deadline)
        if until is not None:
            return until
        value = engine.value(name, deadline)
        there = Head.of(value)
        if there[1:3] != head[1:3]:
            return -1
        new = there._replace(holder=told.holder, state=told.state, until=there.until + 1)
        done = engine.replace(name, there.compared, new.encoded + body_of(value), "", b"", b"", deadline)
        return new.until if done else -1

    def close(self) -> None:
        """Lets go of all holds: after everything has gone up."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            for hold in self._holds.values():
                hold.turns = hold.kept = 0
            held = list(self._holds)
        if self._thread is not None:
            self._thread.join()
        for session in held:
            self._renew(session)
