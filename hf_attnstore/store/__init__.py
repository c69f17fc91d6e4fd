"""The store: named tensors under a key, in tiers. Knows nothing of models or transformers."""

from .records.manifest import SessionInfo
from .store import AttentionStore, repair_store

__all__ = ["AttentionStore", "SessionInfo", "repair_store"]
