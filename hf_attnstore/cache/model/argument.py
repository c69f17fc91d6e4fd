"""The argument by which models and `generate` take a cache.

transformers 5.24 calls it `cache` for all models. Before that it was `past_key_values`, and `cache_params` for Mamba
and its kin; 5.24 still takes these, and warns. Here a cache of ours may be passed by any of the three names, under
every version.
"""

from collections.abc import Collection, Mapping, MutableMapping
from functools import cache as cached
from inspect import signature
from typing import Any

from transformers import GenerationMixin

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""Every name, the newest first; the last is RWKV's."""


def cache_name(parameters: Collection[str]) -> str | None:
    """The name among a forward's parameters under which it takes a cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in parameters), None)


@cached
def _generate_renamed() -> bool:
    return "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters


def generate_cache_name(forward_name: str | None) -> str:
    """The name under which `generate` takes the cache of a model whose forward takes it as `forward_name`."""
    if forward_name == "state":
        return forward_name
    return "cache" if _generate_renamed() else forward_name or "past_key_values"


def as_forward_takes(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as the argument of a model's forward; nothing where it is None or the forward takes none."""
    parameters = signature(model.forward).parameters
    name = cache_name(parameters)
    if name is None and any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        name = generate_cache_name(None)  # one that passes on what it does not name itself
    return {name: cache} if name is not None and cache is not None else {}


def as_generate_takes(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as the argument of a model's `generate`; nothing where it is None."""
    name = generate_cache_name(cache_name(signature(model.forward).parameters))
    return {name: cache} if cache is not None else {}


def cache_in(arguments: Mapping[str, Any], kind: type = object) -> Any:
    """The cache among named arguments that is of class `kind`; None if there is none."""
    for name in CACHE_NAMES:
        cache = arguments.get(name)
        if cache is not None and isinstance(cache, kind):
            return cache
    return None


def take_cache(arguments: MutableMapping[str, Any]) -> Any:
    """Takes the cache out of named arguments, with every name that it may stand under. None if there is none."""
    found = cache_in(arguments)
    for name in CACHE_NAMES:
        arguments.pop(name, None)
    return found
