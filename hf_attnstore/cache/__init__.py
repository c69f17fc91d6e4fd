"""The transformers side: a `Cache` whose layers come from a store and go back to it."""

from .attach import attach, detach
from .cache import AttentionStoreCache
from .stats import TurnStats

__all__ = ["AttentionStoreCache", "TurnStats", "attach", "detach"]
