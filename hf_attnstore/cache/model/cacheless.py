"""Which models, and which ways to generate, have no use for a cache of ours, and so run as without it."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import nn
from transformers import GenerationMixin

from ...errors import UnsupportedModelError
from .argument import CACHE_NAMES, generate_cache_name
from .structure import in_canvases, own_state


def is_generator(model: nn.Module) -> bool:
    """Whether a model's `generate` is transformers' own, perhaps with a model's changes, or one that refines whole
    blocks of tokens. Others have another contract with their caches."""
    ours = isinstance(model, GenerationMixin) or in_canvases(model) is not None
    return ours and callable(getattr(model, "generate", None))


def check_generator(model: nn.Module) -> None:
    """Raises:
    UnsupportedModelError: the model's `generate` is none that a cache of ours can be given to.
    """
    if callable(getattr(model, "generate", None)) and not is_generator(model):
        raise UnsupportedModelError(
            f"the generate of {type(model).__name__} is not transformers' own and has another contract with its cache; "
            "call it without one: after attach(model, store) too it runs as without a store"
        )


def cacheless(model: nn.Module) -> str:
    """Why `generate` of a model can't be given a cache; empty if it can."""
    # before `cache` was everybody's name, XLM had one of another kind
    names = set(CACHE_NAMES) if generate_cache_name(None) == "cache" else set(CACHE_NAMES) - {"cache"}
    if not any(names & set(signature(forward).parameters) for forward in _forwards(model)):
        return f"the forward of {type(model).__name__} takes no cache"
    supports: Any = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports() and not own_state(model):
        return f"{type(model).__name__} makes a cache of its own"
    return ""


def _forwards(model: nn.Module) -> list[Callable[..., Any]]:
    """What a model computes with, and what that may pass its arguments on to: a subclass need not name them all."""
    return [model.forward, *(vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls))]


def needs_all_states(setting: Callable[[str], Any]) -> bool:
    """Whether a way to generate drafts from what the model makes of every token of the prompt.

    Args:
        setting: a generation setting by name, as `generate` will see it.
    """
    return bool(setting("use_mtp") or setting("speculation_type"))
