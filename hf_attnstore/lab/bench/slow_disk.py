"""A disk that is slower than the one at hand, so that what overlap hides stands out of a busy machine's noise.

It is a queue: everything that is read or written comes one after the other at a fixed rate. Asking the kernel to read
ahead (`BlockFile.will_need`) puts bytes into the queue, and who reads them later waits only for what has not come yet.
That is what a kernel does that has room for all that it was asked for.

`store.throttle` has a simpler one, for the gate: it slows reading only, and knows nothing of reading ahead.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hf_attnstore.store.blocks.block import Block, Bytes
from hf_attnstore.store.blocks.format import StoredTensor
from hf_attnstore.store.disk.block_files import BlockFile, DiskTier


class Queue:
    """When what is asked for will have come."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free = 0.0
        self._asking = threading.Lock()

    def ask(self, nbytes: int) -> float:
        """Asks for bytes; returns when they are there, in seconds of `time.perf_counter`."""
        with self._asking:
            self._free = max(self._free, time.perf_counter()) + nbytes / self._rate
            return self._free


@contextmanager
def slow_disk(bytes_per_second: float | None) -> Iterator[None]:
    """Until this ends, block files are read and written by this process at so many bytes per second; None changes
    nothing. Not for two at a time."""
    if bytes_per_second is None:
        yield
        return
    queue = Queue(bytes_per_second)
    read, write = BlockFile.read, DiskTier.write

    def ask_ahead(self: BlockFile, names: Iterable[str]) -> None:
        coming = self.__dict__.setdefault("coming", {})
        for name in names:
            stored = self.layout.tensors.get(name)
            if stored is not None and name not in coming:
                coming[name] = queue.ask(stored.spec.nbytes)

    def read_late(self: BlockFile, wanted: Sequence[tuple[StoredTensor, Sequence[Bytes]]]) -> int:
        coming = self.__dict__.setdefault("coming", {})
        _sleep_until(
            max(coming.pop(s.spec.name) if s.spec.name in coming else queue.ask(s.spec.nbytes) for s, _ in wanted)
        )
        return read(self, wanted)

    def write_late(self: DiskTier, block: Block) -> int:
        _sleep_until(queue.ask(block.nbytes))
        return write(self, block)

    changed: dict[tuple[Any, str], Any] = {
        (BlockFile, "read"): read_late,
        (BlockFile, "will_need"): ask_ahead,
        (DiskTier, "write"): write_late,
        (BlockFile, "in_page_cache"): False,
    }
    originals = {(owner, name): vars(owner)[name] for owner, name in changed}
    for (owner, name), other in changed.items():
        setattr(owner, name, other)
    try:
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


def _sleep_until(then: float) -> None:
    left = then - time.perf_counter()
    if left > 0:
        time.sleep(left)
