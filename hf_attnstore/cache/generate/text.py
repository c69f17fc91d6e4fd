"""`generate` of one prompt: matches it, runs the model's own `generate`, keeps the result."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import CacheUseError, LoadError
from ..cache import AttentionStoreCache
from ..hooks import feed
from ..identity.adapters import adapter_problem
from ..inputs.content import TYPES, Content, Items, NotIdentifiedError, has_stand_ins, read_content
from ..inputs.foreign import asks_for_all, brings_features, foreign_input, mask_problem, position_problem
from ..inputs.held import HeldContent
from ..loads import MAX_ATTEMPTS
from ..model.cacheless import needs_all_states
from ..model.structure import in_canvases
from ..positions.spatial import places_in_space, spatial_positions
from .canvases import canvas_tokens
from .settings import setting as _setting
from .streamer import WholePromptStreamer

TEXT = (None, None)
"""What `identify` says of a prompt that is text alone."""


def generate_prompt(
    model: nn.Module,
    cache: AttentionStoreCache,
    original: Callable[..., Any],
    prompt: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`generate` of one prompt as a turn of `cache`."""
    turn = _Turn(cache, model, prompt, kwargs)
    parts = turn.begin()
    streamed = False
    try:
        for attempt in range(MAX_ATTEMPTS + 1):
            try:
                for part in parts:
                    feed(cache.model, cache, part)
                before, streamed = streamed, True
                output = turn.run(original, args, kwargs, streamed=before)
                cache.end_of_generate()
                return output
            except LoadError as error:
                # the load belongs to the first forward: no token has been made yet; at most the prompt was streamed
                cache.abandon(error)
                parts = turn.begin(load=attempt + 1 < MAX_ATTEMPTS)
        raise AssertionError("a turn without loading can't fail to load")
    finally:
        cache.end_turn()


def prompt_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The prompt among the arguments of a `generate`; None if there is none."""
    if kwargs.get("input_ids") is not None:
        return kwargs["input_ids"]
    return args[0] if args else kwargs.get("inputs")


def identify(
    model: nn.Module,
    prompt: Any,
    kwargs: Mapping[str, Any],
    history: int = 0,
    cache: AttentionStoreCache | None = None,
) -> tuple[Content | None, str | None]:
    """What of a prompt is not text, and why what the model is about to compute can't be identified, if so.

    Args:
        history: how many tokens of `cache` come before the prompt.
        cache: the one that the caller goes on with, which may hold what the prompt has only ids of.
    """
    ids = _ids(prompt)
    try:
        content = read_content(model.config, prompt, kwargs)
        if content is None and cache is not None and ids is not None and len(ids) == 1 and not brings_features(kwargs):
            content = cache.going_on(ids[0].detach().cpu().numpy(), kwargs, alone=history > 0)
        elif content is not None and not history and places_in_space(model):
            content.positions = spatial_positions(model, ids, kwargs, content)
    except NotIdentifiedError as reason:
        return None, f"{reason} are not identified"
    problem = _problem(model, prompt, kwargs, history, content)
    if problem and isinstance(content, HeldContent):
        raise CacheUseError(
            f"this prompt goes on after pictures, sounds or embeddings that the cache holds, but can't be kept with "
            f"them ({problem}): pass the whole conversation with all of its inputs"
        )
    return (None, problem) if problem else (content, None)


def _problem(
    model: nn.Module, prompt: Any, kwargs: Mapping[str, Any], history: int, content: Content | None
) -> str | None:
    """Why neither token ids nor `content` identify what the model is about to compute; None if they do."""
    data = prompt
    if content is not None and not isinstance(content, HeldContent):
        if history:
            return "new tokens alone, with pictures, sounds or embeddings among them"
        if _setting(model, kwargs, "prefill_chunk_size"):
            return "prefill_chunk_size, which may cut pictures, sounds or embeddings"
        data = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else prompt
    elif not isinstance(prompt, torch.Tensor) or prompt.ndim != 2 or prompt.is_floating_point():
        return "the prompt is not given as input_ids [1, tokens]"
    if kwargs.get("inputs_embeds") is not None and content is None:
        return "inputs_embeds are not identified by token ids"
    if data.shape[0] != 1:
        return f"a batch of {data.shape[0]} prompts"
    if data.shape[1] == 0:
        return "the prompt is empty"
    understood = content.understood if content is not None else ()
    foreign = foreign_input({name: value for name, value in kwargs.items() if name not in understood})
    if foreign is not None:
        return f"{foreign} are not identified by token ids"
    if _setting(model, kwargs, "token_healing"):
        return "token_healing changes the prompt"
    adapters = adapter_problem(model)
    if adapters is not None:
        return adapters
    count = data.shape[1]
    mask = kwargs.get("attention_mask")
    ids = _ids(prompt)
    if mask is None and ids is not None and _would_be_masked(model, ids, kwargs):
        return "padding tokens in the prompt"
    positions = content.positions if content is not None else None
    if positions is not None:
        positions = positions[..., history:]
    return (
        mask_problem(mask, history + count)
        or position_problem(kwargs.get("position_ids"), history, count, positions)
        or position_problem(kwargs.get("cache_position"), history, count)
    )


def _ids(prompt: Any) -> torch.Tensor | None:
    return prompt if isinstance(prompt, torch.Tensor) and prompt.ndim == 2 else None


def _feeds_whole_prompts(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a way to generate feeds the prompt whatever the cache holds, or in its own way."""
    return (
        kwargs.get("assistant_model") is not None
        or any(_setting(model, kwargs, name) for name in ("prompt_lookup_num_tokens", "assistant_early_exit"))
        or kwargs.get("custom_generate") is not None
    )


