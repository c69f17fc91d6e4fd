"""Blocks as values of an engine, open for reading: their edges are there, the rest comes over one stream for all."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..blocks.block import Bytes
from ..blocks.stored import Ranges
from ..processes.threads import RightOfWay
from .deadline import Deadline
from .engine import Edges, Engine, EngineError, Stream

MOST_ASKED = 16 << 20
"""Bytes that are asked for and not taken at any moment: a server holds in its memory what nobody reads."""

_LEAST_PATIENCE = 0.1
"""Seconds: short texts are computed in no time, and an engine is not ill because it takes longer than that."""


@dataclass
class _Asked:
    name: str
    offset: int
    nbytes: int
    data: memoryview | None = None
    """What came of it, where somebody wanted what comes after it first."""

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class Reading:
    """What the values of one load have in common: a stream, and the seconds that they may all be waited for.

    Args:
        patience: those seconds. Time in which nobody waits does not count.
        on_end: told, at the first failure or when all values are closed, what failed, if anything.
        on_bytes: told how many bytes came.
        right_of_way: what goes up stands back while there are open values.
    """

    def __init__(
        self,
        engine: Engine,
        patience: float,
        on_end: Callable[[EngineError | None], None],
        on_bytes: Callable[[int], None],
        right_of_way: RightOfWay | None = None,
    ) -> None:
        self._engine, self._right_of_way = engine, right_of_way
        self._patience = patience
        self._on_end, self._on_bytes = on_end, on_bytes
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._error: EngineError | None = None
        self._waiting: deque[_Asked] = deque()
        """Not asked for yet."""
        self._asked: deque[_Asked] = deque()
        self._on_the_way = 0
        self._came: list[_Asked] = []
        self._open = 0

    def opened(self) -> None:
        self._open += 1
        if self._right_of_way is not None:
            self._right_of_way.take(self)

    def closed(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                if self._right_of_way is not None:
                    self._right_of_way.give(self)
                if self._stream is not None:
                    self._stream.close(reuse=self._error is None)
                if self._error is None:
                    self._on_end(None)

    def wait_at_most(self, seconds: float) -> None:
        """From now on; a moment at least."""
        self._patience = min(self._patience, max(seconds, _LEAST_PATIENCE))

    def will_need(self, name: str, offset: int, nbytes: int) -> None:
        """A range will be read. Ranges that follow each other are asked for as one, and so the last waits for the next
        call."""
        with self._lock:
            last = self._waiting[-1] if self._waiting else None
            if last is not None and last.name == name and last.end == offset:
                last.nbytes += nbytes
                return
            self._waiting.append(_Asked(name, offset, nbytes))
            self._ask(keep=1)

    def read(self, name: str, offset: int, buffers: Sequence[Bytes]) -> int:
        """Bytes from `offset` on, as many as come with what was asked for, or all that the buffers take."""
        with self._lock:
            for place, asked in enumerate(self._came):
                if asked.name == name and asked.offset == offset:
                    del self._came[place]
                    return self._spread(asked, buffers)
            return self._spending(lambda deadline: self._read(name, offset, buffers, deadline))

    def _spending(self, step: Callable[[Deadline], int]) -> int:
        if self._error is not None:
            raise self._error
        deadline = Deadline(self._patience)
        try:
            return step(deadline)
        except TimeoutError:
            error = EngineError("the engine was waited for as long as may be")
            self._failed(error)
            raise error from None
        except EngineError as error:
            self._failed(error)
            raise
        finally:
            try:
                self._patience = deadline.left()
            except TimeoutError:
                self._patience = 0.0

    def _failed(self, error: EngineError) -> None:
        self._error = error
        if self._stream is not None:
            self._stream.close(reuse=False)
        self._on_end(error)

    def _read(self, name: str, offset: int, buffers: Sequence[Bytes], deadline: Deadline) -> int:
        wanted = any(a.name == name and a.offset == offset for a in (*self._asked, *self._waiting))
        if not wanted:
            self._waiting.append(_Asked(name, offset, sum(buffer.nbytes for buffer in buffers)))
        while True:
            self._ask_with(deadline, keep=0)
            asked = self._asked.popleft()
            self._on_the_way -= asked.nbytes
            if asked.name == name and asked.offset == offset and asked.nbytes <= sum(b.nbytes for b in buffers):
                return self._take(buffers, deadline)
            asked.data = memoryview(bytearray(asked.nbytes))
            asked.data = asked.data[: self._take([asked.data], deadline)]
            if asked.name == name and asked.offset == offset:
                return self._spread(asked, buffers)
            self._came.append(asked)

    def _take(self, buffers: Sequence[Bytes], deadline: Deadline) -> int:
        assert self._stream is not None
        nbytes = self._stream.take(buffers, deadline)
        self._on_bytes(nbytes)
        return nbytes

    def _spread(self, asked: _Asked, buffers: Sequence[Bytes]) -> int:
        """What came of a range, into buffers; what is more than these take is for later."""
        assert asked.data is not None
        done = spread(asked.data, buffers)
        if done < asked.data.nbytes:
            rest = asked.data[done:]
            self._came.append(_Asked(asked.name, asked.offset + done, rest.nbytes, rest))
        return done

    def _ask(self, keep: int) -> None:
        """Asks ahead, as long as that need not be waited for; an error is for who comes to read."""
        if self._error is None:
            try:
                self._spending(lambda deadline: self._ask_with(deadline, keep))
            except EngineError:
                return

    def _ask_with(self, deadline: Deadline, keep: int) -> int:
        if self._stream is None:
            self._stream = self._engine.open_stream(deadline)
        while len(self._waiting) > keep and (
            not self._asked or self._on_the_way + self._waiting[0].nbytes <= MOST_ASKED
        ):
            asked = self._waiting.popleft()
            self._stream.ask(asked.name, asked.offset, asked.nbytes, deadline)
            self._asked.append(asked)
            self._on_the_way += asked.nbytes
        return 0


def spread(data: memoryview, buffers: Sequence[Bytes]) -> int:
    """Copies bytes into buffers, one after the other; what they do not take is left out."""
    done = 0
    for buffer in buffers:
        view = memoryview(buffer)  # type: ignore[arg-type]
        part = data[done : done + view.nbytes]
        view[: part.nbytes] = part
        done += part.nbytes
    return done


class Value(Ranges):
    """One of them."""

    def __init__(self, reading: Reading, name: str, edges: Edges) -> None:
        self._reading, self._name, self._edges = reading, name, edges
        self._open = True
        reading.opened()

    @property
    def size(self) -> int:
        return self._edges.size

    def read(self, buffers: Sequence[Bytes], offset: int) -> int:
        size, head, tail = self._edges
        wanted = sum(buffer.nbytes for buffer in buffers)
        if offset < len(head):
            return spread(memoryview(head)[offset:], buffers)
        if offset >= size - len(tail):
            return spread(memoryview(tail)[offset - (size - len(tail)) :], buffers)
        if not wanted:
            return 0
        return self._reading.read(self._name, offset, buffers)

    def wait_at_most(self, seconds: float) -> None:
        self._reading.wait_at_most(seconds)

    def will_need(self, offset: int, nbytes: int) -> None:
        begin = max(offset, len(self._edges.head))
        if begin < min(offset + nbytes, self._edges.size - len(self._edges.tail)):
            self._reading.will_need(self._name, begin, offset + nbytes - begin)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._reading.closed()
