"""The transformers side: a `Cache` whose layers come from a store and go back to it."""

from . import batch, encoder_decoder, own_states  # noqa: F401 each says which models and sessions it serves
from .cache import AttentionStoreCache
from .continuous.manager import init_with_store
from .generate.dispatch import install
from .generate.wrapper import generate_with_store
from .hooks import Attached, attach, detach, stand_in
from .model.tested import warn_if_untested
from .stats import TurnStats, TurnTotals

stand_in("generate", generate_with_store, install)
stand_in("init_continuous_batching", init_with_store)
install()
warn_if_untested()

__all__ = ["Attached", "AttentionStoreCache", "TurnStats", "TurnTotals", "attach", "detach"]
