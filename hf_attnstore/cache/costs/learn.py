"""What computing and loading cost on this machine, learned while they happen. Pure bookkeeping, without torch.

A cost is a straight combination of a few terms with factors that are never negative, fitted to what was observed so
that outliers count little and old observations ever less, and corrected where observations lie close by. All times
are in seconds.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

COSTS_VERSION = 1

ENOUGH = 3
"""Observations after which a prediction is relied on."""
REACH = 4.0
"""How many times as far as the largest observation a prediction is relied on."""
CAUTIOUS_REACH = 64.0
"""The same, of a prediction that takes what is beyond the largest observation for more expensive than it will be."""

_PER_BUCKET = 8
_CLOSE = 0.25
"""Observations whose sizes differ by this factor, about, speak for each other."""
_PRIOR = 1.2
"""How many observations close by the fit itself counts for: one alone may be an accident."""
_SURPRISE = math.log(2.0)
_NEWS = math.log(1.25)
"""An observation this far off what was predicted is fitted at once; others wait until they are some of all."""
_SOME = 1 / 4
_EPSILON = 1e-9
_STEPS = 6

Terms = Callable[[np.ndarray], np.ndarray]


class Fit:
    """Seconds as a function of one or more sizes.

    Args:
        terms: for points `[count, sizes]`, the terms `[count, terms]` whose weighted sum is the time.
        half_life: observations after which one counts half.
        capacity: observations kept.
    """

    def __init__(self, terms: Terms, half_life: float, capacity: int) -> None:
        self._terms = terms
        self._fade = 0.5 ** (1 / half_life)
        self._capacity = capacity
        self._points: list[tuple[float, ...]] = []
        self._seconds: list[float] = []
        self._weights: list[float] = []
        self._factors: np.ndarray | None = None
        self._near = (np.empty(0), np.empty(0), np.empty(0))
        """Of the observations, in order of how far they are off the fit: sizes and offset (logarithms), and weight.
        Among them is the fit itself, which is off by nothing, near everything."""
        self._waiting = 0
        """Observations since the last fit, all of them about as predicted."""
        self._surprises = 0
        self.count = 0
        """Observations ever made."""
        self.surprised = False
        """Whether the last observation was far from what was predicted."""

    def __len__(self) -> int:
        return len(self._points)

    def observe(self, point: Sequence[float], seconds: float) -> None:
        """Takes in that something of these sizes has taken so long. What makes no sense is left out."""
        values = (*point, seconds)
        if not all(math.isfinite(value) and value >= 0 for value in values) or seconds <= 0:
            return
        off = self._off(point, seconds)
        self._notice_surprise(off)
        self._weights = [weight * self._fade for weight in self._weights]
        self._points.append(tuple(float(value) for value in point))
        self._seconds.append(float(seconds))
        self._weights.append(1.0)
        self.count += 1
        self._forget()
        self._waiting += 1
        if abs(off) > _NEWS or self._waiting > _SOME * len(self._points):
            self._factors = None

    def _off(self, point: Sequence[float], seconds: float) -> float:
        """How far an observation is off what is predicted, as a logarithm; 0 while nothing is relied on."""
        if self.count < ENOUGH:
            return 0.0
        return math.log(seconds / float(self.predict(np.array([point], dtype=float))[0]))

    def _notice_surprise(self, off: float) -> None:
        """Two observations in a row that are far off in the same direction: what was learned before is out of date."""
        self.surprised = False
        if abs(off) < _SURPRISE:
            self._surprises = 0
            return
        self.surprised = True
        self._surprises = max(self._surprises, 0) + 1 if off > 0 else min(self._surprises, 0) - 1
        if abs(self._surprises) >= 2:  # the surprise before this one goes on counting
            self._weights = [weight / 32 for weight in self._weights[:-1]] + self._weights[-1:]

    def _forget(self) -> None:
        """Of similar sizes only the last few observations stay, and not too many of all."""
        bucket = _bucket(self._points[-1])
        same = [place for place, point in enumerate(self._points) if _bucket(point) == bucket]
        gone = same[0] if len(same) > _PER_BUCKET else 0 if len(self._points) > self._capacity else None
        if gone is not None:
            del self._points[gone], self._seconds[gone], self._weights[gone]

    def largest(self, size: int) -> float:
        """The largest of the sizes of that number that were observed; 0 if none was."""
        return max((point[size] for point in self._points), default=0.0)

    def predict(self, points: np.ndarray, *, corrected: bool = True) -> np.ndarray:
        """Seconds `[count]` for points `[count, sizes]`. There must have been an observation.

        Args:
            corrected: where observations lie close by. Without, it is the formula alone.
        """
        self.refresh()
        assert self._factors is not None
        base: np.ndarray = np.maximum(self._terms(points) @ self._factors, _EPSILON)
        if not corrected:
            return base
        places, offs, weights = self._near
        apart = (np.log1p(points)[:, None] - places) / _CLOSE
        apart[:, np.isnan(places[:, 0])] = 0.0
        # the weighted median of how far observations close by are off
        share = np.cumsum(weights * np.exp(-np.einsum("ijk,ijk->ij", apart, apart) / 2), axis=1)
        middle = (share >= share[:, -1:] / 2).argmax(axis=1)
        found: np.ndarray = base * np.exp(offs[middle])
        return found

    def refresh(self) -> None:
        """Fits anew, where something that was observed since the last time asks for it: at the end of a turn rather
        than while somebody waits."""
        if self._factors is not None:
            return
        self._waiting = 0
        points, seconds, weights = np.array(self._points), np.array(self._seconds), np.array(self._weights)
        terms = self._terms(points)
        self._factors = _least_deviations(terms, seconds, weights)
        offs = np.log(seconds / np.maximum(terms @ self._factors, _EPSILON))
        places = np.concatenate([np.log1p(points), np.full((1, points.shape[1]), np.nan)])
        offs, weights = np.append(offs, 0.0), np.append(weights, _PRIOR)
        order = np.argsort(offs)
        self._near = places[order], offs[order], weights[order]

    def to_json(self) -> dict[str, Any]:
        found = zip(self._points, self._seconds, strict=True)
        return {"samples": [[*map(_short, point), _short(seconds)] for point, seconds in found]}

    def take_in(self, found: Mapping[str, Any]) -> None:
        """Begins with what another process has learned, which counts half of what is observed from now on.

        Raises:
            IndexError, KeyError, TypeError, ValueError: it is something else.
        """
        for *point, seconds in [[float(value) for value in sample] for sample in found["samples"]]:
            self._terms(np.array([point]))  # raises where the number of sizes is another
            self.observe(point, seconds)
        self._weights = [weight / 2 for weight in self._weights]
        self._surprises, self.surprised, self._factors = 0, False, None


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _bucket(point: Sequence[float]) -> tuple[int, ...]:
    return tuple(int(2 * math.log2(1 + value)) for value in point)


def _least_deviations(terms: np.ndarray, seconds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The factors, none negative, that make the sum of weighted relative deviations small."""
    scale = np.maximum(terms.max(axis=0), _EPSILON)
    rows = terms / scale / seconds[:, None]
    trust = weights
    factors = np.zeros(rows.shape[1])
    for _ in range(_STEPS):
        trusted = rows * trust[:, None]
        found = _non_negative(trusted.T @ rows, trusted.sum(axis=0))
        if np.abs(found - factors).max() <= 1e-3 * np.abs(found).max():
            break
        factors = found
        trust = weights / np.maximum(np.abs(rows @ factors - 1), 0.02)
    result: np.ndarray = factors / scale
    return result


