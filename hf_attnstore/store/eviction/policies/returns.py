"""When do conversations come back? Statistics by group, and what they say of a block's worth."""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np

EDGES = (0.0, *(float(1.35**power) for power in range(46)))
"""Ages in seconds at which bins begin: up to about a week, finer at the beginning."""
BINS = len(EDGES)
_LOWS = np.array(EDGES)
_WIDTHS = np.diff(np.array([*EDGES, EDGES[-1] * 1.35]))
_MIDDLES = _LOWS + _WIDTHS / 2
PRIOR = 5.0
"""What a group of which little is known counts as: so many conversations that behave as those of all groups do."""
_MEMORY = 1000
"""Returns of a group after which what was seen before counts for a third: on a server whose queue grows, conversations
come back later and later, and what was true of them an hour ago misleads."""


def bin_of(age: float) -> int:
    """The bin of an age in seconds; what lies in the future counts as now."""
    return bisect_right(EDGES, age) - 1 if age > 0 else 0


class Returns:
    """Return times of conversations by group, also of those that have not come back yet.

    For every group and age it counts how many came back, and for how long conversations of that age were waited for:
    the rate of returns at that age, of late. (Following conversations from their beginning instead would tell of how
    things were then.)

    The worth of waiting for one that has been away for some time is the best ratio of (chance of a return within a
    horizon) to (time that its blocks take room until then), over all horizons: the Gittins index of keeping it. Nothing
    is assumed of the distribution; that many never return at all shows in it.
    """

    def __init__(self, groups: int) -> None:
        self._returned = np.zeros((groups, BINS))
        self._waited = np.zeros((groups, BINS))
        """Seconds, of all conversations together."""
        self._fresh = np.zeros(groups)
        """Returns since the last `refresh`."""
        self._back: list[tuple[int, float, float]] = []
        """Those that came back and are not counted yet: group, age since which they were waited for, and age."""
        self.worth = np.tile(_unknown(), (groups, 1)).tolist()
        """By group and bin of the age: expected returns per second of keeping."""

    def worth_at(self, group: int, age: float) -> float:
        """That of a conversation which has been away for `age` seconds."""
        return float(self.worth[group][bin_of(age)])

    def returned(self, group: int, age: float, since: float = 0.0) -> None:
        """A conversation of `group` came back after `age` seconds; up to the age `since` it was counted as waiting."""
        self._back.append((group, min(since, age), age))  # clocks are set back at times

    def waited(self, groups: np.ndarray, since: np.ndarray, until: np.ndarray) -> None:
        """Conversations were waited for in vain: each of a group, from one age to another, in seconds."""
        until = np.maximum(since, until)
        for group in np.unique(groups):
            which = groups == group
            self._waited[group] += _below(until[which]) - _below(since[which])

    def _settle(self) -> None:
        """Counts those that came back."""
        if not self._back:
            return
        back = np.array(self._back)
        groups, ages = back[:, 0].astype(int), back[:, 2]
        bins = np.maximum(np.searchsorted(_LOWS, ages, side="right") - 1, 0)
        np.add.at(self._returned, (groups, bins), 1)
        np.add.at(self._fresh, groups, 1)
        self.waited(groups, back[:, 1], ages)
        self._back.clear()

    def refresh(self) -> None:
        """Works the worth out again, and lets what is long ago count less."""
        self._settle()
        returned, at_risk = self._returned, self._waited / _WIDTHS
        # groups lean on what is known of all, and that on a curve which falls with age: so ages order what nobody knows
        prior = 1 / (_MIDDLES + 60) * _WIDTHS * 0.3
        common = (returned.sum(axis=0) + np.minimum(prior, 0.5)) / (at_risk.sum(axis=0) + 1)
        rate = (returned + PRIOR * common) / (at_risk + PRIOR)
        hazard = np.clip(1 - np.exp(-rate), 0, 0.99)
        self.worth = _best_ratio(hazard).tolist()
        keep = np.exp(-self._fresh / _MEMORY)[:, None]
        self._returned *= keep
        self._waited *= keep
        self._fresh[:] = 0

    def learned(self) -> dict[str, Any]:
        """What is known, for the next process."""
        self._settle()
        return {"returned": self._returned.tolist(), "waited": self._waited.tolist()}

    def recall(self, learned: Mapping[str, Any]) -> None:
        try:
            found = [np.array(learned[name], dtype=float) for name in ("returned", "waited")]
        except (KeyError, TypeError, ValueError):
            return
        if any(counts.shape != self._returned.shape for counts in found):
            return
        if all(np.isfinite(counts).all() and (counts >= 0).all() for counts in found):
            self._returned, self._waited = found
            self.refresh()


def _below(ages: np.ndarray) -> np.ndarray:
    """Seconds that all of these ages have in each bin."""
    ages = np.sort(ages)
    sums = np.concatenate([[0.0], np.cumsum(ages)])
    lows, highs = _LOWS, _LOWS + _WIDTHS
    at_low, at_high = np.searchsorted(ages, lows), np.searchsorted(ages, highs)
    within = sums[at_high] - sums[at_low] - lows * (at_high - at_low)
    return within + _WIDTHS * (len(ages) - at_high)


def _unknown() -> np.ndarray:
    return 1 / (_MIDDLES + 60)


def _best_ratio(hazard: np.ndarray) -> np.ndarray:
    """The Gittins index by group and bin, from the chance of a return in each bin of those that reach it."""
    groups, bins = hazard.shape
    waiting = np.triu(np.ones((bins, bins), bool))
    """Whether who waits from the bin of the row on is still waiting in that of the column, of all horizons."""
    chance = np.where(waiting, hazard[:, None, :], 0)
    staying = np.cumprod(1 - chance, axis=2)
    reaching = np.concatenate([np.ones((groups, bins, 1)), staying[:, :, :-1]], axis=2)
    returns = np.cumsum(reaching * chance, axis=2)
    kept = np.cumsum(np.where(waiting, _WIDTHS * (reaching + staying) / 2, 0), axis=2)
    return np.divide(returns, kept, out=np.zeros_like(kept), where=waiting).max(axis=2)
