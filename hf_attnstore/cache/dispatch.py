"""Where `model.generate` was looked up before the model was attached.

In `model.generate(**inputs, past_key_values=AttentionStoreCache(model, …))` Python looks up `model.generate` first and
makes the cache, which attaches the wrapper to the model, after that: the function that then runs is the class's. So the
class's function has to pass such a call on. It does nothing else: calls without a cache of ours go straight through.
"""

import functools
from typing import Any

from transformers import GenerationMixin

from .argument import cache_in
from .attach import DISPATCHED, attachment_of
from .cache import AttentionStoreCache
from .generate import generate_with_store


def install() -> None:
    """Makes transformers' `generate` pass on calls with a cache of ours. Once per process; harmless when repeated."""
    original = GenerationMixin.generate
    if hasattr(original, DISPATCHED):
        return

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs, AttentionStoreCache)
        if cache is None or cache.in_generate or type(self).generate is not generate or attachment_of(self) is None:
            return original(self, *args, **kwargs)
        return generate_with_store(self, *args, **kwargs)

    setattr(generate, DISPATCHED, original)
    GenerationMixin.generate = generate  # type: ignore[method-assign]
