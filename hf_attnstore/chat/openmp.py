"""Letting go of the threads that torch computes with.

GNU's OpenMP, which torch uses on Linux, keeps a team of threads for every thread that has ever computed in parallel. As
long as all teams together have no more threads than there are CPUs, those that wait for work spin; else they sleep,
and to be woken costs more than most of a decoding step's pieces take: on two CPUs, a step took 1.2 to 1.4 times as
long as soon as a second thread had computed anything, and a copy of half a megabyte 140 µs instead of 35.
"""

import ctypes
from functools import cache
from typing import Any


@cache
def _pause() -> Any:
    """OpenMP's own function for it; None where this is not GNU's, whose teams do not depend on each other."""
    try:
        loaded: Any = ctypes.CDLL(None)
        if not hasattr(loaded, "GOMP_parallel") or hasattr(loaded, "__kmpc_fork_call"):
            return None
        return loaded.omp_pause_resource_all
    except (OSError, TypeError, AttributeError):
        return None


_SOFT = 1


def leave_computing_to_others() -> bool:
    """The calling thread will not compute for a while, and another will: its team ends. The next time that it does
    compute it gets a new one, which takes a fraction of a millisecond.

    Returns:
        Whether that could be done.
    """
    pause = _pause()
    return pause is not None and pause(_SOFT) == 0
