"""The wrapper around `generate`: matches the prompt, runs the model's own `generate`, keeps the result."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CacheUseError, LoadError, UnsupportedModelError
from .adapters import adapter_problem
from .attach import attachment_of
from .cache import AttentionStoreCache
from .inputs import foreign_input, mask_problem, position_problem

logger = logging.getLogger("hf_attnstore")

_MAX_RETRIES = 8


class _Stream:
    """A streamer that is given the whole prompt, or none where it had it already, instead of what the model is fed."""

    def __init__(self, streamer: Any, prompt: torch.Tensor | None) -> None:
        self._streamer = streamer
        self._prompt = prompt
        self._begun = False

    def put(self, value: Any) -> None:
        if self._begun:
            self._streamer.put(value)
        elif self._prompt is not None:
            self._streamer.put(self._prompt)
        self._begun = True

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
        # nobody asked for a window, so nothing is dropped: the result is that of plain `generate`
        cache = AttentionStoreCache(model, store=attachment.store, drop=0)
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
                return turn.run(original, args, kwargs, streamed=attempt > 0)
            except LoadError as error:
                # the load belongs to the first forward: no token has been made yet, only the prompt was streamed
                cache.abandon(error)
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
    adapters = adapter_problem(model)
    if adapters is not None:
        return adapters
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
        self._model = model
        self._length = _length(prompt, kwargs)
        if self._problem is not None:
            if self._history:
                raise CacheUseError(
                    f"this prompt continues {self._history} tokens that the cache holds, but can't be kept with them "
                    f"({self._problem}); pass the ids of the whole conversation"
                )
            return
        self._ids: np.ndarray = prompt[0].detach().cpu().numpy()
        self._prompt: torch.Tensor = prompt
        if self._history:
            self._ids = np.concatenate([np.asarray(cache.conversation_ids), self._ids])
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
            unreadable = ""
        else:
            limit, unreadable = 0, f"{_MAX_RETRIES} loads failed one after the other"
        reused = self._cache.begin_turn(
            self._ids, limit=limit, new_tokens=self._new_tokens, checked=True, unreadable=unreadable
        )
        self._shown = self._cache.prompt_in_view(self._ids)
        held = len(self._shown) - self._prompt.shape[1] if self._history else 0
        if reused >= held:
            return None
        return torch.from_numpy(self._shown[None, reused:held]).to(self._prompt.device)

    @property
    def _dropped(self) -> int:
        """Tokens of the conversation that the model is not shown."""
        return len(self._ids) - len(self._shown) if self._problem is None else 0

    def run(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, streamed: bool
    ) -> Any:
        """Calls the model's own `generate` with the tokens in view; its result is of the whole conversation.

        Args:
            streamed: whether a streamer has been given the prompt already.
        """
        changed = dict(kwargs)
        if changed.get("streamer") is not None and (streamed or self._dropped):
            changed["streamer"] = _Stream(changed["streamer"], None if streamed else self._prompt.cpu())
        if not self._dropped:
            return original(*args, **changed)
        shown = self._prompt
        if not self._history:
            shown = torch.from_numpy(self._shown[None]).to(self._prompt)
            name = "input_ids" if changed.get("input_ids") is not None else "inputs"
            if changed.get(name) is not None:
                changed[name] = shown
            else:
                args = (shown, *args[1:])
        mask = changed.get("attention_mask")
        if mask is not None:
            changed["attention_mask"] = torch.ones_like(mask[:, : len(self._shown)])
        for name in ("position_ids", "cache_position"):  # those of the whole conversation; `generate` makes its own
            changed.pop(name, None)
        if _setting(self._model, kwargs, "max_new_tokens") is None:
            self._shorten(changed, kwargs, "max_length")
        if _setting(self._model, kwargs, "min_new_tokens") is None:
            self._shorten(changed, kwargs, "min_length")
        output = original(*args, **changed)
        return output if self._history else self._made_whole(output)

    def _shorten(self, changed: dict[str, Any], kwargs: Mapping[str, Any], name: str) -> None:
        """A limit on the whole conversation, as one on what is in view."""
        length = _setting(self._model, kwargs, name)
        if length:
            changed[name] = max(int(length) - self._dropped, 0)

    def _made_whole(self, output: Any) -> Any:
        """Puts what was dropped back into the sequences of a result."""
        sequences = output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
        if sequences is None:
            return output
        begin = self._prompt.to(sequences.device).expand(len(sequences), -1)
        whole = torch.cat([begin, sequences[:, len(self._shown) :]], dim=1)
        if output is sequences:
            return whole
        output["sequences"] = whole
        return output


def _history(cache: AttentionStoreCache, prompt: Any, kwargs: Mapping[str, Any]) -> int:
    """How many tokens come before a prompt of new tokens alone, which a mask over the whole conversation gives away;
    0 for a prompt that is the whole conversation."""
    mask = kwargs.get("attention_mask")
    if not (isinstance(mask, torch.Tensor) and isinstance(prompt, torch.Tensor) and mask.ndim == prompt.ndim == 2):
        return 0
    history = mask.shape[1] - prompt.shape[1]
    if history <= 0:
        return 0
    held = len(cache.conversation_ids)
    if held != history or len(cache.token_ids) != cache.get_seq_length():
        raise CacheUseError(
            f"the attention mask speaks of {history} tokens before these input_ids, but the cache holds {held}; "
            "pass the ids of the whole conversation, the cache finds out what is new"
        )
    return history
