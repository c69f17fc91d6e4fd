"""Load or recompute: how much of what is known of a prompt to reuse. Plain decisions over numbers, without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

MARGIN = 1.05
"""Recomputing has to be predicted so many times as fast as loading before it is done instead."""
LEAST_GAIN = 1e-3
"""Seconds that it has to save at least."""
_SHARE = 0.02
"""Of the time that turns take, what may go into finding out whether loading has become cheaper."""
_STALE = 8
"""Decisions after which a tier that nothing was loaded from is to be looked at again."""


class Prices(Protocol):
    """What things cost, in seconds; None where too little is known. See `costs.Costs`."""

    def prefill(self, points: Sequence[tuple[int, int]], *, corrected: bool = True) -> np.ndarray | None: ...

    def load(self, loads: Sequence[Mapping[str, int]]) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Option:
    """Reusing a prompt's first `tokens` tokens, for which so many bytes are loaded from each tier."""

    tokens: int
    load: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.load.values())


@dataclass(frozen=True)
class Choice:
    """What was chosen, of options in ascending order."""

    place: int
    """Of the option."""
    reason: str
    """In words."""
    seconds: tuple[float, ...] = ()
    """Predicted for each option; empty where that can't be predicted."""
    load_seconds: float | None = None
    """Predicted for the load of the option."""
    compute_seconds: float | None = None
    """Predicted for computing what the option leaves."""


def choose(options: Sequence[Option], prompt: int, prices: Prices, *, layers: int, overlapped: bool) -> Choice:
    """The option that is predicted to take the least time; the last one, everything, in any doubt.

    Args:
        options: in ascending order of their tokens, the first with as few as possible, the last with all.
        prompt: tokens of the whole prompt; what is not reused is computed.
        layers: of the model.
        overlapped: whether a layer is loaded while others compute. Then the longer of both is what takes time, and
            the load of the first layer, which nothing hides.
    """
    last = len(options) - 1
    most = options[last]
    if not most.nbytes:
        return Choice(last, f"reuse {most.tokens:,} of {most.tokens:,}: nothing has to be loaded")
    points = [(option.tokens, prompt - option.tokens) for option in options]
    load = prices.load([option.load for option in options])
    compute = prices.prefill(points)
    if load is None or compute is None:
        what = "loading" if load is None else "computing"
        return Choice(last, f"reuse {most.tokens:,} of {most.tokens:,}: {what} so much was not measured yet")

    def together(compute: np.ndarray) -> np.ndarray:
        return np.maximum(load, compute) + load / layers if overlapped else load + compute

    total = together(compute)
    place = int(total.argmin())
    if total[last] <= total[place] * MARGIN or total[last] - total[place] < LEAST_GAIN:
        place = last
    if place != last:
        # options are corrected by observations of their own, whose noise must not make more tokens cost less
        formula = prices.prefill(points, corrected=False)
        if formula is not None and together(formula)[last] <= together(formula)[place]:
            place = last
    reason = _reason(options, place, load, compute)
    return Choice(place, reason, tuple(total.tolist()), float(load[place]), float(compute[place]))


def _reason(options: Sequence[Option], place: int, load: np.ndarray, compute: np.ndarray) -> str:
    most, chosen = options[-1], options[place]
    again = max(float(compute[0] - compute[-1]), 0.0)  # what only the tokens in question take
    found = f"reuse {chosen.tokens:,} of {most.tokens:,}: load {_ms(float(load[-1]))}"
    if 0 < place < len(options) - 1:
        rest = max(float(compute[place] - compute[-1]), 0.0)
        return f"{found}, recompute {_ms(again)}; so many: load {_ms(float(load[place]))}, recompute {_ms(rest)}"
    return f"{found}, recompute {_ms(again)}"


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f} ms" if ms >= 10 else f"{ms:.1f} ms"


@dataclass
class Exploration:
    """Finds out whether a tier that is not loaded from any more has become faster, for a bounded price.

    Of the time that turns take by prediction, a small share may be spent on loads that are not worth while as far as
    is known. Nothing else is ever spent, so that all of it costs no more than that share.
    """

    budget: float = 0.0
    """Seconds."""
    waited: dict[str, int] = field(default_factory=dict)
    """By tier, the number of decisions since something was loaded from it."""

    def loaded(self, tier: str, *, surprise: bool = False) -> None:
        """Something was loaded from a tier. After a surprise the next look comes at once."""
        self.waited[tier] = _STALE if surprise else 0

    def adjust(self, options: Sequence[Option], choice: Choice) -> Choice:
        """The choice, or one that loads something for the sake of knowing how long that takes."""
        if not choice.seconds:
            return choice
        chosen = options[choice.place]
        cost = choice.seconds[choice.place]
        self.budget = min(self.budget + _SHARE * cost, cost)
        avoided = {
            tier for option in options for tier, nbytes in option.load.items() if nbytes and not chosen.load.get(tier)
        }
        for tier in avoided:
            self.waited[tier] = self.waited.get(tier, 0) + 1
        due = {tier for tier in avoided if self.waited[tier] >= _STALE}
        for place in range(len(options) - 1, -1, -1):
            extra = max(choice.seconds[place] - cost, 0.0)
            if extra <= self.budget and any(options[place].load.get(tier) for tier in due):
                self.budget -= extra
                return Choice(place, f"{choice.reason}; to see how long loading takes now, {options[place].tokens:,}")
        return choice
