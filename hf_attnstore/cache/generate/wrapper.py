"""The wrapper around `generate`: decides whether a call is served from the store, and by whom."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ...errors import CacheUseError
from ...store.store import AttentionStore
from ..batch import BatchCache
from ..cache import AttentionStoreCache
from ..hooks import attachment_of, owner_of
from ..model.argument import cache_in, take_cache
from ..model.structure import in_canvases, is_encoder_decoder, takes_one_conversation
from .attached import is_batch, kind_of, say_left_alone, settings_problem
from .batch import generate_batch
from .canvases import behind_what_is_held
from .encoder_decoder import generate_from_encoder
from .resegmenting import generate_resegmented
from .settings import setting
from .text import TEXT, generate_prompt, identify, length_of, prompt_of

logger = logging.getLogger("hf_attnstore")

_PLACED = frozenset({"position_ids", "cache_position"})
"""Inputs that say of each token of the prompt where it is."""


def generate_with_store(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `model.generate`, with the same arguments and the same result."""
    attachment = attachment_of(model)
    assert attachment is not None
    return generate_around(model, partial(pass_on, attachment.original(model, "generate")), args, kwargs)


def pass_on(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs `original`, which may come by `dispatch.py`, and in another thread: there it is to go straight through."""
    cache = cache_in(kwargs, AttentionStoreCache)
    if cache is None:
        return original(*args, **kwargs)
    cache.passed_on = True
    try:
        return original(*args, **kwargs)
    finally:
        cache.passed_on = False


def generate_around(
    model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs `original`, a `generate` of the model, with what the store has."""
    attachment = attachment_of(model)
    assert attachment is not None
    if is_encoder_decoder(model):
        return generate_from_encoder(model, original, attachment, args, kwargs)
    if in_canvases(model) is not None:
        original, args, kwargs = behind_what_is_held(model, original, args, kwargs)
    cache = take_cache(kwargs)
    if cache is not None:
        kwargs[attachment.generate_cache_name] = cache
    prompt = prompt_of(args, kwargs)
    if cache is None:
        if attachment.store is None:
            return original(*args, **kwargs)
        found = ("model", attachment.cacheless) if attachment.cacheless else settings_problem(model, kwargs)
        problem = identify(model, prompt, kwargs)[1] if found is None else None
        batch = problem is not None and is_batch(model, prompt, kwargs)
        if problem is not None and not batch:
            found = kind_of(problem), problem
        if found is not None:
            say_left_alone(attachment, *found, prompt)
            return original(*args, **kwargs)
        # nobody asked for a window, so nothing is dropped: the result is that of plain `generate`
        every = attachment.checkpoint_every
        if batch:
            return _generate_rows(model, attachment.store, original, prompt, args, kwargs)
        cache = AttentionStoreCache(model, store=attachment.store, drop=0, checkpoint_every=every)
        cache.resegments_with = attachment.resegments_with
        cache.tell(attachment.turn_is_over)
        kwargs[attachment.generate_cache_name] = cache
    elif not isinstance(cache, AttentionStoreCache):
        say_left_alone(attachment, "another cache", f"it was given a {type(cache).__name__}", prompt)
        return original(*args, **kwargs)
    if cache.model is not owner_of(model):
        raise CacheUseError(f"the cache was made for another model than this {type(model).__name__}")
    if attachment.cacheless:
        return _without(cache, attachment.cacheless, original, args, kwargs)
    if setting(model, kwargs, "use_cache") is False:
        logger.warning("use_cache=False: this generate runs without its cache, nothing is reused or saved")
        take_cache(kwargs)  # not even None in its place, which beam search takes for a cache that it can't reorder
        return original(*args, **kwargs)
    if isinstance(cache, BatchCache) and takes_one_conversation(model):
        raise CacheUseError(f"of {type(model).__name__} one conversation at a time is kept: give the cache one session")
    if isinstance(cache, BatchCache):
        return generate_batch(model, cache, original, prompt, args, kwargs, partial(setting, model, dict(kwargs)))
    go_on = partial(generate_prompt, model, cache, original)
    if cache.resegments_with is not None and not kwargs.keys() & _PLACED and identify(model, prompt, kwargs) == TEXT:
        return generate_resegmented(cache, model, prompt, args, kwargs, go_on)
    return go_on(prompt, args, kwargs)


generate_with_store.__name__ = "generate"  # the name under which a pickled model finds what it had without us


def _without(
    cache: AttentionStoreCache,
    reason: str,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A `generate` of a model that can't be given the cache: runs as if there were none."""
    take_cache(kwargs)
    cache.begin_unidentified_turn(reason, length_of(prompt_of(args, kwargs), kwargs))
    try:
        output = original(*args, **kwargs)
        cache.end_of_generate()
        return output
    finally:
        cache.end_turn()


def _generate_rows(
    model: nn.Module, store: AttentionStore, original: Callable[..., Any], prompt: Any, args: Any, kwargs: Any
) -> Any:
    """A batch of an attached model: every row is found and kept by its content. Never an error of ours."""
    attachment = attachment_of(model)
    assert attachment is not None
    cache = AttentionStoreCache(model, [None] * len(prompt), store, checkpoint_every=attachment.checkpoint_every)
    assert isinstance(cache, BatchCache)
    cache.tell(attachment.turn_is_over)
    given = {**kwargs, attachment.generate_cache_name: cache}
    try:
        return generate_batch(model, cache, original, prompt, args, given, partial(setting, model, dict(kwargs)))
    except CacheUseError as error:  # before anything was computed: the first forward is not as it has to be
        say_left_alone(attachment, "batch", str(error), prompt)
        return original(*args, **kwargs)
