"""What a fork does to open stores: in the child they are closed, and what the parent goes on with is not touched.

A child has none of the threads, every lock as it was at that moment, and descriptors that it shares with the parent.
SQLite must not be carried across a fork at all, or the child's own locks on the same file would not be real ones: so
the connections are closed before, and made again when they are next used.
"""

import os
import threading
import weakref
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from ...errors import StoreClosedError


class Forkable(Protocol):
    """Something with locks, threads or descriptors."""

    def after_fork_in_child(self) -> None:
        """Waits for nobody, and lets go of what is the parent's without unlocking it."""


class Resting(Forkable, Protocol):
    """Something that must not be in the middle of anything when a process forks."""

    def before_fork(self) -> None: ...

    def after_fork_in_parent(self) -> None: ...


_watched: "weakref.WeakSet[Forkable]" = weakref.WeakSet()
_resting: "weakref.WeakSet[Resting]" = weakref.WeakSet()
_at_rest: list[Resting] = []
"""While the process forks, which one thread at a time does."""
_forking = threading.RLock()


def watch(thing: Forkable) -> None:
    """Has `thing` told of it when it finds itself in a child."""
    _watched.add(thing)


def rest(thing: Resting) -> None:
    """As `watch`, and has `thing` told before."""
    watch(thing)
    _resting.add(thing)


def _before() -> None:
    _forking.acquire()
    _at_rest[:] = list(_resting)
    for thing in _at_rest:
        thing.before_fork()


def _in_parent() -> None:
    for thing in _at_rest:
        thing.after_fork_in_parent()
    _at_rest.clear()
    _forking.release()


def _in_child() -> None:
    global _forking
    _forking = threading.RLock()
    _at_rest.clear()
    for thing in list(_watched):
        thing.after_fork_in_child()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)


def closed_error(path: Path, left_behind: bool) -> StoreClosedError:
    """The error for who uses a store that is closed.

    Args:
        left_behind: because it is the store of the process that this one was forked from.
    """
    if left_behind:
        return StoreClosedError(
            f"the store {path} belongs to the process from which this one was forked: open it here with "
            "AttentionStore(...), and make caches, or `attach`, with that"
        )
    return StoreClosedError(f"the store {path} is closed; open it again with AttentionStore(...)")


def let_go(lock: FileLock) -> None:
    """Closes a child's copy of what a lock has open. Unlocking it would unlock the parent's; new versions of filelock
    do the same by themselves."""
    context = getattr(lock, "_context", None)
    fd = getattr(context, "lock_file_fd", None)
    if context is not None and fd is not None:
        context.lock_file_fd = None
        os.close(fd)
