"""The reuse plan of a turn: how much of a prompt to reuse, and where it comes from. Numbers only: no tensors, no cache.

What the layers hold, what the store has and what loading costs come as numbers and as questions that can be asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..session.matching import Checkpoint
from ..session.spans import Span, crop, overlapping, total_tokens
from .costs.decide import Choice

_MAX_CHECKPOINTS = 3
"""How many checkpoints of a text are considered: the longest, then each of clearly fewer tokens than the one before."""
_MOST_OPTIONS = 64


@dataclass(frozen=True)
class Resident:
    """What layers hold of a prompt already."""

    own: int
    """How many of its leading tokens."""
    covers: Callable[[int, Sequence[Span]], bool]
    """Whether they hold, or spans have, all that is needed to go on after so many tokens."""
    has_states: bool
    states_at: int | None
    """The number of tokens that their running states are right for."""

    def states(self, spans: Sequence[Span]) -> int:
        """How many tokens they can go on after with their running states; 0 if after none."""
        at = self.states_at or 0
        return at if at <= self.own and self.covers(at, spans) else 0


@dataclass(frozen=True)
class CostModel:
    """What a choice between loading and computing goes by."""

    floor: Callable[[int], int]
    """Of so many tokens, how many are always loaded."""
    can_choose: Callable[[], bool]
    choose: Callable[[Sequence[int], Sequence[Span], int, dict[int, bytes]], Choice]
    """Which of several lengths, rising, of a prompt of so many tokens; with checkpoints by their number of tokens."""


@dataclass(frozen=True)
class Plan:
    """How much of a prompt is reused, and where that comes from."""

    spans: Sequence[Span]
    """Where the store has the first tokens."""
    matched: int
    """How many leading tokens are known; without running states for them perhaps."""
    known: int
    """How many of them could be reused."""
    length: int
    """How many are."""
    checkpoint: Checkpoint | None = None
    choice: Choice | None = None

    @property
    def computes_known(self) -> bool:
        """Whether some of what could be reused is computed, as that is faster."""
        return self.choice is not None and self.length < self.known


def plan_reuse(
    ids: np.ndarray,
    limit: int,
    spans: Sequence[Span],
    resident: Resident,
    whole: Callable[[int], int],
    find_checkpoint: Callable[[np.ndarray], Checkpoint | None],
    costs: CostModel | None,
) -> Plan:
    """Plans what to reuse of the first `limit` tokens of `ids`.

    Args:
        spans: where the store has the first tokens, at most `limit`.
        whole: the longest beginning of at most so many tokens that cuts nothing that belongs together.
        find_checkpoint: the longest one of a text.
        costs: None where all that is known is reused.
    """
    from_store = whole(total_tokens(spans))
    spans = crop(spans, from_store)
    length = max(resident.own, from_store)
    if resident.own > from_store and not resident.covers(resident.own, spans):
        length = from_store  # a sliding layer has let go of what it would need to stay at `own`
    matched, checkpoint = length, None
    if resident.has_states:
        length, checkpoint = _with_states(ids[:length], spans, resident, find_checkpoint)
    plan = Plan(spans, matched, length, length, checkpoint)
    if costs is None or not length or limit >= len(ids):  # all is wanted here, and not for the sake of what comes after
        return plan
    return _load_or_compute(ids, plan, resident, whole, find_checkpoint, costs)


def _with_states(
    ids: np.ndarray,
    spans: Sequence[Span],
    resident: Resident,
    find_checkpoint: Callable[[np.ndarray], Checkpoint | None],
) -> tuple[int, Checkpoint | None]:
    """How much of `ids`, all of which is known, running states are there for: those in the layers, or those of the
    longest checkpoint."""
    there = resident.states(spans)
    found = find_checkpoint(ids)
    if found is not None and not resident.covers(found.tokens, spans):
        found = find_checkpoint(ids[: total_tokens(spans)])
    if found is None or found.tokens <= there:
        return there, None
    return found.tokens, found


def _load_or_compute(
    ids: np.ndarray,
    plan: Plan,
    resident: Resident,
    whole: Callable[[int], int],
    find_checkpoint: Callable[[np.ndarray], Checkpoint | None],
    costs: CostModel,
) -> Plan:
    """Reuses as much as is faster to load than to compute. What the layers hold is free."""
    length, spans = plan.known, plan.spans
    floor = min(costs.floor(length), length)
    found: dict[int, Checkpoint] = {}
    if resident.has_states:
        lengths = [resident.states(spans)]
        shorter = plan.checkpoint
        while shorter is not None and shorter.tokens > lengths[0]:
            found[shorter.tokens] = shorter
            again = costs.can_choose() and len(found) < _MAX_CHECKPOINTS
            shorter = find_checkpoint(ids[: shorter.tokens * 3 // 4]) if again else None
        lengths = sorted({n for n in (*lengths, *found) if n >= floor} | {length})
    else:
        floor = max(floor, resident.own if resident.covers(resident.own, spans) else 0)
        lengths = sorted({whole(n) for n in lengths_between(floor, length, spans)} | {length})
    if len(lengths) < 2:
        return plan
    choice = costs.choose(lengths, spans, len(ids), {tokens: point.key for tokens, point in found.items()})
    chosen = lengths[choice.place]
    return Plan(spans, plan.matched, length, chosen, found.get(chosen), choice)


def lengths_between(floor: int, length: int, spans: Sequence[Span]) -> list[int]:
    """Where reuse may end: at `floor`, at the end of a block, or at `length`; not at too many places."""
    ends = [span.last for span in overlapping(spans, floor, length) if floor < span.last < length]
    step = -(-len(ends) // _MOST_OPTIONS) or 1
    return [floor, *ends[::step], length]
