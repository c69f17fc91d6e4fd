"""The conversations that may come back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from ....lazy import np

_EMPTY = -1


class End(NamedTuple):
    """How a conversation's last turn ended: the number of that turn (what is high counts as one), its tokens, the group
    of its blocks, when it was, and its short block, if there is one."""

    turn: int
    tokens: int
    group: int
    at: float
    short: Hashable | None


class Ends:
    """Ends by key, least recent first.

    What is asked of all of them at once, since when they have been waiting, lies beside them in arrays: it is asked
    every few hundred turns, and there may be tens of thousands.
    """

    def __init__(self) -> None:
        self._ends: OrderedDict[Hashable, tuple[End, int]] = OrderedDict()
        """Each with its row in the arrays."""
        self._free: list[int] = []
        self._groups = np.empty(0, np.int8)
        self._began = np.empty(0)
        self._short = np.empty(0, bool)

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._ends

    def add(self, key: Hashable, end: End) -> None:
        """Adds the most recent one, whose key is new."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._ends[key] = end, row
        self._groups[row], self._began[row], self._short[row] = end.group, end.at, end.short is not None

    def pop(self, key: Hashable) -> End:
        """Takes one out. Raises KeyError if it is not there."""
        return self._empty(*self._ends.pop(key))

    def keep(self, count: int) -> None:
        """Forgets all but the most recent."""
        while len(self._ends) > count:
            self._empty(*self._ends.popitem(last=False)[1])

    def waiting(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The group of each, the second since when it has been waiting, and whether it has a short block; in no order
        that means anything."""
        there = self._groups != _EMPTY
        return self._groups[there], self._began[there], self._short[there]

    def _empty(self, end: End, row: int) -> End:
        self._groups[row] = _EMPTY
        self._free.append(row)
        return end

    def _grow(self) -> None:
        size = len(self._groups)
        more = max(size, 64)
        self._groups = np.append(self._groups, np.full(more, _EMPTY, np.int8))
        self._began = np.append(self._began, np.zeros(more))
        self._short = np.append(self._short, np.zeros(more, bool))
        self._free.extend(range(size, size + more))
