"""The kernel's page cache: is a file in it, put it there, take it out, and how fast does a plain read go."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path


def resident_fraction(paths: Sequence[Path]) -> float | None:
    """Share of the files' pages that are in the page cache, 0 to 1; None where `mincore` is not to be had."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError, TypeError):
        return None
    pages = resident = 0
    for path in paths:
        size = path.stat().st_size
        if size == 0:
            continue
        count = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * count)()
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
            anchor = ctypes.c_char.from_buffer(view)
            failed = mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), flags)
            del anchor  # the map cannot be closed while something points into it
        if failed:
            return None
        pages += count
        resident += sum(flag & 1 for flag in flags)
    return resident / pages if pages else None


def evict(paths: Sequence[Path]) -> bool:
    """Ask the kernel to forget the files' pages, once they are safely on disk; False if it cannot be asked.

    Whether it did so is for `resident_fraction` to say: it may keep pages, and a file system in memory
    keeps them all.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return True


def read_into(paths: Sequence[Path], buffer: memoryview) -> float:
    """Read the files one after the other into `buffer`, from its start; returns seconds.

    Raises:
        ValueError: the buffer is smaller than the files together.
    """
    if len(buffer) < sum(path.stat().st_size for path in paths):
        raise ValueError("The buffer is smaller than the files.")
    start = time.perf_counter()
    at = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer[at:]):
                at += got
    return time.perf_counter() - start
