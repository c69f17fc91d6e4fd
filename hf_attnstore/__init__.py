"""hf-attnstore: the KV cache of every conversation, kept and found again.

What is named here is imported when it is first asked for: whoever only looks after a store need not wait for torch and
transformers.
"""

from typing import TYPE_CHECKING

from ._version import __version__
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
    SettingsError,
    StoreClosedError,
    StoreFormatError,
    StoreIOError,
    TurnQueueError,
    TurnTimeoutError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .cache import Attached, AttentionStoreCache, TurnStats, TurnTotals, attach, detach
    from .cache.inspection import describe
    from .cache.scoring import Score, score, score_tokens
    from .chat import ChatSession, leave_computing_to_others
    from .chat.model import model_source
    from .serving import QueueStats, Turn, TurnQueue
    from .store import AttentionStore, SessionInfo, repair_store
    from .store.memory.freed import keep_freed_memory
else:
    import sys
    from importlib import import_module

    from .lazy import lazily

    def _meet_transformers() -> None:
        """Where transformers is there, the side that knows it is imported before anybody looks up `model.generate`: a
        call may spell `hf_attnstore.AttentionStoreCache(…)` among its arguments."""
        if "transformers" in sys.modules:
            import_module(".cache", __name__)

    def __getattr__(name: str) -> object:
        value = _named(name)
        _meet_transformers()
        return value

    _named, __dir__ = lazily(
        __name__,
        {
            **dict.fromkeys(
                ("Attached", "AttentionStoreCache", "TurnStats", "TurnTotals", "attach", "detach"), ".cache"
            ),
            "describe": ".cache.inspection",
            **dict.fromkeys(("Score", "score", "score_tokens"), ".cache.scoring"),
            **dict.fromkeys(("ChatSession", "leave_computing_to_others"), ".chat"),
            "model_source": ".chat.model",
            **dict.fromkeys(("QueueStats", "Turn", "TurnQueue"), ".serving"),
            **dict.fromkeys(("AttentionStore", "SessionInfo", "repair_store"), ".store"),
            "keep_freed_memory": ".store.memory.freed",
        },
    )
    _meet_transformers()

__all__ = [
    "Attached",
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
    "Score",
    "SessionBusyError",
    "SessionInfo",
    "SessionNameError",
    "SessionNotFoundError",
    "SettingsError",
    "StoreClosedError",
    "StoreFormatError",
    "StoreIOError",
    "Turn",
    "TurnQueue",
    "TurnQueueError",
    "TurnStats",
    "TurnTimeoutError",
    "TurnTotals",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "describe",
    "detach",
    "keep_freed_memory",
    "leave_computing_to_others",
    "model_source",
    "repair_store",
    "score",
    "score_tokens",
]
