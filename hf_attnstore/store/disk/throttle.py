"""A disk that is slower than it is, for tests and benches: there what pays off on a slow disk can be made to happen."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_bandwidth: float | None = None
_free_at = 0.0
_SLACK = 5e-4


@contextmanager
def slow_disk(bytes_per_second: float) -> Iterator[None]:
    """Until this ends, this process reads block files at no more than so many bytes per second, all threads together.

    Raises:
        ValueError: the bandwidth is not positive.
    """
    global _bandwidth
    if not bytes_per_second > 0:
        raise ValueError(f"a bandwidth is a number of bytes per second, not {bytes_per_second}")
    before, _bandwidth = _bandwidth, bytes_per_second
    try:
        yield
    finally:
        _bandwidth = before


def is_slow() -> bool:
    """Whether this process reads as from a slow disk, whatever there is in the page cache."""
    return _bandwidth is not None


def throttled(nbytes: int) -> None:
    """So many bytes were read: waits until a slow disk would have them, if there is to be one."""
    global _free_at
    if _bandwidth is None:
        return
    with _lock:
        now = time.perf_counter()
        _free_at = max(now, _free_at) + nbytes / _bandwidth
        until = _free_at
    if until - now > _SLACK:
        time.sleep(until - now)
