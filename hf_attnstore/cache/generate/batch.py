"""`generate` with a batch of conversations."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import CacheUseError
from ..batch import BatchCache, batch_problem
from ..inputs.foreign import asks_for_all, foreign_input


def generate_batch(
    model: nn.Module,
    cache: BatchCache,
    original: Callable[..., Any],
    prompt: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    setting: Callable[[str], Any],
) -> Any:
    """Runs the model's own `generate` with a batch's cache.

    Args:
        prompt: its input ids, `[rows, tokens]`, left-padded.
        setting: a generation setting by name, as `generate` will see it.

    Raises:
        CacheUseError: the prompt is no batch of as many rows as there are sessions.
    """
    ids, mask = _checked(prompt, kwargs, setting)
    problem = batch_problem(ids, mask, len(cache.sessions))
    if problem is not None:
        raise CacheUseError(problem)
    kwargs["attention_mask"] = mask
    asked = asks_for_all(setting, model)
    foreign = foreign_input({n: v for n, v in kwargs.items() if n not in ("attention_mask", "input_ids", "inputs")})
    new_tokens = setting("max_new_tokens")
    if new_tokens is None:
        new_tokens = max(0, (setting("max_length") or 0) - ids.shape[1])
    try:
        if foreign is not None:
            cache.begin_unidentified_turn(f"{foreign} are not identified by token ids", ids.numel())
        elif asked:
            cache.begin_unidentified_turn("hidden states of all tokens were asked for", ids.numel(), expected=True)
        else:
            cache.begin_batch(ids, mask, int(new_tokens), _ends(setting))
        output = original(*args, **kwargs)
        cache.note_first_token()
        return output
    finally:
        cache.end_turn()


def _checked(
    prompt: Any, kwargs: Mapping[str, Any], setting: Callable[[str], Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(prompt, torch.Tensor) or prompt.ndim != 2:
        raise CacheUseError("a batch needs input_ids [rows, tokens]")
    mask = kwargs.get("attention_mask")
    if mask is None:
        pad = setting("pad_token_id")
        if pad is not None and bool((prompt == pad).any()):
            raise CacheUseError("the batch has padding: pass its attention_mask, as the tokenizer returns it")
        mask = torch.ones_like(prompt)
    return prompt, mask


def _ends(setting: Callable[[str], Any]) -> frozenset[int]:
    """The ids after which what a row is fed is padding: the padding itself too, where a row was ended otherwise."""
    found = setting("eos_token_id")
    ends = {found} if isinstance(found, int) else {int(one) for one in found} if found is not None else set()
    pad = setting("pad_token_id")
    return frozenset(ends | ({pad} if isinstance(pad, int) else set()))
