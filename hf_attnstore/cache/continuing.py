"""Finding out whether a model continues its own cache correctly, by asking the model.

Layers with a running state have two ways to compute: one over many tokens, one over a single one. In some models the
first begins from nothing whatever the cache holds (Mamba, without its kernels): they go on rightly one token at a time
only, and wrongly, without a word, where several are fed.
"""

import inspect
import json
import logging
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache

from .probing import ordinary_ids

logger = logging.getLogger("hf_attnstore")

Continues = Literal["", "parts", "steps"]
"""How a model goes on after what its cache holds: in `parts` of any length, in `steps` of one token, or not at all."""

CONTINUING_VERSION = 1
"""To be raised when verdicts may change: those of other versions are not believed."""

_HISTORY, _NEW = 21, 6
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""By dtype: how far logits may be from those of one forward, relative to the largest."""


def is_verified(model: nn.Module) -> bool:
    """Whether it is known of a model of transformers, by the sweep over all of them, that it continues in parts."""
    config: Any = model.config
    return type(model).__module__.startswith("transformers.models.") and config.model_type in _verified()


@cache
def _verified() -> frozenset[str]:
    found = files(__package__).joinpath("verified.json").read_text()
    return frozenset(json.loads(found)["model_types"])


def probe_continuing(model: nn.Module, cache_name: str) -> Continues:
    """How a model goes on after what its cache holds. Runs a few short forwards; changes nothing.

    Any doubt, such as a history that makes no difference, is a no.
    """
    try:
        return _probe(model, cache_name)
    except Exception:
        logger.debug("probing how %s continues failed", type(model).__name__, exc_info=True)
        return ""


def _probe(model: nn.Module, cache_name: str) -> Continues:
    config: Any = model.config
    few = ordinary_ids(config, config.get_text_config(decoder=True)).tolist()
    total = _HISTORY + _NEW
    ids = torch.tensor([few[(n * n + n // 3) % len(few)] for n in range(total)])
    whole = _last_logits(model, cache_name, ids, [total])
    tolerance = _TOLERANCE.get(whole.dtype, 8e-2)

    def off(parts: Sequence[int]) -> float:
        logits = _last_logits(model, cache_name, ids[-sum(parts) :], parts).double()
        return float((logits - whole.double()).abs().max() / whole.double().abs().max().clamp_min(1e-30))

    if off([_NEW]) < 4 * tolerance:
        return ""  # what came before makes no difference: nothing could be told by it
    if off([_HISTORY, _NEW - 1, 1]) <= tolerance and off([_HISTORY, _NEW]) <= tolerance:
        return "parts"
    return "steps" if off([_HISTORY, *[1] * _NEW]) <= tolerance else ""


@torch.no_grad()
def _last_logits(model: nn.Module, cache_name: str, ids: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    """The logits after the last of `ids`, fed in parts of so many tokens."""
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    device = next(p.device for p in model.parameters() if p.device.type != "meta")
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    logits = torch.empty(0)
    start = 0
    for part in ids.split(list(parts)):
        inputs: dict[str, Any] = {"input_ids": part[None].to(device), cache_name: cache, "use_cache": True}
        if "position_ids" in parameters:
            inputs["position_ids"] = torch.arange(start, start + len(part), device=device)[None]
        logits = model(**inputs).logits[0, -1].detach().cpu()
        start += len(part)
    return logits
