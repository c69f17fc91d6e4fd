"""The other classes of a family (without a head, or with another one), and twins whose tokens see what comes later.

Each has two turns in a loop of forwards, across a restart. What is reused must give what a `DynamicCache` gives that
was kept, bit for bit, and what one forward over everything gives; of what sees ahead nothing may be reused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from ...cache.cache import AttentionStoreCache
from ...cache.model.argument import as_forward_takes
from ...cache.model.structure import is_encoder_decoder
from ...errors import UnsupportedModelError
from ...store.store import AttentionStore
from .attached import run_attached
from .feeding import difference, new_cache, positions, some_ids
from .reference import in_words
from .tiny import class_name, of_class

_HEADS = {
    "base": "MODEL_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
AHEAD = "bidirectional"
KINDS = (*_HEADS, AHEAD)
_SWITCHES: tuple[dict[str, Any], ...] = (
    {"is_decoder": False},
    {"use_bidirectional_attention": True},
    {"use_bidirectional_attention": "all"},
)
_FIRST, _SECOND, _LATER = 40, 9, 10
_ROUNDING = 1e-2
REUSED, NOT_KEPT, WRONG, NOT_TRIED = "reused", "not kept", "wrong", "not tried"


@dataclass
class Variant:
    """What became of another class of a family, or of its twin."""

    kind: str
    model_class: str
    verdict: str
    reason: str = ""


def examine_variants(family: str) -> list[Variant]:
    """All of a family's. Never raises: what fails is wrong."""
    found = []
    for kind, mapping in _HEADS.items():
        names: Any = getattr(modeling_auto, mapping, {}).get(family)
        name = names if isinstance(names, str) or names is None else names[0]
        if name is not None and hasattr(transformers, name) and name != class_name(family):
            found.append(_examined(kind, name, lambda name=name: of_class(family, name)))
    for make in _twins(family):
        found.append(_examined(AHEAD, class_name(family), make))
    return found


def _twins(family: str) -> Iterator[Any]:
    """How to make a family's class with tokens that see ahead: by its own settings, and by transformers'."""
    for changes in _SWITCHES:
        if _has(family, next(iter(changes))) and _sees_ahead(lambda changes=changes: _switched(family, changes)):
            yield lambda changes=changes: _switched(family, changes)
    if _sees_ahead(lambda: _switched(family, {})):
        yield lambda: _switched(family, {})


def _has(family: str, name: str) -> bool:
    try:
        config: Any = of_class(family, class_name(family)).config
    except Exception:
        return False
    return any(name in vars(part) for part in (config, config.get_text_config(decoder=True)))


def _switched(family: str, changes: dict[str, Any]) -> Any:
    if changes:
        return of_class(family, class_name(family), **changes)
    model: Any = of_class(family, class_name(family))
    model.config.is_causal = model.config.get_text_config(decoder=True).is_causal = False
    return model


def _sees_ahead(make: Any) -> bool:
    ids, other = some_ids(_FIRST, 61), some_ids(_FIRST, 62)
    try:
        model = make()
        changed = torch.cat([ids[:, :-_LATER], other[:, -_LATER:]], dim=1)
        one, two = (_said(model, given, None)[:, :-_LATER] for given in (ids, changed))
    except Exception:
        return False
    return difference(one, two) > _ROUNDING


def _examined(kind: str, name: str, make: Any) -> Variant:
    try:
        model, twin = make(), make()
        _said(twin, some_ids(_FIRST, 61), None)
        if is_encoder_decoder(twin):
            return Variant(kind, name, NOT_TRIED, "it has an encoder")
        _said(twin, some_ids(_FIRST, 61), new_cache(twin))
    except Exception as error:
        return Variant(kind, name, NOT_TRIED, in_words(error))
    try:
        with tempfile.TemporaryDirectory(prefix="attnstore-models-") as folder:
            verdict, reason = _looped(model, twin, Path(folder) / "loop", places=False)
            if verdict == WRONG:  # some models do not find out themselves where tokens are
                verdict, reason = _looped(model, twin, Path(folder) / "places", places=True)
            if kind == AHEAD:
                if verdict == REUSED:
                    return Variant(kind, name, WRONG, "what sees ahead was reused")
                how, problems = run_attached(model, twin, Path(folder) / "attached")
                if problems or how == "kept":
                    return Variant(kind, name, WRONG, "; ".join(problems) or "attached, it was reused")
        return Variant(kind, name, verdict, reason)
    except UnsupportedModelError as error:
        return Variant(kind, name, NOT_KEPT, in_words(error))
    except Exception as error:
        return Variant(kind, name, WRONG, in_words(error))


def _looped(model: Any, twin: Any, folder: Path, *, places: bool) -> tuple[str, str]:
    """The two turns; `places` says to tell the model where tokens are."""

    def told(start: int) -> int | None:
        return start if places else None

    ids = some_ids(_FIRST + _SECOND, 61)
    for count in (_FIRST, _FIRST + _SECOND):
        with AttentionStore(folder, block_size=16) as store:
            cache = AttentionStoreCache(model, "talk", store, gate=False)
            done = cache.match(ids[:, :count])
            steps = 1 if done and not cache.continues_in_parts else count
            ends = [*range(done + steps, count, steps), count]
            parts = [_said(model, ids[:, a:b], cache, told(a)) for a, b in pairwise([done, *ends])]
            cache.save()
    last, stats = parts[-1], cache.stats
    whole = _said(twin, ids, None)
    if difference(_last(last), _last(whole)) > _ROUNDING:
        kept = new_cache(twin)
        _said(twin, ids[:, :_FIRST], kept, told(0))
        if not done or difference(_last(last), _last(_said(twin, ids[:, _FIRST:], kept, told(_FIRST)))) > _ROUNDING:
            return WRONG, "other than one forward over everything"
        return WRONG, "other than one forward over everything, as with a DynamicCache"
    if not done:
        return NOT_KEPT, stats.recomputed
    if steps > 1:
        kept = new_cache(twin)
        _said(twin, ids[:, :done], kept, told(0))
        theirs = _said(twin, ids[:, done:], kept, told(done))
        if not torch.equal(last, theirs):
            return WRONG, f"off by {difference(last, theirs):.1g} from a DynamicCache that was kept"
    return REUSED, ""


@torch.no_grad()
def _said(model: Any, ids: torch.Tensor, cache: Any, start: int | None = None) -> torch.Tensor:
    """What a model says of the tokens that it is fed, whatever it is for. They come after `start` others, where it
    is to be told."""
    passed: dict[str, Any] = {"use_cache": cache is not None, **as_forward_takes(model, cache)}
    if start is not None:
        passed |= positions(model, start, ids.shape[1])
    output = model(input_ids=ids, **passed)
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits], dim=-1).clone()
    said: torch.Tensor = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    return said.clone()


def _last(said: torch.Tensor) -> torch.Tensor:
    return said[0, -1] if said.ndim > 2 else said[0]
