"""Mooncake Store: blocks in the memory of machines that trust each other.

Its calls know no deadline: one that reads from a machine that stopped goes on writing into its buffer until it gives up
by itself. So a thread makes them, one after the other, with memory of its own, and who waits takes or leaves what came.
Only while it connects, for about a second, nobody's deadline holds: it keeps Python's lock. So that is done at once,
and not again and again.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar

# said before it is loaded: without, a call ends after 30 seconds
os.environ.setdefault("MC_TCP_PROGRESS_TIMEOUT_SEC", "1")
os.environ.setdefault("MC_RPC_TIMEOUT_MS", "1000")
os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "1")
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
try:
    from mooncake.store import MooncakeDistributedStore
except ImportError as error:
    raise ImportError(
        f"it needs pip install 'hf-attnstore[mooncake]' and the system's libibverbs1 ({error})"
    ) from error

from ...errors import SharedTierError
from ..blocks.block import Bytes
from .deadline import Deadline
from .engine import About, Edges, Engine, EngineError, Put, Stream
from .url import SharedURL
from .values import spread
from .wire import Wire

T = TypeVar("T")

_AT_ONCE = 64
"""Values whose edges are read in one call."""
_CONNECT, _PAUSE = 0.5, 30.0
"""Seconds for a master to be there, and between two trials where it is but does not answer."""


class MooncakeEngine(Engine):
    """See `Engine`. The URL is `mooncake://master:50051`. Options: `local` (the address of this machine, at which the
    others reach it; without, the loopback), `protocol` (`tcp`), `staging` (bytes, 64MiB: a value is as large at most).

    It keeps blocks only: a value can't be changed, and nothing is compared. `sizes` tells of a value that is there 1.
    """

    def __init__(self, url: SharedURL) -> None:
        if url.path or url.secret:
            raise SharedTierError(
                f"{url}: a URL of mooncake is the host and the port of a master; it knows no passwords"
            )
        self._url = url
        self._master = url.host, url.port or 50051
        self._local, self._protocol = url.option("local", "127.0.0.1"), url.option("protocol", "tcp")
        self._staging = int(url.number("staging", 64 << 20, "bytes"))
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[_Call[Any] | None] | None = None
        self._forked = False
        with self._lock:
            self._submit(_Call(lambda client: None, None))

    @property
    def largest(self) -> int:  # type: ignore[override]
        return self._staging

    # blocks

    def put(self, name: str, parts: Sequence[Bytes], deadline: Deadline, seconds: int = 0) -> Put:
        size = sum(part.nbytes for part in parts)
        if size > self._staging:
            return Put.FULL
        whole = b"".join(parts)  # type: ignore[arg-type]

        def put(client: _Client) -> int:
            if client.store.get_size(name) not in (size, *_NONE):  # what is there is not what it should be
                client.store.remove(name, True)
            client.memory[:size] = whole
            client.store.put_from(name, client.place, size)
            return int(client.store.get_size(name))  # as it says that it has stored what it has not

        stored = self.run(put, deadline)
        return Put.STORED if stored == size else Put.FULL

    def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int]:
        found = self.run(lambda client: client.store.batch_is_exist(list(names)), deadline) if names else []
        if any(there < 0 for there in found):
            raise self._error("it does not say what is there")
        return [int(there) for there in found]

    def edges(self, names: Sequence[str], head: int, tail: int, deadline: Deadline) -> list[Edges]:
        def read(client: _Client) -> list[Edges]:
            sizes = [max(client.store.get_size(name), 0) for name in some]
            wanted = [(n, 0, min(head, size)) for n, size in zip(some, sizes, strict=True) if size]
            wanted += [(n, max(size - tail, 0), min(tail, size)) for n, size in zip(some, sizes, strict=True) if size]
            parts = iter(client.read(wanted))
            heads, tails = ({n: next(parts) for n, size in zip(some, sizes, strict=True) if size} for _ in range(2))
            return [Edges(s, heads[n], tails[n]) if s else Edges(0, b"", b"") for n, s in zip(some, sizes, strict=True)]

        found: list[Edges] = []
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            found += self.run(read, deadline)
        return found

    def open_stream(self, deadline: Deadline) -> Stream:
        return _Stream(self)

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        def remove(client: _Client) -> None:
            for name in names:
                client.store.remove(name, True)

        self.run(remove, deadline)

    def about(self, deadline: Deadline) -> About:
        self.sizes(["probe"], deadline)
        unsafe = [
            "nobody has to say a password, and nothing is encrypted: use it in a network that nobody else is in",
            "a machine that dies takes its part of the blocks with it, and for some seconds nobody notices",
        ]
        facts = {"protocol": self._protocol, "compares before it sets": "no: names of sessions stay local"}
        return About("Mooncake Store", facts=facts, unsafe=unsafe)

    # calls

    def run(self, call: Callable[[_Client], T], deadline: Deadline, take: Callable[[T], None] | None = None) -> T:
        """Has a call made, and waits for it.

        Args:
            take: what is done with what it returns before the next call is made, if somebody still waits for it.
        """
        made = _Call(call, take)
        with self._lock:
            if self._forked:
                raise self._error("Mooncake can't be used in a process that was forked from one that used it")
            self._submit(made)
        try:
            found = made.ended.get(timeout=deadline.left())
        except (queue.Empty, TimeoutError):
            with made.lock:
                made.given_up = True
            raise self._error("no answer in time") from None
        if isinstance(found, Exception):
            raise self._error(found) from found
        return found[0]

    def _submit(self, made: _Call[Any]) -> None:
        if self._work is None:
            self._work = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=[self._work], name="attnstore-mooncake", daemon=True).start()
        self._work.put(made)

    def _serve(self, work: queue.SimpleQueue[_Call[Any] | None]) -> None:
        client: _Client | None = None
        again = 0.0
        while (made := work.get()) is not None:
            if made.given_up:
                continue
            try:
                if client is None:
                    Wire(*self._master, None, Deadline(_CONNECT)).close()  # else setting up takes its time
                    if time.monotonic() < again:
                        raise OSError("the master did not answer")
                    again = time.monotonic() + _PAUSE
                    client = _Client(self._local, self._protocol, self._master, self._staging)
                found = made.call(client)
                with made.lock:
                    if made.take is not None and not made.given_up:
                        made.take(found)
                made.ended.put((found,))
            except Exception as error:
                made.ended.put(error)
        if client is not None:
            client.store.close()

    def _error(self, why: object) -> EngineError:
        return EngineError(f"{self._url}: {why}")

    def close(self) -> None:
        with self._lock:
            work, self._work = self._work, None
        if work is not None:
            work.put(None)

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._forked, self._work = self._forked or self._work is not None, None


class _Call(Generic[T]):
    """A call that somebody may wait for."""

    def __init__(self, call: Callable[[_Client], T], take: Callable[[T], None] | None) -> None:
        self.call, self.take = call, take
        self.ended: queue.SimpleQueue[tuple[T] | Exception] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.given_up = False


class _Client:
    """The store's client, and the memory that it may write to. For one thread.

    Raises:
        OSError: it does not reach the master.
    """

    def __init__(self, local: str, protocol: str, master: tuple[str, int], nbytes: int) -> None:
        self.store = MooncakeDistributedStore()
        # the peers' metadata come from themselves: with a server for them a machine that was killed could not come back
        if self.store.setup(local, "P2PHANDSHAKE", 0, 16 << 20, protocol, "", f"{master[0]}:{master[1]}"):
            raise OSError("the master can't be reached")
        whole = bytearray(nbytes)
        self._whole = (ctypes.c_char * nbytes).from_buffer(whole)
        self.memory, self.place = memoryview(whole), ctypes.addressof(self._whole)
        if self.store.register_buffer(self.place, nbytes):
            raise OSError("its memory can't be registered")

    def read(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Ranges, by name, offset and bytes; all at once."""
        return [bytes(part) for part in self.bring(wanted)]

    def bring(self, wanted: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        """The same, in memory that the next call may write to.

        Raises:
            OSError: one did not come.
        """
        places = [sum(nbytes for _, _, nbytes in wanted[:n]) for n in range(len(wanted) + 1)]
        if not wanted:
            return []
        if places[-1] > self.memory.nbytes:
            raise OSError("more than fits into its memory at once: give it more with staging=")
        names = [name for name, _, _ in wanted]
        to, offsets = [[place] for place in places[:-1]], [[offset] for _, offset, _ in wanted]
        sizes = [[nbytes] for _, _, nbytes in wanted]
        found = self.store.get_into_ranges([self.place], [names], [to], [offsets], [sizes])
        if found != [sizes]:
            raise OSError(
                f"a range did not come ({min(min(f) for f in found[0]) if found and found[0] else 'nothing'})"
            )
        return [self.memory[a:b] for a, b in pairwise(places)]


class _Stream(Stream):
    """Ranges, each a call."""

    def __init__(self, engine: MooncakeEngine) -> None:
        self._engine = engine
        self._asked: deque[tuple[str, int, int]] = deque()

    def ask(self, name: str, offset: int, nbytes: int, deadline: Deadline) -> None:
        self._asked.append((name, offset, nbytes))

    def take(self, buffers: Sequence[Bytes], deadline: Deadline) -> int:
        name, offset, nbytes = self._asked.popleft()

        def bring(client: _Client) -> list[memoryview]:
            left = max(min(nbytes, client.store.get_size(name) - offset), 0)
            return client.bring([(name, offset, left)]) if left else []

        def copy(came: list[memoryview]) -> None:
            for part in came:
                spread(part, buffers)

        return sum(part.nbytes for part in self._engine.run(bring, deadline, copy))

    def close(self, *, reuse: bool) -> None:
        self._asked.clear()


_NONE = (0, -704)
"""What it says of the size of a value that is not there."""
