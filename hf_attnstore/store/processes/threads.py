"""Threads for I/O, and the right of way that computing on the CPU has over writing."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .forking import watch

MAX_HOLD_SECONDS = 5.0
"""How long tasks are held back at most, whoever computes meanwhile: one long turn, or many one after the other."""


class RightOfWay:
    """Lets tasks that nobody waits for stand back while somebody computes on the cores that they would take.

    On two cores a writer thread made decoding 1.2 times as slow while it wrote; what it writes can wait until the
    turn is over. Nothing is held for longer than `MAX_HOLD_SECONDS`, nor while anybody is `hurry`-ing.
    """

    def __init__(self, max_seconds: float = MAX_HOLD_SECONDS) -> None:
        self._max_seconds = max_seconds
        self._changed = threading.Condition()
        self._computing: set[object] = set()
        self._held_since: float | None = None
        """When the first task was held back; None where the last one was not."""
        self._hurried = 0
        watch(self)

    def after_fork_in_child(self) -> None:
        self._changed = threading.Condition()
        self._computing.clear()

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Somebody waits for the tasks: none is held back meanwhile."""
        with self._changed:
            self._hurried += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._hurried -= 1

    def take(self, owner: object) -> None:
        """Tasks stand back until `owner` gives way."""
        with self._changed:
            self._computing.add(owner)

    def give(self, owner: object) -> None:
        """`owner` computes no more. Harmless if it did not."""
        with self._changed:
            self._computing.discard(owner)
            self._changed.notify_all()

    def overrule(self) -> None:
        """What is held back is needed now: everybody who computes at the moment loses the right of way."""
        with self._changed:
            self._computing.clear()
            self._changed.notify_all()

    def wait(self) -> None:
        """Returns when a task may run. Once one was held for as long as may be, those that come run at once until
        there is a moment in which nobody computes."""
        with self._changed:
            while self._computing and not self._hurried:
                now = time.monotonic()
                if self._held_since is None:
                    self._held_since = now
                left = self._held_since + self._max_seconds - now
                if left <= 0:
                    return
                self._changed.wait(left)
            self._held_since = None


class IOThreads:
    """A few daemon threads that run tasks in the order given."""

    def __init__(self, count: int, name: str, right_of_way: RightOfWay | None = None) -> None:
        self.count = count
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._submitting = threading.Lock()
        self._right_of_way = right_of_way
        self._closed = False
        self.left_behind = False
        """Whether this is a child of the process that had the threads: nothing that waits in them will ever be done."""
        watch(self)
        self._threads = [
            threading.Thread(target=self._run, name=f"attnstore-{name}-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        """Has a task run. After `close` there is no thread left for it: the caller runs it, rather than wait for
        ever for a load that was under way when the store was closed."""
        with self._submitting:
            closed = self._closed
            if not closed:
                self._tasks.put(task)
        if closed:
            task()

    def share(self, work: Callable[[], None], helpers: int) -> None:
        """Runs `work` here, and in up to so many of the threads as are free meanwhile; returns when nobody is at it
        any more.

        Args:
            work: does one part after the other until there are none left, whoever else does; must not fail.
        """
        changed = threading.Condition()
        at_it, over = 0, False

        def help_out() -> None:
            nonlocal at_it
            with changed:
                if over:
                    return
                at_it += 1
            try:
                work()
            finally:
                with changed:
                    at_it -= 1
                    changed.notify_all()

        for _ in range(min(helpers, self.count)):
            self.submit(help_out)
        try:
            work()
        finally:
            with changed:
                over = True
                changed.wait_for(lambda: not at_it)

    def drain(self) -> None:
        """Returns when every task submitted so far has run. For a single thread only: several do not keep order."""
        done = threading.Event()
        if self._right_of_way is None:
            self.submit(done.set)
            done.wait()
            return
        with self._right_of_way.hurry():
            self.submit(done.set)
            done.wait()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._right_of_way is not None:
                self._right_of_way.wait()
            task()
            del task  # do not keep a finished load's buffers alive while waiting for the next

    def has(self, thread: threading.Thread) -> bool:
        """Whether that is one of them."""
        return thread in self._threads

    def after_fork_in_child(self) -> None:
        self._submitting, self._tasks = threading.Lock(), queue.SimpleQueue()
        self._closed = self.left_behind = True
        self._threads = []

    def close(self) -> None:
        """Runs what was submitted, then ends the threads."""
        with self._submitting:
            self._closed = True
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads:
            thread.join()
