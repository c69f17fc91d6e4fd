"""Whether transformers' own cache continues a model correctly: if it does not, nobody else's can be measured by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ...cache.model.cacheless import cacheless
from .feeding import cache_argument, difference, feed_parts, feed_whole, generate, new_cache, recorded, some_ids

_FIRST, _SECOND, _SINGLE = 37, 12, 4
"""Tokens of the first turn, of the second, and fed one by one after it."""
_LONG = 64
_LOOSE = 5e-3
"""The same over several turns with many steps of one token, where some models are less exact."""
_TOLERANCE = 1e-4
"""How far logits may be apart, relative to the largest, where kernels of other shapes computed them."""
ONE_BY_ONE = "after the first turn it takes tokens rightly one by one only"
_LEAST_EFFECT = 1e-3
"""How much another history must change the logits: with less, continuing rightly or wrongly would look alike."""


@dataclass(frozen=True)
class Reference:
    """What was measured of a model with a `DynamicCache`."""

    reason: str
    """Why it can't be a reference; empty if it can."""
    runs: bool = True
    """Whether it can be run on token ids alone, so that its output can be compared at all."""
    note: str = ""
    """What else is to be said of it: `generate` may fail to continue what a loop does."""
    cache_argument: str = ""
    """The name under which the forward takes its cache."""

    @property
    def continues(self) -> bool:
        """Whether a `DynamicCache` continues this model correctly."""
        return not self.reason


def examine(model: Any) -> Reference:
    """Continues a model with a `DynamicCache`, in a loop and in `generate`, and compares with computing everything.

    The loop decides: what it does not continue has no right answer to compare with.
    """
    problem = _tried(_runs, model)
    if problem:
        return Reference(f"it can't be run on token ids alone: {problem}", runs=False)
    name = cache_argument(model)
    if name is None or "takes no cache" in cacheless(model):
        return Reference("its forward takes no cache")
    for what, step in (
        ("a DynamicCache can't be made for it", _makes_cache),
        ("a DynamicCache can't be continued in a loop", _continues),
    ):
        problem = _tried(step, model)
        if problem:
            return Reference(f"{what}: {problem}", cache_argument=name)
    problem = _tried(_generates, model)
    note = f"generate does not continue a DynamicCache ({problem}), a loop does" if problem else ""
    return Reference("", note=note, cache_argument=name)


def _tried(step: Callable[[Any], str], model: Any) -> str:
    try:
        return step(model)
    except Exception as error:
        return in_words(error)


def in_words(error: BaseException) -> str:
    """An exception in one line."""
    package = re.search(r"requires the (\S+) library", str(error)) if isinstance(error, ImportError) else None
    if package is not None:
        return f"needs the package {package[1]}"
    lines = str(error).strip().splitlines()
    text = " ".join(line.strip() for line in lines)[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _makes_cache(model: Any) -> str:
    return "" if new_cache(model).layers else "its configuration names no layers"


def _runs(model: Any) -> str:
    first, other = some_ids(_FIRST, 1), some_ids(_FIRST, 2)
    second = some_ids(_SECOND, 3)
    logits = feed_whole(model, torch.cat([first, second], dim=1))
    if logits.ndim != 3 or logits.shape[:2] != (1, _FIRST + _SECOND):
        return f"its logits are {list(logits.shape)} for {_FIRST + _SECOND} tokens"
    if not torch.isfinite(logits).all():
        return "its logits are not finite"
    if not torch.equal(logits, feed_whole(model, torch.cat([first, second], dim=1))):
        return "it does not give the same logits twice"
    if difference(feed_whole(model, torch.cat([other, second], dim=1))[:, -1], logits[:, -1]) < _LEAST_EFFECT:
        return "what came before changes nothing"
    long = some_ids(_LONG, 4)
    off = max(
        difference(logits[:, :_FIRST], feed_whole(model, first)),
        difference(feed_whole(model, long)[:, : _FIRST + _SECOND], feed_whole(model, long[:, : _FIRST + _SECOND])),
    )
    return f"its logits depend on tokens that come later (by {off:.1g})" if off > _TOLERANCE else ""


def _continues(model: Any) -> str:
    ids = torch.cat([some_ids(_FIRST, 1), some_ids(_SECOND + _SINGLE, 3)], dim=1)
    whole = feed_whole(model, ids)

    def off(parts: Sequence[int], places: bool) -> float:
        return difference(feed_parts(model, ids, parts, new_cache(model), places=places), whole)

    turns = [_FIRST, _SECOND, *[1] * _SINGLE]
    best = min(off(turns, False), off(turns, True))
    if best <= _TOLERANCE:
        return ""
    if min(off([_FIRST, *[1] * (_SECOND + _SINGLE)], places) for places in (False, True)) <= _TOLERANCE:
        return f"{ONE_BY_ONE} (else logits differ by {best:.1g})"
    if difference(feed_parts(model, ids, turns, DynamicCache(), places=True), whole) <= _TOLERANCE:
        return f"logits differ by {best:.1g} from those of one forward, but not without the windows that it states"
    return f"logits differ by {best:.1g} from those of one forward"


def _generates(model: Any) -> str:
    cache = new_cache(model)
    prompt = some_ids(_FIRST, 1)
    for turn in ("first", "second", "third"):
        with recorded(model) as fed:
            kept = generate(model, prompt, cache)
        fresh = generate(model, prompt, None)
        off = max(difference(a, b) for a, b in zip(kept.logits, fresh.logits, strict=True))
        if off > _LOOSE or not torch.equal(kept.sequences, fresh.sequences):
            again = turn != "first" and fed[0].shape[1] == prompt.shape[1]
            how = "all of the prompt is fed again" if again else f"logits differ by {off:.1g}"
            return f"in the {turn} turn {how}"
        prompt = torch.cat([kept.sequences, some_ids(_SECOND, 3)], dim=1)
    return ""
