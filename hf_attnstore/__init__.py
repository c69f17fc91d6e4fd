"""hf-attnstore: the KV cache of every conversation, kept and found again."""

from ._version import __version__
from .cache.attach import attach, detach
from .cache.cache import AttentionStoreCache
from .cache.inspection import describe
from .cache.stats import TurnStats
from .chat import ChatSession
from .errors import (
    AttentionStoreError,
    CacheUseError,
    ContextWindowError,
    EncryptionKeyError,
    GradientError,
    LoadError,
    QueueFullError,
    SessionBusyError,
    SessionNameError,
    SessionNotFoundError,
    StoreClosedError,
    StoreFormatError,
    StoreIOError,
    TurnQueueError,
    TurnTimeoutError,
    UnsupportedModelError,
)
from .store.manifest import SessionInfo
from .store.store import AttentionStore, repair_store
from .turn import Turn
from .turn_queue import QueueStats, TurnQueue

__all__ = [
    "AttentionStore",
    "AttentionStoreCache",
    "AttentionStoreError",
    "CacheUseError",
    "ChatSession",
    "ContextWindowError",
    "EncryptionKeyError",
    "GradientError",
    "LoadError",
    "QueueFullError",
    "QueueStats",
    "SessionBusyError",
    "SessionInfo",
    "SessionNameError",
    "SessionNotFoundError",
    "StoreClosedError",
    "StoreFormatError",
    "StoreIOError",
    "Turn",
    "TurnQueue",
    "TurnQueueError",
    "TurnStats",
    "TurnTimeoutError",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "describe",
    "detach",
    "repair_store",
]
