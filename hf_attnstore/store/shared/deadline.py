"""How long an operation on an engine may take in all, and when not to ask a sick one at all."""

import threading
import time
from collections.abc import Callable

from ..processes.forking import watch

FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds."""


class Deadline:
    """So many seconds from now, however many steps they are spent in: a peer that trickles gains nothing."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, more than 0.

        Raises:
            TimeoutError: there are none.
        """
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("it took too long")
        return seconds


class Breaker:
    """Keeps an engine that has failed from being asked until it was found to be well again; for that it is tried now
    and then, twice as seldom each time, and never given up. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pause = 0.0
        self._until = 0.0
        watch(self)

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()

    @property
    def well(self) -> bool:
        """Whether the engine may be asked by somebody who waits for it."""
        return not self._pause

    @property
    def wait(self) -> float:
        """Seconds until it is to be tried."""
        return max(self._until - self._clock(), 0.0)

    def failed(self) -> None:
        """The engine did not answer, or not in time."""
        with self._lock:
            if self._pause and self._clock() < self._until:
                return  # others have said so
            self._pause = min(max(2 * self._pause, FIRST_PAUSE), _LONGEST_PAUSE)
            self._until = self._clock() + self._pause

    def worked(self) -> None:
        """The engine answered."""
        if self._pause:
            with self._lock:
                self._pause = self._until = 0.0
