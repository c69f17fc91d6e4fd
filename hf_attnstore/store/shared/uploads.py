"""What goes up behind the turns: tasks in order, in a thread of their own, of which the oldest go where there are too
many."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..processes.forking import watch
from ..processes.threads import RightOfWay
from .deadline import Breaker

_MOST_TASKS = 65_536


@dataclass
class Task:
    """Something to be done by the thread."""

    run: Callable[[], None]
    nbytes: int = 0
    """How much it would send: what counts against the cap. Tasks of 0 bytes are not dropped for others."""
    left_out: Callable[[], None] | None = None
    """Called instead, if it is dropped."""


class Uploads:
    """A queue and its thread. Tasks wait while somebody computes, and while the engine is not well; the thread finds
    out when it is.

    Args:
        probe: asks the engine something, and tells the breaker.
        most: bytes that wait at most.
        dropped: told how many tasks were dropped for newer ones.
    """

    def __init__(
        self,
        breaker: Breaker,
        probe: Callable[[], None],
        right_of_way: RightOfWay,
        most: int,
        dropped: Callable[[int], None],
    ) -> None:
        self._breaker, self._probe, self._right_of_way = breaker, probe, right_of_way
        self._most, self._dropped = most, dropped
        self._changed = threading.Condition()
        self._tasks: deque[Task] = deque()
        self._nbytes = 0
        self._running = self._ended = False
        watch(self)
        self._thread: threading.Thread | None = None

    def after_fork_in_child(self) -> None:
        self._changed, self._ended = threading.Condition(), True
        self._tasks.clear()

    @property
    def nbytes(self) -> int:
        """What waits."""
        return self._nbytes

    def submit(self, task: Task) -> None:
        """Has a task run, unless it is dropped before; returns at once."""
        dropped: list[Task] = []
        with self._changed:
            if self._ended:
                return
            self._start()
            self._tasks.append(task)
            self._nbytes += task.nbytes
            while self._nbytes > self._most or len(self._tasks) > _MOST_TASKS:
                oldest = next((t for t in self._tasks if t.nbytes), self._tasks[0])
                self._tasks.remove(oldest)
                self._nbytes -= oldest.nbytes
                dropped.append(oldest)
            self._changed.notify_all()
        if dropped:
            self._dropped(len(dropped))
        for each in dropped:
            if each.left_out is not None:
                each.left_out()

    def drain(self) -> bool:
        """Waits until everything is up, or the engine fails. Whether everything is."""
        with self._right_of_way.hurry(), self._changed:
            while (self._tasks or self._running) and not self._ended:
                if not self._breaker.well:
                    return False
                self._changed.wait(0.05)
            return not self._tasks

    def close(self) -> None:
        """Ends the thread, without what still waits."""
        with self._changed:
            self._ended = True
            self._tasks.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self) -> None:
        if self._thread is None and not self._ended:
            self._thread = threading.Thread(target=self._run, name="attnstore-share", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """The engine is not well any more: looks when it is."""
        with self._changed:
            self._start()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ended and not (self._tasks if self._breaker.well else not self._breaker.wait):
                    self._changed.wait(None if self._breaker.well else self._breaker.wait)
                if self._ended:
                    return
            if not self._breaker.well:
                self._probe()
                continue
            self._right_of_way.wait()
            with self._changed:
                if not self._tasks:
                    continue
                task = self._tasks.popleft()
                self._nbytes -= task.nbytes
                self._running = True
            try:
                task.run()
            finally:
                del task
                with self._changed:
                    self._running = False
                    self._changed.notify_all()
