"""The transformers side: a `Cache` whose layers come from a store and go back to it."""

from . import batch, encoder_decoder  # noqa: F401 each says which models and sessions it serves
from .cache import AttentionStoreCache
from .generate.dispatch import install
from .generate.wrapper import generate_with_store
from .hooks import attach, detach, wrap_generate_with
from .model.tested import warn_if_untested
from .stats import TurnStats

wrap_generate_with(generate_with_store, install)
install()
warn_if_untested()

__all__ = ["AttentionStoreCache", "TurnStats", "attach", "detach"]