def _would_be_masked(model: nn.Module, prompt: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether `generate`, given no mask, would take some of the prompt for padding."""
    pad = _setting(model, kwargs, "pad_token_id") if in_canvases(model) is None else None  # these take all for text
    if pad is None or not bool((prompt == int(pad)).any()):
        return False
    ends = _setting(model, kwargs, "eos_token_id")
    ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    return int(pad) not in ends


def length_of(prompt: Any, kwargs: Mapping[str, Any]) -> int:
    """Tokens of a prompt, however it is given."""
    if isinstance(prompt, torch.Tensor) and prompt.ndim == 2 and prompt.shape[1]:
        return prompt.shape[1]
    embeds = kwargs.get("inputs_embeds")
    return embeds.shape[1] if isinstance(embeds, torch.Tensor) else 0


class _Turn:
    """One `generate` on a cache: what it is about, and how to begin it, perhaps more than once.

    Raises:
        CacheUseError: the prompt is of new tokens alone, and what came before is not what the cache holds; or it has
            places of pictures that the cache does not hold.
    """

    def __init__(self, cache: AttentionStoreCache, model: nn.Module, prompt: Any, kwargs: Mapping[str, Any]) -> None:
        self._cache = cache
        self._kwargs = kwargs
        self._history = _history(cache, prompt, kwargs) if kwargs.get("inputs_embeds") is None else 0
        self._content, self._problem = identify(model, prompt, kwargs, self._history, cache)
        self._model = model
        self._length = length_of(prompt, kwargs)
        self._with_inputs = brings_features(kwargs)
        ids = _ids(prompt)
        self._goes_on = ids is not None and not self._with_inputs and cache.goes_on_unidentified(ids)
        if self._goes_on:
            self._problem, self._content = self._problem or "it goes on after inputs that are not identified", None
        setting = partial(_setting, model, kwargs)
        self._asks_for_all = asks_for_all(setting, model) or needs_all_states(setting)
        if self._problem is not None:
            if self._history:
                raise CacheUseError(
                    f"this prompt continues {self._history} tokens that the cache holds, but can't be kept with them "
                    f"({self._problem}); pass the ids of the whole conversation"
                )
            return
        self._ids: np.ndarray
        if self._content is not None:
            self._ids = self._content.ids
            if isinstance(self._content, Items):
                # `generate` counts the placeholders of the whole prompt to find out which row has which pictures
                rows = max(int(_setting(model, kwargs, name) or 1) for name in ("num_beams", "num_return_sequences"))
                self._content.all_or_none = rows > 1
        else:
            self._ids = prompt[0].detach().cpu().numpy()
        self._prompt: torch.Tensor = ids if ids is not None else torch.empty((1, 0), dtype=torch.long)
        if self._history and self._content is None:
            self._ids = np.concatenate([np.asarray(cache.conversation_ids), self._ids])
        self._positions = self._find_positions()
        self._reusable = self._history or len(self._ids) - 1
        held = isinstance(self._content, HeldContent)
        if self._content is not None and not held and _feeds_whole_prompts(model, kwargs):
            self._reusable = 0
        if self._asks_for_all and not self._history:
            self._reusable = 0
        if in_canvases(model) is not None:
            self._new_tokens = canvas_tokens(model, setting, len(self._ids))
            return
        new_tokens = setting("max_new_tokens")
        if new_tokens is None:
            longest = setting("max_length")
            new_tokens = max(0, longest - len(self._ids)) if longest else 0
        self._new_tokens = int(new_tokens)

    def begin(self, *, load: bool = True) -> list[torch.Tensor]:
        """Begins the turn. Returns what the model must be fed first, in parts `[1, tokens]`: what could not be reused
        of the tokens before a prompt of new tokens alone, and what comes before places at which the cache wants to
        keep running states."""
        if self._problem is not None:
            self._cache.begin_unidentified_turn(
                self._problem, self._length, with_inputs=self._with_inputs, goes_on=self._goes_on
            )
            return []
        if load:
            limit = self._reusable
            unreadable = ""
        else:
            limit, unreadable = 0, f"{MAX_ATTEMPTS} loads failed one after the other"
        reused = self._cache.begin_turn(
            self._ids,
            limit=limit,
            new_tokens=self._new_tokens,
            checked=True,
            unreadable=unreadable,
            content=self._content,
        )
        self._reused = reused
        self._shown = self._cache.prompt_in_view(self._ids)
        held = len(self._shown) - self._prompt.shape[1] if self._history else 0
        known = len(self._shown) if isinstance(self._content, HeldContent) else held
        if has_stand_ins(self._shown[reused:known]):
            self._cache.end_turn()
            raise CacheUseError(
                f"the cache has {reused} tokens of this conversation, and pictures, sounds or embeddings that are not "
                "given come after them: pass the ids of the whole conversation with all of its inputs"
            )
        if self._asks_for_all and not self._history:
            self._cache.stats.recomputed = "hidden states or attentions were asked for, which are those of all tokens"
            self._cache.stats.missed = "hidden states asked for"
            return []
        # a prompt of new tokens alone is fed by `generate` as it is, whatever the cache has of it
        ends = [held] if self._history else self._cache.stops
        chunk = _setting(self._model, self._kwargs, "prefill_chunk_size")
        if chunk and ends and self._cache.continues_in_parts:
            ends = sorted({*ends, *range(reused + chunk, ends[-1], chunk)})
        bounds = pairwise([reused, *(end for end in ends if end > reused)])
        return [torch.from_numpy(self._shown[None, a:b]).to(self._prompt.device) for a, b in bounds]

    def _find_positions(self) -> torch.Tensor | None:
        """Positions for a model that would take them from whichever conversation it saw last."""
        if not places_in_space(self._model):
            return None
        if self._content is not None:
            return self._content.positions
        if has_stand_ins(self._ids):
            raise CacheUseError(
                "where new tokens are depends on the pictures before them: pass the ids of the whole conversation "
                "with all of its inputs"
            )
        whole = torch.from_numpy(self._ids[None]).to(self._prompt.device)
        return spatial_positions(self._model, whole, {}, None)

    def _inputs(self) -> dict[str, Any]:
        """What `generate` is to be given beside ids: pictures that are not reused, and positions. None for what it is
        not to be given."""
        if self._problem is not None:
            return {}
        changed: dict[str, Any] = {}
        if self._content is not None:
            changed = self._content.inputs(self._reused, len(self._content))
        if isinstance(self._content, HeldContent):
            types = {name: self._content.types(name, len(self._content)) for name in TYPES}
            changed |= {name: whole for name, whole in types.items() if self._kwargs.get(name) is not None}
        if self._positions is not None:
            changed["position_ids"] = self._positions
        return changed

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
        inputs = self._inputs()
        unused = [name for name, value in inputs.items() if value is None]
        changed = {name: value for name, value in {**kwargs, **inputs}.items() if name not in unused}
        if changed.get("streamer") is not None and (streamed or self._dropped):
            changed["streamer"] = WholePromptStreamer(changed["streamer"], None if streamed else self._prompt.cpu())
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
        if self._positions is not None:  # or takes them from another conversation
            changed["position_ids"] = self._positions[..., : len(self._shown)]
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
