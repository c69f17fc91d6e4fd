"""Threads for I/O, and the right of way that computing on the CPU has over writing."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_HOLD_SECONDS = 5.0
"""How long tasks are held back at most, counted from the beginning of the oldest turn that holds them."""


class RightOfWay:
    """Lets tasks that nobody waits for stand back while somebody computes on the cores that they would take.

    On two cores a writer thread made decoding 1.2 times as slow while it wrote; what it writes can wait until the
    turn is over. Nothing is held for longer than `MAX_HOLD_SECONDS`, nor while anybody is `hurry`-ing.
    """

    def __init__(self, max_seconds: float = MAX_HOLD_SECONDS) -> None:
        self._max_seconds = max_seconds
        self._changed = threading.Condition()
        self._began: dict[object, float] = {}
        self._hurried = 0

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
            self._began.setdefault(owner, time.monotonic())

    def give(self, owner: object) -> None:
        """`owner` computes no more. Harmless if it did not."""
        with self._changed:
            if self._began.pop(owner, None) is not None:
                self._changed.notify_all()

    def overrule(self) -> None:
        """What is held back is needed now: everybody who computes at the moment loses the right of way."""
        with self._changed:
            self._began.clear()
            self._changed.notify_all()

    def wait(self) -> None:
        """Returns when a task may run."""
        with self._changed:
            while self._began and not self._hurried:
                now = time.monotonic()
                self._began = {who: began for who, began in self._began.items() if now - began < self._max_seconds}
                if self._began:
                    self._changed.wait(min(self._began.values()) + self._max_seconds - now)


class IOThreads:
    """A few daemon threads that run tasks in the order given."""

    def __init__(self, count: int, name: str, right_of_way: RightOfWay | None = None) -> None:
        self.count = count
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._submitting = threading.Lock()
        self._right_of_way = right_of_way
        self._closed = False
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

    def close(self) -> None:
        """Runs what was submitted, then ends the threads."""
        with self._submitting:
            self._closed = True
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads:
            thread.join()
