"""The wrapper around `generate`: matches the prompt, runs the model's own `generate`, keeps the result."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CacheUseError, LoadError, UnsupportedModelError
from .attach import attachment_of
from .cache import AttentionStoreCache
from .inputs import foreign_input, mask_problem, position_problem

logger = logging.getLogger("hf_attnstore")

_MAX_RETRIES = 8


class _RestOfStream:
    """A streamer that has been given the prompt already."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._skipped = False

    def put(self, value: Any) -> None:
        if self._skipped:
            self._streamer.put(value)
        self._skipped = True

    def end(self) -> None:
        self._streamer.end()


def generate_with_store(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `model.generate`, with the same arguments and the same result."""
    attachment = attachment_of(model)
    assert attachment is not None
    original = attachment.original_generate(model)
    cache = kwargs.get("past_key_values")
    prompt = _prompt(args, kwargs)
    if cache is None:
        if attachment.store is None or not _can_be_kept(model, prompt, kwargs):
            return original(*args, **kwargs)
        cache = AttentionStoreCache(model, store=attachment.store)
        kwargs["past_key_values"] = cache
    elif not isinstance(cache, AttentionStoreCache):
        return original(*args, **kwargs)
    if cache.model is not model:
        raise CacheUseError(f"the cache was made for another model than this {type(model).__name__}")
    if _setting(model, kwargs, "use_cache") is False:
        logger.warning("use_cache=False: this generate runs without its cache, nothing is reused or saved")
        return original(*args, **{**kwargs, "past_key_values": None})
    turn = _Turn(cache, model, prompt, kwargs)
    missing = turn.begin()
    try:
        for attempt in range(_MAX_RETRIES + 1):
            try:
                if missing is not None:
                    with torch.no_grad():
                        model(input_ids=missing, past_key_values=cache, use_cache=True)
                return original(*args, **kwargs)
            except LoadError as error:
                # the load belongs to the first forward: no token has been made yet, only the prompt was streamed
                cache.abandon(error)
                if kwargs.get("streamer") is not None and not isinstance(kwargs["streamer"], _RestOfStream):
                    kwargs["streamer"] = _RestOfStream(kwargs["streamer"])
                missing = turn.begin(load=attempt + 1 < _MAX_RETRIES)
        raise AssertionError("a turn without loading can't fail to load")
    finally:
        cache.end_turn()


def _prompt(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if kwargs.get("input_ids") is not None:
        return kwargs["input_ids"]
    return args[0] if args else kwargs.get("inputs")


def _setting(model: nn.Module, kwargs: Mapping[str, Any], name: str) -> Any:
    """A generation setting, as `generate` will see it."""
    for source in (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)):
        if source is not None:
            return source
    return getattr(model.generation_config, name, None)


def _can_be_kept(model: nn.Module, prompt: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a plain `generate` is one that a store can serve; if not, it runs untouched."""
    return not (
        _problem(model, prompt, kwargs)
        or _setting(model, kwargs, "use_cache") is False
        or _setting(model, kwargs, "cache_implementation") is not None
        or getattr(kwargs.get("generation_config"), "is_assistant", False)
        or kwargs.get("custom_generate") is not None
        or kwargs.get("use_model_defaults") is False
    )


def _problem(model: nn.Module, prompt: Any, kwargs: Mapping[str, Any], history: int = 0) -> str | None:
    """Why token ids do not identify what the model is about to compute; None if they do."""
    if not isinstance(prompt, torch.Tensor) or prompt.ndim != 2 or prompt.is_floating_point():
        return "the prompt is not given as input_ids [1, tokens]"
    if kwargs.get("inputs_embeds") is not None:
        return "inputs_embeds are not identified by token ids"
    if prompt.shape[0] != 1:
        return f"a batch of {prompt.shape[0]} prompts"
    if prompt.shape[1] == 0:
        return "the prompt is empty"
    foreign = foreign_input(kwargs)
    if foreign is not None:
        return f"{foreign} are not identified by token ids"
    if _setting(model, kwargs, "token_healing"):
        return "token_healing changes the prompt"
    count = prompt.shape[1]
    mask = kwargs.get("attention_mask")
    if mask is None and _would_be_masked(model, prompt, kwargs):
        return "padding tokens in the prompt"
    return (
        mask_problem(mask, history + count)
        or position_problem(kwargs.get("position_ids"), history, count)
        or position_problem(kwargs.get("cache_position"), history, count)
    )


def _would_be_masked(model: nn.Module, prompt: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether `generate`, given no mask, would take some of the prompt for padding."""
    pad = _setting(model, kwargs, "pad_token_id")
    if pad is None or not bool((prompt == int(pad)).any()):
        return False
    ends = _setting(model, kwargs, "eos_token_id")
    ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    return int(pad) not in ends


def _length(prompt: Any, kwargs: Mapping[str, Any]) -> int:
    """Tokens of a prompt, however it is given."""
    if isinstance(prompt, torch.Tensor) and prompt.ndim == 2 and prompt.shape[1]:
        return prompt.shape[1]
    embeds = kwargs.get("inputs_embeds")
    return embeds.shape[1] if isinstance(embeds, torch.Tensor) else 0


class _Turn:
    """One `generate` on a cache: what it is about, and how to begin it, perhaps more than once.

    Raises:
        CacheUseError: the prompt is of new tokens alone, and what came before is not what the cache holds.
    """

    def __init__(self, cache: AttentionStoreCache, model: nn.Module, prompt: Any, kwargs: Mapping[str, Any]) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError("encoder-decoder models can't be kept yet")
        self._cache = cache
        self._history = _history(cache, prompt, kwargs)
        self._problem = _problem(model, prompt, kwargs, self._history)
        self._length = _length(prompt, kwargs)
        if self._problem is not None:
            if self._history:
                raise CacheUseError(
                    f"this prompt continues {self._history} tokens that the cache holds, but can't be kept with them "
                    f"({self._problem}); pass the ids of the whole conversation"
                )
            return
        self._ids: np.ndarray = prompt[0].detach().cpu().numpy()
        self._device = prompt.device
        if self._history:
            self._ids = np.concatenate([np.asarray(cache.token_ids), self._ids])
        new_tokens = _setting(model, kwargs, "max_new_tokens")
        if new_tokens is None:
            longest = _setting(model, kwargs, "max_length")
            new_tokens = max(0, longest - len(self._ids)) if longest else 0
        self._new_tokens = int(new_tokens)

    def begin(self, *, load: bool = True) -> torch.Tensor | None:
        """Begins the turn. Returns the ids `[1, tokens]` that the model must be fed first, where the prompt is of new
        tokens alone and some of what came before them could not be reused."""
        if self._problem is not None:
            self._cache.begin_unidentified_turn(self._problem, self._length)
            return None
        if load:
            limit = self._history or len(self._ids) - 1
            reused = self._cache.begin_turn(self._ids, limit=limit, new_tokens=self._new_tokens, checked=True)
        else:
            self._cache.begin_unidentified_turn(f"{_MAX_RETRIES} loads failed one after the other", len(self._ids))
            reused = 0
        if reused >= self._history:
            return None
        return torch.from_numpy(self._ids[None, reused : self._history]).to(self._device)


def _history(cache: AttentionStoreCache, prompt: Any, kwargs: Mapping[str, Any]) -> int:
    """How many tokens come before a prompt of new tokens alone, which a mask over the whole conversation gives away;
    0 for a prompt that is the whole conversation."""
    mask = kwargs.get("attention_mask")
    if not (isinstance(mask, torch.Tensor) and isinstance(prompt, torch.Tensor) and mask.ndim == prompt.ndim == 2):
        return 0
    history = mask.shape[1] - prompt.shape[1]
    if history <= 0:
        return 0
    held = len(cache.token_ids)
    if held != history or cache.get_seq_length() != history:
        raise CacheUseError(
            f"the attention mask speaks of {history} tokens before these input_ids, but the cache holds {held}; "
            "pass the ids of the whole conversation, the cache finds out what is new"
        )
    return history
