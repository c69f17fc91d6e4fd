"""The window that a conversation has to fit into, and what is dropped when it does not."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..errors import CacheUseError, ContextWindowError

KEEP_FIRST = 4
"""Leading tokens that are kept unless somebody says otherwise: models put much of their attention on the first ones,
whatever they are (attention sinks: Xiao et al., arXiv 2309.17453), and answer badly without."""


class Cuts(Protocol):
    """Where a conversation may be cut; positions are those in the whole conversation."""

    @property
    def first(self) -> int:
        """Leading tokens that are never dropped."""

    @property
    def last(self) -> int:
        """What comes before may be dropped, though it is new."""

    def end(self, least: int, wanted: int) -> int:
        """Where a cut ends that is to go up to `wanted`, and has to go up to `least`."""


@dataclass(frozen=True)
class Window:
    """How many tokens the model is to see at once, and how room is made.

    Raises:
        CacheUseError: a number that makes no sense.
    """

    size: int
    """Tokens, those still to be generated included."""
    keep_first: int
    """Leading tokens that are never dropped: a system prompt, attention sinks."""
    drop: float = 0.5
    """The share of the other tokens, oldest first, that goes when there is no room."""

    def __post_init__(self) -> None:
        if self.size < 2:
            raise CacheUseError(f"window is a number of tokens, at least 2, not {self.size}")
        if self.keep_first < 0:
            raise CacheUseError(f"keep_first is a number of tokens, not {self.keep_first}")
        if not 0 < self.drop <= 1:
            raise CacheUseError(f"drop is a share, more than 0 and at most 1, not {self.drop}")
        if self.keep_first >= self.size - 1:
            raise ContextWindowError(
                f"keep_first={self.keep_first} leaves no room for other tokens in a window of {self.size}"
            )

    def check_room(self, room: int) -> None:
        """Checks that `room` tokens can be generated at all.

        Raises:
            ContextWindowError: not even one other token would fit beside them.
        """
        if self.keep_first + room >= self.size:
            raise ContextWindowError(
                f"max_new_tokens={room} and keep_first={self.keep_first} do not fit into the window of {self.size} "
                "tokens; generate fewer tokens, or set a larger window"
            )

    def overflows(self, tokens: int, room: int) -> bool:
        """Whether `tokens` in the window leave less than `room` for what is to be generated."""
        return tokens + room > self.size

    def choose(
        self, tokens: int, history: int, room: int, end: Callable[[int, int], int] | None = None
    ) -> tuple[int, int]:
        """Which of `tokens` tokens in view to drop, so that they and `room` more fit.

        Args:
            history: leading tokens that may be dropped; what follows is new.
            end: where to end, given how far it has to go at least and how far the share of `drop` goes.

        Returns:
            The range `[low, high)` of positions to drop.

        Raises:
            ContextWindowError: what may not be dropped is too long already.
        """
        excess = tokens + room - self.size
        low = min(self.keep_first, history)
        droppable = history - low
        if excess > droppable:
            kept = f" beside {low} kept first" if low else ""
            raise ContextWindowError(
                f"{tokens - history} new tokens{kept} and room for {room} to generate do not fit into the window of "
                f"{self.size} tokens; send less at once, generate less, or set a larger window"
            )
        count = min(max(excess, math.ceil(self.drop * droppable)), droppable)
        return low, end(low + max(excess, 0), low + count) if end is not None else low + count
