"""hf-attnstore: the KV cache of every conversation, kept and found again."""

from ._version import __version__
from .cache.cache import AttentionStoreCache
from .cache.hooks import attach, detach
from .cache.inspection import describe
from .cache.stats import TurnStats
from .chat.session import ChatSession
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
from .serving.queue import QueueStats, TurnQueue
from .serving.turn import Turn
from .store.records.manifest import SessionInfo
from .store.store import AttentionStore, repair_store

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
