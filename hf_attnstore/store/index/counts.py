"""Numbers about what a store did, and warnings that are not repeated."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping

from ..processes.forking import watch

logger = logging.getLogger("hf_attnstore")

COUNTS = (
    "turns", "turns_with_reuse", "prompt_tokens", "reused_tokens", "loaded_bytes", "saved_blocks", "saved_bytes",
    "written_bytes", "evicted_blocks", "fetched_blocks", "fetched_bytes", "coded_bytes", "coded_to_bytes",
    "not_saved_blocks", "not_admitted_blocks", "rejected", "write_errors", "read_errors",
    "shared_blocks", "shared_bytes", "shared_read_bytes", "shared_dropped_blocks", "shared_refused_blocks",
    "shared_errors",
)  # fmt: skip
TIMES = ("load_microseconds", "exposed_load_microseconds", "write_microseconds", "code_microseconds")
CODED = "coded_bytes", "coded_to_bytes", "code_microseconds"
"""Of all codecs together; each has the same behind its name."""
MISSED = "missed: "
"""Begins the names of counts of turns by the reason for which nothing was reused."""


class Accounts:
    """Counts since the store was opened, and what of them is not yet in the totals."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        watch(self)
        self._counts: Counter[str] = Counter()
        self._new: Counter[str] = Counter()
        self._warned: set[str] = set()

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()

    def count(self, what: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[what] += amount
            self._new[what] += amount

    def count_all(self, amounts: Mapping[str, int]) -> None:
        with self._lock:
            self._counts.update(amounts)
            self._new.update(amounts)

    def counts(self) -> Counter[str]:
        """All counts. A copy."""
        with self._lock:
            return Counter(self._counts)

    @property
    def failures(self) -> int:
        return self._counts["rejected"] + self._counts["read_errors"]

    def take_new(self) -> dict[str, int]:
        """What was counted since this was called last."""
        with self._lock:
            new, self._new = self._new, Counter()
        return {name: amount for name, amount in new.items() if amount}

    def give_back(self, new: Mapping[str, int]) -> None:
        """What was taken could not be kept: it is for the next time."""
        with self._lock:
            self._new.update(new)

    def warn_once(self, kind: str, message: str) -> None:
        """Warns, unless it did about the same `kind` and that is not over."""
        with self._lock:
            if kind in self._warned:
                return
            self._warned.add(kind)
        logger.warning(message)

    def over(self, kind: str) -> None:
        """What was warned about is over."""
        with self._lock:
            self._warned.discard(kind)


def readable(counts: Mapping[str, int]) -> dict[str, int | float]:
    """Counts by name, all of them, with times in seconds; of codecs what they made of bytes, and in what time."""
    shown: dict[str, int | float] = {name: counts.get(name, 0) for name in COUNTS}
    shown |= {name.replace("microseconds", "seconds"): counts.get(name, 0) / 1e6 for name in TIMES}
    for name, count in sorted(counts.items()):
        codec = name.removesuffix(f"_{CODED[0]}")
        if codec != name and count:
            shown[f"{codec}_ratio"] = counts.get(f"{codec}_{CODED[1]}", 0) / count
            shown[f"{codec}_seconds"] = counts.get(f"{codec}_{CODED[2]}", 0) / 1e6
    return shown | {name: count for name, count in sorted(counts.items()) if name.startswith(MISSED)}
