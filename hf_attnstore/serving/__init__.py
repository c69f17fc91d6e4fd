"""Turns from many threads on one model: `TurnQueue`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .queue import QueueStats, TurnQueue
    from .turn import Turn
else:
    from ..lazy import lazily

    __getattr__, __dir__ = lazily(__name__, {"QueueStats": ".queue", "Turn": ".turn", "TurnQueue": ".queue"})

__all__ = ["QueueStats", "Turn", "TurnQueue"]
