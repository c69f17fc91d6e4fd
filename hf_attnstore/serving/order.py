"""The order in which waiting turns run: plain decisions over who came when, without threads and without a model."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

Rank = tuple[float, int]


@dataclass(frozen=True)
class _Entry(Generic[T]):
    item: T
    session: Hashable | None
    rank: Rank
    number: int


class WaitingTurns(Generic[T]):
    """Turns that wait, in the order in which they are to run.

    First come, first served. A step of priority is worth `patience` seconds: a turn of priority p goes before those of
    priority 0 that came up to p · patience seconds earlier, and after those that have waited for longer. So, as long as
    priorities are bounded, every turn has its turn; `math.inf` makes priority everything and lets others starve.

    Turns of one session never change their order among themselves: a turn lends its rank to those of its session that
    wait before it.

    Args:
        patience: seconds, at least 0.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._entries: dict[T, _Entry[T]] = {}
        self._deferred: dict[Hashable, float] = {}
        self._count = 0
        self._order: list[_Entry[T]] | None = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def add(self, item: T, session: Hashable | None, priority: float, now: float) -> None:
        """Adds a turn that comes `now` (seconds of any clock). `session` is None for one that is of no session."""
        self._count += 1
        rank = (-priority, self._count)
        if math.isfinite(self._patience):
            rank = (now - priority * self._patience, self._count)
        self._entries[item] = _Entry(item, session, rank, self._count)
        self._order = None

    def remove(self, item: T) -> bool:
        """Takes a turn out; whether it was there."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        self._order = None
        if entry.session is not None and not any(other.session == entry.session for other in self._entries.values()):
            self._deferred.pop(entry.session, None)
        return True

    def order(self) -> list[T]:
        """All turns, the next one first."""
        return [entry.item for entry in self._ordered()]

    def _ordered(self) -> list[_Entry[T]]:
        if self._order is None:
            ranks: dict[Hashable, Rank] = {}
            ranked: list[tuple[Rank, int, _Entry[T]]] = []
            for entry in reversed(self._entries.values()):  # the last that came first: it lends its rank
                rank = entry.rank
                if entry.session is not None:
                    rank = ranks[entry.session] = min(rank, ranks.get(entry.session, rank))
                ranked.append((rank, entry.number, entry))
            self._order = [entry for _, _, entry in sorted(ranked, key=lambda found: found[:2])]
        return self._order

    def first(self, now: float) -> T | None:
        """The turn that is to run next; None if none can."""
        return next((e.item for e in self._ordered() if not self.is_deferred(e.session, now)), None)

    def defer(self, session: Hashable, until: float) -> None:
        """Passes over the turns of a session until then; their places stay theirs."""
        self._deferred[session] = until

    def is_deferred(self, session: Hashable | None, now: float) -> bool:
        """Whether the turns of a session are passed over at the moment."""
        return session is not None and self._deferred.get(session, now) > now

    def seconds_to_next(self, now: float) -> float | None:
        """How long until a session that was deferred can be tried again; None if there is none."""
        return max(min(self._deferred.values()) - now, 0.0) if self._deferred else None
