"""The transformers side: a `Cache` whose layers come from a store and go back to it."""

from .cache import AttentionStoreCache
from .generate.dispatch import install
from .hooks import attach, detach
from .model.tested import warn_if_untested
from .stats import TurnStats

install()
warn_if_untested()

__all__ = ["AttentionStoreCache", "TurnStats", "attach", "detach"]
