"""Finding out whether a model continues its own cache correctly, by asking the model.

Layers with a running state have two ways to compute: one over many tokens, one over a single one. In some models the
first begins from nothing whatever the cache holds (Mamba, without its kernels): they go on rightly one token at a time
only, and wrongly, without a word, where several are fed. Others look at tokens that come later: what they make of a
token is of no use once the text is longer.
"""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache

from ..model.cacheless import cacheless
from ..model.structure import decoder_layers
from .known import Known
from .positions import ordinary_ids

logger = logging.getLogger("hf_attnstore")

Continues = Literal["", "parts", "steps"]
"""How a model goes on after what its cache holds: in `parts` of any length, in `steps` of one token, or not at all."""

_HISTORY, _NEW = 21, 6
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""By dtype: how far logits may be from those of one forward, relative to the largest."""


_AHEAD: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "use_bidirectional_attention": (True, "all"),
}
"""Settings by which a configuration says that tokens see those that come later."""


@dataclass(frozen=True)
class Continuing:
    """How a model goes on after what its cache holds."""

    how: Continues
    problem: str = ""
    """Why it does not go on; empty if it does."""


def _decoded(note: Mapping[str, Any]) -> Continuing:
    if note["how"] not in ("", "steps", "parts"):
        raise ValueError("another way to go on")
    return Continuing(note["how"], str(note.get("problem", "")))


CONTINUING: Known[Continuing] = Known("/continues", "version", 2, asdict, _decoded)
"""The version is to be raised when verdicts may change."""


def is_verified(model: nn.Module, layers: int) -> bool:
    """Whether it is known of a model of transformers, by the sweep over all of them, that it continues in parts.

    The sweep tried one class of each family as a decoder: other heads, and layers that were told to look at what comes
    later, have to be asked.

    Args:
        layers: how many the model's cache has.
    """
    config: Any = model.config
    if not type(model).__module__.startswith("transformers.models."):
        return False
    if _verified().get(config.model_type) != type(model).__name__ or looks_ahead(model):
        return False
    parts = decoder_layers(model, layers) or [model]
    switches = (
        getattr(m, name, None) for part in parts for m in part.modules() for name in ("is_causal", "is_decoder")
    )
    return not any(switch is False for switch in switches)


@cache
def _verified() -> Mapping[str, str]:
    """By `config.model_type`, the class that was tried."""
    found: Mapping[str, str] = json.loads(files(__package__).joinpath("verified.json").read_text())["classes"]
    return found


def looks_ahead(model: nn.Module) -> str:
    """Why what a model makes of a token depends on those that come later, where that needs no asking; else empty."""
    config: Any = model.config
    for part in (config, config.get_text_config(decoder=True)):
        for name, values in _AHEAD.items():
            value = getattr(part, name, None)
            if any(value is ahead or (isinstance(ahead, str) and value == ahead) for ahead in values):
                return f"its tokens see those that come later ({name}={value})"
    # BigBird attends so to texts of some length only; and being asked with short ones, it would stop doing so for good
    if any(getattr(module, "attention_type", None) == "block_sparse" for module in model.modules()):
        return "in long texts its tokens see those that come later (block sparse attention)"
    return ""


def probe_continuing(model: nn.Module, cache_name: str) -> Continuing:
    """How a model goes on after what its cache holds. Runs a few short forwards; changes nothing.

    Any doubt, such as a history that makes no difference, is a no.
    """
    problem = cacheless(model) or looks_ahead(model)
    if problem:
        return Continuing("", problem)
    try:
        how = _probe(model, cache_name)
    except Exception as error:
        logger.debug("probing how %s continues failed", type(model).__name__, exc_info=True)
        return Continuing("", f"it can't be asked how it goes on after what its cache holds ({error})")
    return Continuing(how, "" if how else "given its tokens in parts, with a cache, it computes something else")


def _probe(model: nn.Module, cache_name: str) -> Continues:
    config: Any = model.config
    few = ordinary_ids(config, config.get_text_config(decoder=True)).tolist()
    total = _HISTORY + _NEW
    ids = torch.tensor([few[(n * n + n // 3) % len(few)] for n in range(total)])
    whole = _last_output(model, cache_name, ids, [total])
    tolerance = _TOLERANCE.get(whole.dtype, 8e-2)

    def off(parts: Sequence[int]) -> float:
        logits = _last_output(model, cache_name, ids[-sum(parts) :], parts).double()
        return float((logits - whole.double()).abs().max() / whole.double().abs().max().clamp_min(1e-30))

    if off([_NEW]) < 4 * tolerance:
        return ""  # what came before makes no difference: nothing could be told by it
    if off([_HISTORY, _NEW - 1, 1]) <= tolerance and off([_HISTORY, _NEW]) <= tolerance:
        return "parts"
    return "steps" if off([_HISTORY, *[1] * _NEW]) <= tolerance else ""


@torch.no_grad()
def _last_output(model: nn.Module, cache_name: str, ids: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    """What is said after the last of `ids`, fed in parts of so many tokens."""
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    device = next(p.device for p in model.parameters() if p.device.type != "meta")
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    last = torch.empty(0)
    start = 0
    for part in ids.split(list(parts)):
        inputs: dict[str, Any] = {"input_ids": part[None].to(device), cache_name: cache, "use_cache": True}
        if "position_ids" in parameters:
            inputs["position_ids"] = torch.arange(start, start + len(part), device=device)[None]
        last = _last(model(**inputs)).detach().cpu()
        start += len(part)
    return last


def _last(output: Any) -> torch.Tensor:
    """What a model says after its last token, `[numbers]`, whatever it is for: logits, labels, or the states that a
    head would make these of."""
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits[0, -1], output.end_logits[0, -1]])
    said: torch.Tensor | None = getattr(output, "logits", None)
    said = output.last_hidden_state if said is None else said
    return said[0, -1] if said.ndim > 2 else said[0]
