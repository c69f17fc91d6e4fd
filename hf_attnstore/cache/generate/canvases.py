"""`generate` of models that refine whole blocks of tokens, canvases (DiffusionGemma): it is given what a cache does not
hold yet, and its result is of the whole conversation.

An encoder writes the cache, as any causal model does: of the prompt, then of each canvas but the last. The decoder sees
all of its canvas, and only reads the cache while it refines it.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..cache import AttentionStoreCache
from ..inputs.content import TYPES
from ..model.argument import cache_in
from .streamer import WholePromptStreamer

_DEFAULT_NEW = 256
"""What its `generate` makes where nobody says how much, and takes for nobody having said so."""


def canvas_tokens(model: nn.Module, named: Callable[[str], Any], length: int) -> int:
    """How many tokens a `generate` makes after `length` tokens: whole canvases.

    Args:
        named: a generation setting by name, as `generate` will see it.
    """
    config: Any = model.config
    new, longest = named("max_new_tokens") or _DEFAULT_NEW, named("max_length")
    if longest and new == _DEFAULT_NEW:
        new = longest - length
    return max(math.ceil(new / config.canvas_length) * config.canvas_length, 0)


def behind_what_is_held(
    model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A `generate` that takes whole conversations whatever its cache holds, made of one that takes new tokens alone;
    and the arguments of a call, by name."""
    kind: Any = type(model)
    bound = signature(kind.generate).bind(model, *args, **kwargs).arguments
    by_name = {name: value for name, value in bound.items() if name not in ("self", "args", "kwargs")}
    rest = bound.get("args", ())  # there are some if others are wrapped around it, which hide its parameters
    return partial(_generate_rest, original), rest, {**by_name, **bound.get("kwargs", {})}


def _generate_rest(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    cache = cache_in(kwargs, AttentionStoreCache)
    done = cache.get_seq_length() if cache is not None else 0
    if not done:
        return original(*args, **kwargs)
    ids: torch.Tensor = args[0] if args else kwargs["input_ids"]
    begin = ids[:, :done]
    if args:
        args = (ids[:, done:], *args[1:])
    else:
        kwargs["input_ids"] = ids[:, done:]
    for name in TYPES:
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name][:, done:]
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = WholePromptStreamer(kwargs["streamer"], ids.cpu())
    kwargs["stopping_criteria"] = _WholeCriteria(begin, kwargs.get("stopping_criteria"))
    kwargs["logits_processor"] = _WholeProcessors(begin, kwargs.get("logits_processor"))
    output = original(*args, **kwargs)
    if isinstance(output, torch.Tensor):
        return torch.cat([begin.to(output), output], dim=1)
    output["sequences"] = torch.cat([begin.to(output.sequences), output.sequences], dim=1)
    return output


class _WholeCriteria(StoppingCriteriaList):
    """Stopping criteria that are shown the whole text, and not what comes after `begin` `[1, tokens]` alone."""

    def __init__(self, begin: torch.Tensor, given: Iterable[Any] | None) -> None:
        super().__init__(given or ())
        self._begin = begin

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return super().__call__(torch.cat([self._begin.to(input_ids), input_ids], dim=1), scores, **kwargs)


class _WholeProcessors(LogitsProcessorList):
    """Processors of logits, as `_WholeCriteria`."""

    def __init__(self, begin: torch.Tensor, given: Iterable[Any] | None) -> None:
        super().__init__(given or ())
        self._begin = begin

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        whole: Any = torch.cat([self._begin.to(input_ids), input_ids], dim=1)
        return super().__call__(whole, scores, **kwargs)
