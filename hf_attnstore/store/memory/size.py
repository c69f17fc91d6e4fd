"""`memory="auto"`: how large the memory tier is to be, as the machine's free memory comes and goes.

The rule is pure; `AutomaticSize` applies it. It does so where memory is about to be reserved, because a store that
fills fast would outrun any clock, and from a thread, because others need memory while the store is idle, too.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tier import MemoryTier

logger = logging.getLogger("hf_attnstore")

AUTO = "auto"
WITHOUT_KNOWLEDGE = 2 << 30
"""Bytes of memory for blocks where nobody can say how much is free."""

_MIB, _GIB = 1 << 20, 1 << 30
_TICK_SECONDS = 2.0
_RESERVE_SECONDS = 0.5

_pressure: list[Callable[[], None]] = []


def on_pressure(relieve: Callable[[], None]) -> Callable[[], None]:
    """Has `relieve` called when memory was given up, to give back what only waits for its next use. A decorator."""
    _pressure.append(relieve)
    return relieve


@dataclass(frozen=True)
class FreeMemory:
    """What there is, in bytes: of the machine, or of the container if that has less."""

    total: int
    available: int
    """What can be had without swapping; pages that only cache files count."""


def next_capacity(free: FreeMemory, used: int, current: int | None = None) -> int:
    """The capacity from now on, in bytes.

    Others are left half of all memory at least, and a tenth of it (256 MiB to 4 GiB, though at most a quarter of it)
    stays free. What stays free has two levels: capacity shrinks below the lower one and grows above the higher one
    only, so that it does not go to and fro.

    Args:
        used: bytes that the store itself has of the memory that is not available.
        current: the capacity until now; None at the beginning.
    """
    margin = min(max(free.total // 10, 256 * _MIB), 4 * _GIB, free.total // 4)
    most = free.total // 2
    room = free.available + used
    shrink_to = max(0, min(most, room - margin))
    grow_to = max(0, min(most, room - margin - margin // 2))
    if current is None:
        return grow_to
    return min(max(current, grow_to), shrink_to)


def free_memory() -> FreeMemory | None:
    """What psutil and the control group say; None where neither can be asked."""
    found = [*_of_the_machine(), *_of_the_group()]
    if not found:
        return None
    return FreeMemory(min(f.total for f in found), min(f.available for f in found))


def _of_the_machine() -> list[FreeMemory]:
    try:
        import psutil

        memory = psutil.virtual_memory()
        total, available = int(memory.total), int(memory.available)
    except Exception as error:  # no /proc, a system that it does not know, a broken installation
        logger.debug("psutil can't say how much memory is free: %r", error)
        return []
    return [FreeMemory(total, max(available, 0))] if total > 0 else []


_V2 = ("memory.max", "memory.current", "inactive_file", "active_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")


def _of_the_group(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[FreeMemory]:
    """The limits of the control groups, of either version, that this process is in: each may have its own."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    found: list[FreeMemory] = []
    for number, controllers, path in (line for line in lines if len(line) == 3):
        if number == "0" and not controllers:
            base, names = root, _V2
        elif "memory" in controllers.split(","):
            base, names = root / "memory", _V1
        else:
            continue
        # within a container its own group may be shown as the root, under whatever path
        inner = Path(path.lstrip("/"))
        folders = [base / inner, *(base / parent for parent in inner.parents), base]
        found += [limit for folder in dict.fromkeys(folders) if (limit := _limit(folder, *names)) is not None]
    return found


def _limit(folder: Path, limit: str, usage: str, inactive: str, active: str) -> FreeMemory | None:
    """What one control group may have, and has left; None where it has no limit."""
    try:
        total = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(fields.get(inactive, 0)) + int(fields.get(active, 0)) // 2
    except (OSError, ValueError):  # "max" is no number: no limit
        return None
    if total <= 0 or total >= 1 << 60:
        return None
    return FreeMemory(total, max(0, total - max(used - cached, 0)))


class AutomaticSize:
    """Keeps a memory tier as large as the rule says, until it is closed or nobody has it any more.

    What is free is asked every few seconds.

    Args:
        resized: called with the capacity, in bytes, whenever that was set.
    """

    def __init__(self, memory: MemoryTier, resized: Callable[[int], None] = lambda capacity: None) -> None:
        self._memory = memory
        self._resized = resized
        self._checked = 0.0
        self._checking = threading.Lock()
        self._ended = threading.Event()
        free = free_memory()
        if free is None:
            logger.warning(
                'nobody can say how much memory is free here: memory="auto" is %d GiB', WITHOUT_KNOWLEDGE // _GIB
            )
            self._resize(WITHOUT_KNOWLEDGE)
            self._thread: threading.Thread | None = None
            return
        self._resize(next_capacity(free, 0))
        arguments: tuple[Any, ...] = (weakref.ref(self), self._ended)
        self._thread = threading.Thread(target=_watch, args=arguments, name="attnstore-memory", daemon=True)
        self._thread.start()

    def before_reserving(self) -> None:
        """Memory is about to be reserved: looks whether there is still as much, unless it just did."""
        if time.monotonic() - self._checked > _RESERVE_SECONDS:
            self.check()

    def check(self) -> None:
        """Looks how much is free, and sets the capacity accordingly."""
        if self._thread is None or not self._checking.acquire(blocking=False):
            return  # another thread is just doing it
        try:
            self._checked = time.monotonic()
            free = free_memory()
            if free is None:  # for a moment, perhaps: what was known stays
                return
            before = self._memory.capacity
            after = next_capacity(free, self._memory.used, before)
            if after == before:
                return
            self._resize(after)
            if after < before:
                for relieve in _pressure:
                    relieve()
        finally:
            self._checking.release()

    def _resize(self, capacity: int) -> None:
        self._memory.resize(capacity)
        self._resized(capacity)

    def close(self) -> None:
        """Nothing is looked at any more."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def _watch(reference: "weakref.ref[AutomaticSize]", ended: threading.Event) -> None:
    while not ended.wait(_TICK_SECONDS):
        size = reference()
        if size is None:
            return
        try:
            size.check()
        except Exception:
            logger.debug("looking for free memory failed", exc_info=True)
        del size
