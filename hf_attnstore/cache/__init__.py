"""The transformers side: a `Cache` whose layers come from a store and go back to it."""

from .attach import attach, detach
from .cache import AttentionStoreCache
from .dispatch import install
from .stats import TurnStats
from .tested import warn_if_untested

install()
warn_if_untested()

__all__ = ["AttentionStoreCache", "TurnStats", "attach", "detach"]
