"""Which inputs token ids identify, and which they do not.

KV may be kept under token ids only if nothing else went into it: no embeddings or images, no padding, no
positions or masks of the caller's own. Whatever is not known to be harmless counts as harmful.
"""

from collections.abc import Callable, Mapping
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin

from ..model.argument import CACHE_NAMES

_NEUTRAL = frozenset(
    "input_ids inputs attention_mask position_ids cache_position "
    "logits_to_keep num_logits_to_keep labels return_dict generation_config negative_prompt_ids "
    "negative_prompt_attention_mask".split()
) | frozenset(CACHE_NAMES)
_NEUTRAL_IF_ZERO = frozenset("token_type_ids mm_token_type_ids moe_mm_token_type_ids".split())


_OF_ALL_TOKENS = ("output_attentions", "output_hidden_states")
"""Settings whose result has something of every token that is computed."""

_PLAIN = (bool, int, float, str, torch.dtype, torch.device)


@cache
def _settings() -> frozenset[str]:
    """The names that `generate` itself understands: they say how tokens are chosen, not what the model sees."""
    understood = {*signature(GenerationMixin.generate).parameters, *vars(GenerationConfig())}
    return frozenset(understood | {"streamer", "tokenizer", "assistant_tokenizer", "custom_generate"})


def is_setting(name: str) -> bool:
    """Whether an argument of `generate` says how tokens are chosen, rather than what the model sees."""
    return name in _settings()


def is_harmless(name: str) -> bool:
    """Whether an input says how tokens are chosen, or nothing that is not checked elsewhere."""
    return name in _NEUTRAL or name in _settings()


def _is_data(value: Any) -> bool:
    if value is None or isinstance(value, _PLAIN):
        return False
    if isinstance(value, (list, tuple, Mapping)):
        return bool(value)
    return True


def foreign_input(named: Mapping[str, Any]) -> str | None:
    """The name of an input that carries content which the token ids do not identify; None if there is none."""
    for name, value in named.items():
        if is_harmless(name) or not _is_data(value):
            continue
        if name in _NEUTRAL_IF_ZERO and isinstance(value, torch.Tensor) and not value.any():
            continue
        return name
    return None


def asks_for_all(setting: Callable[[str], Any], model: nn.Module) -> bool:
    """Whether the result of a `generate` is to have something of every token of the prompt, so that all of them are to
    be computed: else it would depend on what happens to be known.

    Args:
        setting: a generation setting by name, as `generate` will see it.
    """
    config: Any = model.config
    configs = (config, config.get_text_config(decoder=True))
    return bool(setting("return_dict_in_generate")) and any(
        bool(setting(name)) or any(getattr(one, name, False) for one in configs) for name in _OF_ALL_TOKENS
    )


def brings_features(named: Mapping[str, Any]) -> bool:
    """Whether there is something of pictures, sounds or embeddings among inputs by name: numbers, and not only sizes
    or places."""
    return any(
        isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1 and not is_harmless(name)
        for name, value in named.items()
    )


def mask_problem(mask: Any, total: int) -> str | None:
    """Why an attention mask keeps KV from being reusable; None if it is absent, or all ones for `total` tokens."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] != total:
        return "an attention mask of the caller's own"
    return None if bool((mask == 1).all()) else "an attention mask with zeros (padding)"


def position_problem(position_ids: Any, start: int, count: int, expected: torch.Tensor | None = None) -> str | None:
    """Why position ids keep KV from being reusable; None if absent, or as they must be for `count` tokens.

    Args:
        expected: `[…, count]`; by default `start`, `start + 1`, …
    """
    if position_ids is None:
        return None
    wanted = torch.arange(start, start + count) if expected is None else expected.cpu()
    given = position_ids.detach().cpu()
    if given.ndim == wanted.ndim == 3:  # with a row for counting in front of the three of space, or without
        wanted = wanted[-given.shape[0] :]
    same = given.shape[-1] == count and bool((given == wanted).all())
    return None if same else "position ids of the caller's own"
