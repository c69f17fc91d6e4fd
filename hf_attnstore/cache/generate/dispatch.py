"""Where `model.generate` was looked up before the model was attached.

In `model.generate(**inputs, past_key_values=AttentionStoreCache(model, …))` Python looks up `model.generate` first and
makes the cache, which attaches the wrapper to the model, after that: the function that then runs is the class's. So the
class's function has to pass such a call on. It does nothing else: calls without a cache of ours go straight through.

Others may wrap it too, before and after. Whatever stands outside of it has begun when it runs and is left alone: the
turn goes around what stands inside.
"""

import functools
import types
from typing import Any

from torch import nn
from transformers import GenerationMixin

from ..cache import AttentionStoreCache
from ..hooks import attachment_of
from ..model.argument import cache_in
from ..model.structure import in_canvases, refiner
from .wrapper import generate_around, pass_on

_DISPATCHED = "_attnstore_dispatched"
_installed: set[type] = set()
"""Classes that were made to pass on calls, once or again."""


def install(model: nn.Module | None = None) -> None:
    """Makes transformers' `generate` of a model pass on calls with a cache of ours. Harmless when repeated: it is
    needed again where somebody put back what was there before."""
    mixins: list[Any] = [GenerationMixin, refiner()] if model is None else [in_canvases(model) or GenerationMixin]
    for mixin in filter(None, mixins):
        _install(mixin)


def _install(mixin: Any) -> None:
    original = mixin.generate
    if hasattr(original, _DISPATCHED):  # itself, or what `functools.wraps` says is around it
        return
    innermost = mixin not in _installed
    _installed.add(mixin)

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs, AttentionStoreCache)
        if cache is None or cache.passed_on or cache.in_generate or attachment_of(self) is None:
            if cache is not None and innermost:
                cache.passed_on = False
            return original(self, *args, **kwargs)
        return generate_around(self, functools.partial(pass_on, types.MethodType(original, self)), args, kwargs)

    setattr(generate, _DISPATCHED, True)
    mixin.generate = generate
