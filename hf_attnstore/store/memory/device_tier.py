"""The device tier: whose KV stays where it was computed, between two turns, under a byte cap.

Accounting only: what an entry holds is nothing to this module. An entry is an accelerator and nothing more. What it
holds was handed over to the store as well, so an entry may be dropped at any moment.
"""

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..processes.forking import watch

_numbers = itertools.count(1)


@dataclass(eq=False)
class DeviceEntry:
    """What one turn left on its devices."""

    owner: int
    """The number of what computed it; see `Owner`."""
    session: str | None
    """None for a conversation that is known by its content only."""
    namespace: str
    """Of the session; nothing is shared between two."""
    nbytes: int
    content: Any
    """Opaque; None when the entry is in the tier no more, except for who took it."""
    dropped: Callable[[], None] | None = None
    """Called when it was dropped, not when it was taken."""
    state: Literal["parked", "taken", "dropped"] = "parked"


@dataclass(eq=False)
class Owner:
    """Something that computes, such as a model: when it is gone, or is let go of, its entries are."""

    number: int = field(default_factory=lambda: next(_numbers))
    _tiers: "weakref.WeakSet[DeviceTier]" = field(default_factory=weakref.WeakSet)

    def __post_init__(self) -> None:
        weakref.finalize(self, _drop, self.number, self._tiers).atexit = False

    def uses(self, tier: "DeviceTier") -> None:
        """There are entries of it in a tier now."""
        self._tiers.add(tier)

    def drop(self) -> None:
        """Drops every entry of it."""
        _drop(self.number, self._tiers)


def _drop(number: int, tiers: "weakref.WeakSet[DeviceTier]") -> None:
    for tier in list(tiers):
        tier.forget_owner(number)


class DeviceTier:
    """Entries under a byte cap. Those of no session that is to come go first, least recently used before others; then
    that of the session which comes last. Safe to use from several threads.

    The bytes are those of all devices together. An entry is whole or gone: layers can't be given up one by one. Who
    takes an entry has it alone: it is in the tier no more.
    """

    def __init__(self, capacity: int, *, least: int = 0, host_only: bool = False) -> None:
        self.capacity = capacity
        """Bytes; 0 for a tier that holds nothing."""
        self.least = least
        """Bytes; of less, nothing is kept."""
        self.host_only = host_only
        """Whether it is only for what lies in host memory."""
        self.evicted = 0
        """Entries dropped for want of room."""
        self.forgotten = 0
        """How often a session was forgotten: who read one while that happened must not bring it back."""
        self._entries: dict[int, DeviceEntry] = {}
        """By the address of the entry, least recently used first."""
        self._used = 0
        self._coming: dict[tuple[str, str | None], int] = {}
        """By namespace and session, how many turns run before its next one."""
        self._closed = False
        self._lock = threading.RLock()  # an owner's finaliser may run while this thread holds it
        watch(self)

    def after_fork_in_child(self) -> None:
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used(self) -> int:
        """Bytes; never more than `capacity`."""
        return self._used

    def park(
        self,
        owner: Owner,
        session: str | None,
        nbytes: int,
        content: Any,
        dropped: Callable[[], None] | None = None,
        *,
        namespace: str = "",
    ) -> DeviceEntry | None:
        """Takes in what a turn left, as used just now, in place of what an earlier one left of the same session.

        Returns:
            None where it is larger than the tier, or too small, or what is there is needed sooner, or the tier is
            closed; nothing is evicted then.
        """
        entry = DeviceEntry(owner.number, session, namespace, nbytes, content, dropped)
        with self._lock:
            if session is not None:
                for older in self.entries(owner, session, namespace):
                    self.drop(older)
            if self._closed or not max(self.least, 1) <= nbytes <= self.capacity:
                return None
            going = self._in_the_way(nbytes)
            if any(self._turns_until(other) < self._turns_until(entry) for other in going):
                return None
            self._evict(going)
            owner.uses(self)
            self._entries[id(entry)] = entry
            self._used += nbytes
        return entry

    def resize(self, capacity: int) -> None:
        """Sets the capacity, and evicts what is over it."""
        with self._lock:
            self.capacity = capacity
            self._evict(self._in_the_way(0))

    def expect(self, coming: Sequence[tuple[str, str]]) -> None:
        """Says whose turns come, by namespace and session, in order. Replaces what was said before."""
        places: dict[tuple[str, str | None], int] = {}
        for place, session in enumerate(coming):
            places.setdefault(session, place)
        self._coming = places

    def _turns_until(self, entry: DeviceEntry) -> float:
        return self._coming.get((entry.namespace, entry.session), math.inf)

    def _in_the_way(self, nbytes: int) -> list[DeviceEntry]:
        """The entries that go if there is to be room for so much more."""
        going: list[DeviceEntry] = []
        over = self._used + nbytes - self.capacity
        # a sort keeps the order of equals, in reverse too
        for entry in sorted(self._entries.values(), key=self._turns_until, reverse=True):
            if over <= 0:
                break
            going.append(entry)
            over -= entry.nbytes
        return going

    def _evict(self, entries: Sequence[DeviceEntry]) -> None:
        for entry in entries:
            self.drop(entry)
            self.evicted += 1

    def entries(self, owner: Owner, session: str | None, namespace: str = "") -> list[DeviceEntry]:
        """An owner's entries of a session, last used first: at most one, unless the session is None."""
        with self._lock:
            mine = [e for e in self._entries.values() if e.owner == owner.number and e.namespace == namespace]
            found = [entry for entry in mine if entry.session == session]
        return found[::-1]

    def take(self, entry: DeviceEntry) -> Any:
        """Takes an entry out. Returns its content; None where somebody was faster, or it was dropped."""
        with self._lock:
            if not self._remove(entry):
                return None
            entry.state = "taken"
            content, entry.content = entry.content, None
            return content

    def drop(self, entry: DeviceEntry) -> None:
        """Lets go of an entry. Harmless if it is not here any more."""
        with self._lock:
            if not self._remove(entry):
                return
            entry.state = "dropped"
            entry.content = None
        if entry.dropped is not None:
            entry.dropped()

    def _remove(self, entry: DeviceEntry) -> bool:
        if self._entries.pop(id(entry), None) is None:
            return False
        self._used -= entry.nbytes
        return True

    def forget(self, session: str, namespace: str = "") -> None:
        """A session was deleted."""
        self.forgotten += 1
        self._drop_where(lambda entry: (entry.namespace, entry.session) == (namespace, session))

    def forget_unnamed(self) -> None:
        """What belongs to no session was deleted."""
        self.forgotten += 1
        self._drop_where(lambda entry: entry.session is None)

    def forget_owner(self, number: int) -> None:
        """What computed the entries is gone."""
        self._drop_where(lambda entry: entry.owner == number)

    def rename(self, source: str, target: str, namespace: str = "") -> None:
        """A session has another name now."""
        with self._lock:
            self.forgotten += 1
            for entry in list(self._entries.values()):
                if (entry.namespace, entry.session) == (namespace, source):
                    entry.session = target

    def clear(self) -> None:
        """Drops everything."""
        self._drop_where(lambda entry: True)

    def close(self) -> None:
        """Drops everything, and takes nothing in any more."""
        self._closed = True
        self.clear()

    def _drop_where(self, goes: Callable[[DeviceEntry], bool]) -> None:
        with self._lock:
            found = [entry for entry in self._entries.values() if goes(entry)]
        for entry in found:
            self.drop(entry)
