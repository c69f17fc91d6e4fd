"""Keeping what is likely to be used again, as far as use itself has shown."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from .base import Place, Policy, Use
from .returns import Returns, bin_of

_SHORT_TURN = 2048
"""Tokens: a turn that adds more is rather a new text with a known beginning than the next of a conversation."""
_LONG_TEXT = 4096
_TURNS = 3
"""Later turns count as this one."""
_ENDS = 65_536
_FIRST, _MORE = 1, 3
"""Groups: 0 for short ends; from 1 first turns, of short and of long texts; from 3 later turns, by their number and by
what they added."""


class _End(NamedTuple):
    turn: int
    tokens: int
    group: int
    at: float


class Predictive(Policy):
    """Blocks are grouped by what predicts a return: how many turns their conversation has had, whether the last one
    added little or much, and how long a first text was. How often and when each group returns is learned while
    running, also from conversations whose blocks are gone.

    On a trace of an hour of real chats a quarter of first turns were followed by a second, half of the second by a
    third, and 7 of 10 later; of second turns that added more than 2,048 tokens 8 in 100.
    """

    name = "predictive"
    groups = _MORE + 2 * _TURNS
    newcomers = _FIRST

    def __init__(self) -> None:
        self._returns = Returns(self.groups)
        self._ends: OrderedDict[Hashable, _End] = OrderedDict()
        """The last whole block of every conversation that may come back, least recent first."""
        self._gone_on: OrderedDict[Hashable, None] = OrderedDict()
        """Blocks at which a conversation ended that then went on. A second one that ends there shares its beginning
        with others, such as a system prompt: nobody can tell which of them goes on."""
        self._shorts: OrderedDict[Hashable, float] = OrderedDict()
        self._short_of: dict[Hashable, Hashable] = {}
        self._turns = 0
        self._now = 0.0
        self._refresh_at = 16

    def group(self, use: Use) -> int:
        now = use.now
        key = next((key for key in reversed(use.chain) if key in self._ends), None)
        if key is not None:
            before = self._ends.pop(key)
            if key != use.chain[-1]:
                self._gone_on[key] = None
            self._returns.returned(before.group, now - before.at)
            self._end_of_short(self._short_of.pop(key, None), use, now)
            turn, tokens = before.turn + 1, before.tokens
        elif use.matched is not None and use.matched.group >= _FIRST:  # of another process, or long ago
            turn, tokens = (use.matched.group - _FIRST) // 2 + 2, use.tokens - _SHORT_TURN
        else:
            turn, tokens = 1, 0
        if turn == 1:
            group = _FIRST + (use.tokens > _LONG_TEXT)
        else:
            group = _MORE + 2 * min(turn - 2, _TURNS - 1) + (use.tokens - tokens > _SHORT_TURN)
        if use.chain and use.chain[-1] not in self._gone_on:
            self._ends[use.chain[-1]] = _End(min(turn, _TURNS + 1), use.tokens, group, now)
            if use.short is not None:
                self._shorts[use.short] = now
                self._short_of[use.chain[-1]] = use.short
        self._tidy(now)
        return group

    def _end_of_short(self, short: Hashable | None, use: Use, now: float) -> None:
        """A conversation went on: its short end was of use, or never will be."""
        if short is None or short not in self._shorts:
            return
        age = now - self._shorts.pop(short)
        if short in use.known or short == use.short:
            self._returns.returned(0, age)
        else:
            self._returns.lost(0)

    def _tidy(self, now: float) -> None:
        while len(self._ends) > _ENDS:
            key, end = self._ends.popitem(last=False)
            self._returns.lost(end.group)
            self._shorts.pop(self._short_of.pop(key, None), None)
        while len(self._gone_on) > _ENDS:
            self._gone_on.popitem(last=False)
        while len(self._shorts) > _ENDS:
            self._shorts.popitem(last=False)
            self._returns.lost(0)
        self._turns += 1
        if self._turns >= self._refresh_at:
            self._refresh_at = self._turns + max(16, min(self._turns // 2, 256), len(self._ends) // 16)
            self._returns.refresh(self._waiting(now))
        self._now = now

    def _waiting(self, now: float) -> list[tuple[int, float]]:
        ends = ((end.group, now - end.at) for end in self._ends.values())
        return [*ends, *((0, now - at) for at in self._shorts.values())]

    def place(self, before: Place | None, group: int, now: float, *, short: bool = False) -> Place:
        return Place(0 if short else group, now)

    def left(self, place: Place, follower: Place) -> Place:
        if follower.stamp <= place.stamp:
            return place
        return Place(follower.group or place.group, follower.stamp)  # a short end says nothing of what it followed

    def worth(self, place: Place, now: float) -> float:
        return self._returns.worth[place.group][bin_of(now - place.stamp)]

    def learned(self) -> dict[str, Any]:
        return self._returns.learned(self._waiting(self._now))

    def recall(self, learned: Mapping[str, Any]) -> None:
        self._returns.recall(learned)
