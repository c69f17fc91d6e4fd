"""Keeping memory that was freed, for what is needed next.

glibc gives free memory at the end of its heap back to the system. How much may stay there follows from the largest
piece that was ever freed, so it hangs on what a process did before, whether a model's activations lie in the same
memory in every layer or in fresh memory, every page of which the system has to clear.
"""

import ctypes
import os
from functools import cache
from typing import Any

import numpy as np

from .size import on_pressure

KEPT_BYTES = 1 << 30
"""Free bytes at the end of the heap that stay with the process."""
_OWN_MAPPING = 32 << 20
"""Larger pieces are mapped, and given back when they are freed. glibc itself goes no further."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""From malloc.h."""
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")


@cache
def widen_heap() -> None:
    """Has glibc take pieces of up to 32 MiB from its heap, and leave twice that free at its end: it does so by itself
    once a process has freed a piece of that size. Without this, KV that stays among a model's activations makes first
    turns on a CPU touch more fresh memory than they would without a store (SmolLM2, 1,024 tokens, one thread: 6,000 to
    33,000 pages instead of 53,000 to 111,000, in 0.90 to 0.99 times the CPU time)."""
    np.empty(_OWN_MAPPING - (1 << 20), np.uint8)  # mapped, touched by nobody, and freed


@cache
def keep_freed_memory() -> bool:
    """Has glibc keep up to `KEPT_BYTES` of freed memory, in one heap for all threads. For programs that run a model on
    a CPU and whose process is theirs: it holds for all of it, and for its whole life. What is kept goes back to the
    system when memory becomes short, where a store with `memory="auto"` notices.

    Returns:
        Whether that was done: not where memory is not glibc's, nor where the environment sets this up.
    """
    if any(name in os.environ for name in _SETTINGS):
        return False
    try:
        libc: Any = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, TypeError, AttributeError):
        return False
    # the memory of threads that have a heap of their own is mapped in small parts, which are given back one by one
    wanted = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _OWN_MAPPING), (_M_TRIM_THRESHOLD, KEPT_BYTES))
    done = sum(mallopt(option, value) for option, value in wanted) == len(wanted)

    def give_back() -> None:
        trim(0)

    on_pressure(give_back)
    return done
