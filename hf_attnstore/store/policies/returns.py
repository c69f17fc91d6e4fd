"""When do conversations come back? Statistics by group, and what they say of a block's worth."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

EDGES = (0.0, *(float(1.35**power) for power in range(46)))
"""Ages in seconds at which bins begin: up to about a week, finer at the beginning."""
BINS = len(EDGES)
_WIDTHS = np.diff(np.array([*EDGES, EDGES[-1] * 1.35]))
_MIDDLES = np.array(EDGES) + _WIDTHS / 2
PRIOR = 5.0
"""What a group of which little is known counts as: so many conversations that behave as those of all groups do."""
_FORGET = 50_000
"""Returns of a group after which old ones begin to count less."""


def bin_of(age: float) -> int:
    """The bin of an age in seconds; what lies in the future counts as now."""
    return max(bisect_right(EDGES, age) - 1, 0)


class Returns:
    """Return times of conversations by group, also of those that have not come back yet.

    The worth of waiting for one that has been away for some time is the best ratio of (chance of a return within a
    horizon) to (time that its blocks take room until then), over all horizons: the Gittins index of keeping it. Nothing
    is assumed of the distribution; that many never return at all shows in it.
    """

    def __init__(self, groups: int) -> None:
        self._returned = np.zeros((groups, BINS))
        self._lost = np.zeros(groups)
        """Conversations that are no longer waited for."""
        self._before = np.zeros((groups, BINS))
        """Those that an earlier process waited for, by how long they had been away when it ended."""
        self.worth = np.tile(_unknown(), (groups, 1)).tolist()
        """By group and bin of the age: expected returns per second of keeping."""

    def returned(self, group: int, age: float) -> None:
        """A conversation of `group` came back after `age` seconds."""
        self._returned[group, bin_of(age)] += 1

    def lost(self, group: int, count: float = 1) -> None:
        """A conversation is given up: it counts as one that never returns."""
        self._lost[group] += count

    def refresh(self, waiting: Iterable[tuple[int, float]]) -> None:
        """Works the worth out again.

        Args:
            waiting: group and age in seconds of every conversation that has not come back.
        """
        away = self._before + self._count(waiting)
        away[:, -1] += self._lost
        too_many = self._returned.sum(axis=1) > _FORGET
        for counts in (self._returned, self._lost, self._before):
            counts[too_many] /= 2
        returned, at_risk = self._returned, _at_risk(self._returned, away)
        # groups lean on what is known of all, and that on a curve which falls with age: so ages order what nobody knows
        prior = 1 / (_MIDDLES + 60) * _WIDTHS * 0.3
        common = (returned.sum(axis=0) + np.minimum(prior, 0.5)) / (at_risk.sum(axis=0) + 1)
        hazard = np.clip((returned + PRIOR * common) / (at_risk + PRIOR), 0, 0.99)
        self.worth = _best_ratio(hazard).tolist()

    def _count(self, waiting: Iterable[tuple[int, float]]) -> np.ndarray:
        counts = np.zeros_like(self._returned)
        for group, age in waiting:
            counts[group, bin_of(age)] += 1
        return counts

    def learned(self, waiting: Iterable[tuple[int, float]]) -> dict[str, Any]:
        """What is known, for the next process, which will not know those that are `waiting`."""
        away = self._before + self._count(waiting)
        return {"returned": self._returned.tolist(), "lost": self._lost.tolist(), "away": away.tolist()}

    def recall(self, learned: Mapping[str, Any]) -> None:
        try:
            found = [np.array(learned[name], dtype=float) for name in ("returned", "lost", "away")]
        except (KeyError, TypeError, ValueError):
            return
        shapes = [self._returned.shape, self._lost.shape, self._before.shape]
        if [counts.shape for counts in found] != shapes:
            return
        if all(np.isfinite(counts).all() and (counts >= 0).all() for counts in found):
            self._returned, self._lost, self._before = found
            self.refresh(())


def _unknown() -> np.ndarray:
    return 1 / (_MIDDLES + 60)


def _at_risk(returned: np.ndarray, away: np.ndarray) -> np.ndarray:
    """How many could have returned in each bin: those that were away for all of it, and half of those that have been
    away for a part of it until now."""
    total = returned + away
    reached = total[:, ::-1].cumsum(axis=1)[:, ::-1]
    return reached - away / 2


def _best_ratio(hazard: np.ndarray) -> np.ndarray:
    """The Gittins index by group and bin, from the chance of a return in each bin of those that reach it."""
    groups, bins = hazard.shape
    best = np.zeros((groups, bins))
    for first in range(bins):
        staying = np.cumprod(1 - hazard[:, first:], axis=1)
        reaching = np.concatenate([np.ones((groups, 1)), staying[:, :-1]], axis=1)
        returns = np.cumsum(reaching * hazard[:, first:], axis=1)
        kept = np.cumsum(_WIDTHS[first:] * (reaching + staying) / 2, axis=1)
        best[:, first] = (returns / kept).max(axis=1)
    return best
