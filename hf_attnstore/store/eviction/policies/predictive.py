"""Keeping what is likely to be used again, as far as use itself has shown."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ....lazy import np
from .base import Place, Policy, Use
from .ends import End, Ends

if TYPE_CHECKING:
    from .returns import Returns

_SHORT_TURN = 2048
"""Tokens: a turn that adds more is rather a new text with a known beginning than the next of a conversation."""
_LONG_TEXT = 4096
_TURNS = 3
"""Later turns count as this one."""
_ENDS = 65_536
_REMEMBERED = 16
"""Short ends: how far back it counts whether they were of use."""
_FIRST, _MORE = 1, 3
"""Groups: 0 for short ends; from 1 first turns, of short and of long texts; from 3 later turns, by their number and by
what they added."""


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
        self._recalled: Mapping[str, Any] = {}
        self._gone_on: OrderedDict[Hashable, None] = OrderedDict()
        """Blocks at which a conversation ended that then went on. A second one that ends there shares its beginning
        with others, such as a system prompt: nobody can tell which of them goes on."""
        self._shorts_used = 1.0
        """The share of short ends that were of use to the next turn, among those that were still there."""
        self._turns = 0
        self._counted_at = self._now = 0.0
        self._refresh_at = 16

    # made when they are first used, with numpy: whoever only looks at a store waits for neither

    @cached_property
    def _returns(self) -> Returns:
        from .returns import Returns

        found = Returns(self.groups)
        found.recall(self._recalled)
        return found

    @cached_property
    def _ends(self) -> Ends:
        """Every conversation that may come back, least recent first: by its name, or else by its last whole block."""
        return Ends()

    def group(self, use: Use) -> int:
        now = use.now
        key = self._end_before(use)
        if key is not None:
            before = self._ends.pop(key)
            if use.conversation is None and key != use.chain[-1]:
                self._gone_on[key] = None
            self._returns.returned(before.group, now - before.at, self._seen(before.at))
            self._end_of_short(before, use)
            turn, tokens = before.turn + 1, before.tokens
        elif use.matched is not None and use.matched.group >= _FIRST:  # of another process, or long ago
            turn, tokens = (use.matched.group - _FIRST) // 2 + 2, use.tokens - _SHORT_TURN
        else:
            turn, tokens = 1, 0
        if turn == 1:
            group = _FIRST + (use.tokens > _LONG_TEXT)
        else:
            group = _MORE + 2 * min(turn - 2, _TURNS - 1) + (use.tokens - tokens > _SHORT_TURN)
        key = use.conversation if use.conversation is not None else use.chain[-1] if use.chain else None
        if key is not None and key not in self._gone_on:
            self._ends.add(key, End(min(turn, _TURNS + 1), use.tokens, group, now, use.short))
        self._tidy(now)
        return group

    def _end_before(self, use: Use) -> Hashable | None:
        """Under what the end is known that a turn went on from."""
        if use.conversation is not None and use.conversation in self._ends:
            return use.conversation
        return next((key for key in reversed(use.chain) if key in self._ends), None)

    def _seen(self, at: float) -> float:
        """How much of the time since `at` has been counted as waiting already, in seconds."""
        return max(self._counted_at - at, 0.0)

    def _end_of_short(self, end: End, use: Use) -> None:
        """A conversation went on: its short end was of use, or never will be. Of one that had been dropped nobody can
        tell: it must not count as useless for that."""
        if end.short is None:
            return
        if end.short in use.known or end.short == use.short:
            self._returns.returned(0, use.now - end.at, self._seen(end.at))
            self._shorts_used += (1 - self._shorts_used) / _REMEMBERED
        elif use.holds(end.short):
            self._shorts_used -= self._shorts_used / _REMEMBERED

    def _tidy(self, now: float) -> None:
        self._ends.keep(_ENDS)
        while len(self._gone_on) > _ENDS:
            self._gone_on.popitem(last=False)
        self._turns += 1
        self._now = now
        if self._turns >= self._refresh_at:
            self._refresh_at = self._turns + max(16, min(self._turns // 2, 256), len(self._ends) // 16)
            self._count_waiting(now)
            self._returns.refresh()

    def _count_waiting(self, now: float) -> None:
        groups, began, short = self._ends.waiting()
        shorts = began[short]
        groups, began = np.append(groups, np.zeros(len(shorts), int)), np.append(began, shorts)
        self._returns.waited(groups, np.maximum(self._counted_at - began, 0), np.maximum(now - began, 0))
        self._counted_at = now

    def place(self, before: Place | None, group: int, now: float, *, short: bool = False) -> Place:
        return Place(0 if short and self._shorts_used < 0.5 else group, now)

    def admits(self, newcomer: Place, victim: Place, now: float) -> bool:
        return self.worth(newcomer, now) >= self.worth(victim, now)

    def left(self, place: Place, follower: Place) -> Place:
        if follower.stamp <= place.stamp:
            return place
        # a short end says nothing of what it followed
        return follower if follower.group else Place(place.group, follower.stamp)

    def worth(self, place: Place, now: float) -> float:
        return self._returns.worth_at(place.group, now - place.stamp)

    def learned(self) -> dict[str, Any]:
        if not self._turns:
            return {}
        self._count_waiting(self._now)
        return self._returns.learned()

    def recall(self, learned: Mapping[str, Any]) -> None:
        if "_returns" in vars(self):
            self._returns.recall(learned)
        else:
            self._recalled = learned
