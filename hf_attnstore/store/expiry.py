"""When sessions that nobody goes on with are to be looked for; all namespaces of a store share it."""

import threading
from dataclasses import dataclass, field

from .disk.surroundings import Clock

EVERY = 3600.0
"""Seconds between two looks."""


@dataclass
class Expiry:
    """How long sessions are kept without a turn."""

    days: float | None
    """None keeps all."""
    clock: Clock
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: float = float("-inf")

    def is_due(self) -> bool:
        """Whether to look now; who is told so is the one to do it."""
        if self.days is None:
            return False
        with self._lock:
            now = self.clock.monotonic()
            if now < self._next:
                return False
            self._next = now + EVERY
            return True

    @property
    def unused_since(self) -> float:
        """The date before which a session's last turn was, if it is to go."""
        return self.clock.time() - (self.days if self.days is not None else float("inf")) * 86400
