"""The transformers side: a `Cache` whose layers come from a store and go back to it."""

from .attach import attach, detach
from .cache import AttentionStoreCache
from .dispatch import install
from .stats import TurnStats

install()

__all__ = ["AttentionStoreCache", "TurnStats", "attach", "detach"]