def _non_negative(square: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The factors x, none negative, for which x * square * x - 2 * right * x is smallest. Of a few terms: tries which
    of them are nothing."""
    count = len(right)
    # where sizes hardly differ, terms share what they explain
    square = square + 1e-7 * np.trace(square) * np.eye(count)
    best, least = np.zeros(count), 0.0
    for size in range(count, 0, -1):
        for chosen in map(list, combinations(range(count), size)):
            found = np.linalg.solve(square[np.ix_(chosen, chosen)], right[chosen])
            # at the solution the error is this, so that the largest set without negative factors need not be the best
            error = -float(right[chosen] @ found)
            if found.min() >= 0 and error < least:
                best, least = np.zeros(count), error
                best[chosen] = found
        if size == count and least < 0:
            break  # nothing held back, nothing better
    return best


def _prefill_terms(points: np.ndarray) -> np.ndarray:
    history, new = points[:, 0], points[:, 1]
    pairs = new * new / 2
    # behind a history, attention by a mask computes the pairs that are masked, too
    return np.stack([np.ones_like(new), new, new * history + pairs, pairs * (history > 0)], axis=1)


def _load_terms(points: np.ndarray) -> np.ndarray:
    return np.stack([np.ones(len(points)), points[:, 0]], axis=1)


class Costs:
    """What is known of one model on one device with one store. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._prefill = Fit(_prefill_terms, half_life=64, capacity=96)
        self._first = Fit(_prefill_terms, half_life=16, capacity=32)
        """Of the first forward of each process, which takes longer: for estimates where there is nothing else."""
        self._loads: dict[str, Fit] = {}
        self._layer_bytes: list[int] = []
        self.state_bytes = 0
        """Bytes of a checkpoint of running states."""
        self._kept = 0
        self._grown = False
        """Whether more tokens were computed at once than was ever written down."""

    # observing

    def observe_prefill(self, history: int, new: int, seconds: float) -> None:
        """`new` tokens were computed in one forward, after `history` others that were held."""
        with self._lock:
            self._prefill.observe((history, new), seconds)

    def observe_first(self, history: int, new: int, seconds: float) -> None:
        """The same, in the first forward of a process."""
        with self._lock:
            self._grown = self._grown or new > self._first.largest(1)
            self._first.observe((history, new), seconds)

    def observe_load(self, tier: str, nbytes: int, seconds: float) -> bool:
        """So many bytes came from a tier, and computing had to wait so long. Returns whether that is a surprise."""
        if nbytes <= 0:
            return False
        with self._lock:
            fit = self._loads.setdefault(tier, Fit(_load_terms, half_life=16, capacity=32))
            fit.observe((nbytes,), seconds)
            return fit.surprised

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of one token's KV, by layer; empty while unknown."""
        return self._layer_bytes

    @layer_bytes.setter
    def layer_bytes(self, sizes: Sequence[int]) -> None:
        self._layer_bytes = list(sizes)

    def can_choose(self) -> bool:
        """Whether enough was observed of computing, and of loading from some tier."""
        return (
            len(self._prefill) >= ENOUGH
            and any(len(fit) >= ENOUGH for fit in self._loads.values())
            and bool(self._layer_bytes)
        )

    # predicting

    def prefill(
        self,
        points: Sequence[tuple[int, int]],
        enough: int = ENOUGH,
        reach: float = CAUTIOUS_REACH,
        *,
        corrected: bool = True,
    ) -> np.ndarray | None:
        """Seconds `[count]` to compute `new` tokens after `history`, for every (history, new) of `points`.

        None where too little was observed, or only prompts `reach` times smaller. Beyond the largest that was observed,
        a token is taken to cost at least as much as it did there, where fixed costs were spread over fewer. `corrected`
        is as for `Fit.predict`.
        """
        return self._computing(self._prefill, points, enough, reach, corrected=corrected)

    def _computing(
        self, fit: Fit, points: Sequence[tuple[int, int]], enough: int, reach: float, *, corrected: bool = True
    ) -> np.ndarray | None:
        with self._lock:
            largest = fit.largest(1)
            if len(fit) < enough or max((new for _, new in points), default=0) > reach * largest:
                return None
            wanted = np.array(points, dtype=float)
            found = fit.predict(wanted, corrected=corrected)
            beyond = wanted[:, 1] > largest
            if beyond.any():
                nearer = wanted[beyond]
                factor = nearer[:, 1] / largest
                nearer[:, 1] = largest
                found[beyond] = np.maximum(found[beyond], fit.predict(nearer, corrected=corrected) * factor)
            found[wanted[:, 1] == 0] = 0.0
            return found

    def load(self, loads: Sequence[Mapping[str, int]]) -> np.ndarray | None:
        """Seconds `[count]` to load so many bytes by tier, for each of `loads`.

        None where too little was observed of a tier, or only much smaller loads.
        """
        with self._lock:
            total = np.zeros(len(loads))
            for tier in {tier for load in loads for tier, nbytes in load.items() if nbytes}:
                sizes = np.array([load.get(tier, 0) for load in loads], dtype=float)
                fit = self._loads.get(tier)
                if fit is None or len(fit) < ENOUGH or sizes.max() > REACH * fit.largest(0):
                    return None
                total += np.where(sizes > 0, fit.predict(sizes[:, None]), 0.0)
            return total

    def estimate(self, prompt: int) -> float | None:
        """Seconds to compute a prompt of so many tokens from nothing; None while unknown."""
        for fit in (self._prefill, self._first):
            found = self._computing(fit, [(0, prompt)], enough=1, reach=REACH)
            if found is not None:
                return float(found[0])
        return None

    # remembering

    def refresh(self) -> None:
        """Works out what was observed, so that the next prediction need not."""
        with self._lock:
            for fit in (self._prefill, self._first, *self._loads.values()):
                if len(fit):
                    fit.refresh()

    def worth_keeping(self) -> bool:
        """Whether so much was learned since this last said so that it should be written down."""
        with self._lock:
            count, grown = self._count(), self._grown
            if not grown and (count < min(1.5 * self._kept, self._kept + 16) or count == self._kept):
                return False
            self._kept, self._grown = count, False
            return True

    def _count(self) -> int:
        return sum(fit.count for fit in (self._prefill, self._first, *self._loads.values()))

    def to_json(self) -> dict[str, Any]:
        """As a dict for JSON."""
        with self._lock:
            return {
                "version": COSTS_VERSION,
                "prefill": self._prefill.to_json(),
                "first": self._first.to_json(),
                "loads": {tier: fit.to_json() for tier, fit in self._loads.items()},
                "layer_bytes": self._layer_bytes,
                "state_bytes": self.state_bytes,
            }

    @classmethod
    def from_json(cls, found: Mapping[str, Any] | None) -> "Costs":
        """What `to_json` gave; nothing known where that is something else."""
        costs = cls()
        if found is None or found.get("version") != COSTS_VERSION:
            return costs
        try:
            costs._prefill.take_in(found["prefill"])
            if "first" in found:
                costs._first.take_in(found["first"])
            for tier, kept in found["loads"].items():
                fit = Fit(_load_terms, half_life=16, capacity=32)
                fit.take_in(kept)
                costs._loads[str(tier)] = fit
            costs._layer_bytes = [int(size) for size in found["layer_bytes"]]
            costs.state_bytes = int(found["state_bytes"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return cls()
        costs._kept = costs._count()
        return costs
