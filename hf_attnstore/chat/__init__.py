"""Conversations in messages, over a chat template: `ChatSession`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .openmp import leave_computing_to_others
    from .session import ChatSession
else:
    from ..lazy import lazily

    __getattr__, __dir__ = lazily(__name__, {"ChatSession": ".session", "leave_computing_to_others": ".openmp"})

__all__ = ["ChatSession", "leave_computing_to_others"]
