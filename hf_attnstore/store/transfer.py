"""Moving blocks into place: I/O threads, stage by stage, with device streams where there is a device.

A load consists of stages (for a model: its layers, in order). The consumer asks for stages ahead of use and
waits for one stage at a time; within a stage blocks may arrive in any order.

Where the targets lie in host memory the consumer computes on the CPU, and threads that read ahead take the very
cores it computes with: one that preempts a thread of a parallel region holds up all the others, and the
interpreter's lock is handed to and fro (measured on two cores: half as long again for a resumed turn). Asking for
a stage then only makes the kernel read its files into the page cache, and the consumer itself reads or copies
them into place when it gets there. For targets on a device the I/O threads do everything.
"""

import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..errors import LoadError
from .blocks import Block, Key, StoredTensor, as_bytes
from .disk import BlockFile

Source = Block | BlockFile


@dataclass(slots=True)
class Segment:
    """Tokens `[start, stop)` of one tensor of a block, and where they go.

    `target` is `[heads, stop - start, dim]`, of the stored dtype, on any device; within a head it is contiguous.
    """

    key: Key
    name: str
    start: int
    stop: int
    target: torch.Tensor


@dataclass
class LoadStats:
    """What a load has done so far."""

    bytes: int = 0
    """Bytes put in place."""
    seconds: float = 0.0
    """Time spent reading and copying, summed over I/O threads."""
    blocks_from: Counter[str] = field(default_factory=Counter)
    """Number of blocks by tier."""


class IOThreads:
    """A few daemon threads that run tasks in the order given."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._submitting = threading.Lock()
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

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
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


class Load:
    """A running load. Made by `AttentionStore.load`; used by one thread, filled by the I/O threads."""

    def __init__(
        self,
        threads: IOThreads,
        stages: Sequence[Sequence[Segment]],
        sources: dict[Key, tuple[str, Source]],
        on_failure: Callable[[Key, LoadError], None],
    ) -> None:
        self._threads = threads
        self._stages: list[dict[Key, list[Segment]]] = []
        self._own: list[list[tuple[Block, Segment]]] = []
        for segments in stages:
            by_block: dict[Key, list[Segment]] = defaultdict(list)
            own = []
            for segment in segments:
                source = sources[segment.key][1]
                if isinstance(source, Block) and segment.target.device.type == "cpu":
                    own.append((source, segment))
                else:
                    by_block[segment.key].append(segment)
            self._stages.append(dict(by_block))
            self._own.append(own)
        self._sources = sources
        self._from_disk = [key for key, (tier, _) in sources.items() if tier == "disk"]
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._remaining = [len(stage) for stage in self._stages]
        self._done = [threading.Event() for _ in self._stages]
        self._requested = 0
        self._outstanding = 0
        self._idle = threading.Condition(self._lock)
        self._cancelled = False
        self._closed = False
        self.error: LoadError | None = None
        self.stats = LoadStats()
        self.stage_seconds = [0.0] * len(self._stages)
        self._on_host = all(segment.target.device.type == "cpu" for stage in stages for segment in stage)
        for tier, _ in sources.values():
            self.stats.blocks_from[tier] += 1
        self._devices = _DeviceCopies(target.target for stage in stages for target in stage)
        for event, stage in zip(self._done, self._stages, strict=True):
            if not stage:
                event.set()

    @property
    def from_disk(self) -> list[Key]:
        """The blocks that are not in memory, in the order of their use."""
        return self._from_disk

    def request(self, stage: int) -> None:
        """Asks for every stage up to and including `stage`; returns at once."""
        while self._requested <= min(stage, len(self._stages) - 1):
            number = self._requested
            self._requested += 1
            for key in self._stages[number]:
                if self._on_host:
                    self._advise(number, key)
                    continue
                with self._lock:
                    self._outstanding += 1
                self._threads.submit(partial(self._run, number, key))

    def _advise(self, stage: int, key: Key) -> None:
        source = self._sources[key][1]
        assert isinstance(source, BlockFile)  # what is in host memory already is not read
        source.will_need([segment.name for segment in self._stages[stage][key]])

    def wait(self, stage: int) -> float:
        """Returns when `stage` is in place, with the seconds that took.

        Raises:
            LoadError: a block could not be read; what was to be loaded is not usable.
        """
        self.request(stage)
        began = time.perf_counter()
        if self._on_host and not self._done[stage].is_set():
            for key in self._stages[stage]:
                self._run(stage, key)
        self._done[stage].wait()
        if self.error is not None:
            raise self.error
        self._copy_own(stage)
        self._devices.wait(stage)
        return time.perf_counter() - began

    def _copy_own(self, stage: int) -> None:
        own = self._own[stage]
        if not own:
            return
        began = time.perf_counter()
        for block, _ in own:
            block.wait_ready()
        targets = [segment.target for _, segment in own]
        sources = [block.tensors[s.name][..., s.start : s.stop, :] for block, s in own]
        torch._foreach_copy_(targets, sources)
        self._own[stage] = []  # not before: an interrupted copy is made again
        seconds = time.perf_counter() - began
        with self._lock:
            self.stats.bytes += sum(target.nbytes for target in targets)
            self.stats.seconds += seconds
            self.stage_seconds[stage] += seconds

    def finish(self) -> None:
        """Ends the load: nothing is written into a target any more when this returns. Idempotent."""
        with self._lock:
            self._cancelled = True
            while self._outstanding:
                self._idle.wait()
            if self._closed:
                return
            self._closed = True
        self._devices.drain()
        for _, source in self._sources.values():
            if isinstance(source, BlockFile):
                source.close()
        self._sources = {}
        self._stages = [{} for _ in self._stages]
        self._own = [[] for _ in self._own]

    def _run(self, stage: int, key: Key) -> None:
        began = time.perf_counter()
        try:
            if not self._cancelled and self.error is None:
                segments = self._stages[stage][key]
                source = self._sources[key][1]
                try:
                    read = self._devices.transfer(stage, source, segments)
                except LoadError as error:
                    self.error = error
                    self._on_failure(key, error)
                except Exception as error:  # a thread that dies would leave the model waiting for ever
                    self.error = LoadError(f"reading block {key.hex()} failed: {error!r}")
                except BaseException:  # an interrupt of the thread that computes, which reads for itself
                    self.error = LoadError(f"reading block {key.hex()} was interrupted")
                    raise
                else:
                    with self._lock:
                        self.stats.bytes += read
        finally:
            seconds = time.perf_counter() - began
            with self._lock:
                self.stats.seconds += seconds
                self.stage_seconds[stage] += seconds
                self._remaining[stage] -= 1
                self._outstanding -= not self._on_host
                if self._remaining[stage] == 0 or self.error is not None:
                    self._done[stage].set()
                if self.error is not None:
                    for event in self._done:
                        event.set()
                self._idle.notify_all()


class _DeviceCopies:
    """The last step of a load. For targets in host memory it is the only step; for a device, blocks go through
    pinned memory on a copy stream, and a stage is an event that the computing stream waits for."""

    def __init__(self, targets: Iterable[torch.Tensor]) -> None:
        devices = {target.device for target in targets if target.device.type == "cuda"}
        self._streams = {device: torch.cuda.Stream(device) for device in devices}
        self._events: dict[int, list[torch.cuda.Event]] = defaultdict(list)
        for device, stream in self._streams.items():  # targets may lie in memory that queued kernels still read
            stream.wait_stream(torch.cuda.current_stream(device))

    def transfer(self, stage: int, source: Source, segments: list[Segment]) -> int:
        """Puts the segments of one block in place. Returns the bytes."""
        host = [segment for segment in segments if segment.target.device.type == "cpu"]
        device = [segment for segment in segments if segment.target.device.type != "cpu"]
        read = 0
        if host:
            assert isinstance(source, BlockFile)  # from memory to memory the consumer copies
            found = [(_stored(source, segment), segment) for segment in host]
            _read_file(source, [(stored, _scatter(stored, segment)) for stored, segment in found])
            read = sum(segment.target.nbytes for segment in host)
        if device:
            read += self._to_device(stage, source, device)
        return read

    def _to_device(self, stage: int, source: Source, segments: list[Segment]) -> int:
        if isinstance(source, Block):
            source.wait_ready()
            whole = [source.tensors[segment.name] for segment in segments]
        else:
            stored = [_stored(source, segment) for segment in segments]
            pinned = bool(self._streams)
            whole = [torch.empty(s.spec.shape, dtype=s.spec.dtype, pin_memory=pinned) for s in stored]
            _read_file(source, [(s, [as_bytes(t).reshape(-1)]) for s, t in zip(stored, whole, strict=True)])
        for segment, tensor in zip(segments, whole, strict=True):
            part = tensor[..., segment.start : segment.stop, :]
            stream = self._streams.get(segment.target.device)
            if stream is None:  # a device without streams of its own to copy on
                segment.target.copy_(part)
                continue
            with torch.cuda.stream(stream):
                segment.target.copy_(part, non_blocking=True)
                segment.target.record_stream(stream)
                event = torch.cuda.Event()
                event.record(stream)
            self._events[stage].append(event)
        return sum(segment.target.nbytes for segment in segments)

    def wait(self, stage: int) -> None:
        for event in self._events.get(stage, ()):
            event.wait()

    def drain(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


def _stored(file: BlockFile, segment: Segment) -> StoredTensor:
    try:
        stored = file.layout.tensors[segment.name]
    except KeyError:
        raise LoadError(f"{file.path}: there is no tensor {segment.name}") from None
    heads, _, dim = stored.spec.shape
    target = segment.target
    if (heads, dim, stored.spec.dtype) != (target.shape[0], target.shape[-1], target.dtype):
        raise LoadError(f"{file.path}: {segment.name} is {stored.spec}, which does not fit {tuple(target.shape)}")
    if not 0 <= segment.start <= segment.stop <= stored.spec.shape[1]:
        raise LoadError(f"{file.path}: {segment.name} has no tokens {segment.start} to {segment.stop}")
    return stored


def _read_file(file: BlockFile, wanted: list[tuple[StoredTensor, list[np.ndarray]]]) -> None:
    """Reads tensors whole (only then can they be checked) into buffers, adjacent ones in one call."""
    wanted.sort(key=lambda item: item[0].offset)
    run: list[tuple[StoredTensor, list[np.ndarray]]] = []
    for item in wanted:
        if run and run[-1][0].offset + run[-1][0].spec.nbytes != item[0].offset:
            file.read(run)
            run = []
        run.append(item)
    if run:
        file.read(run)


def _scatter(stored: StoredTensor, segment: Segment) -> list[np.ndarray]:
    """The buffers, head by head, that take a stored tensor: the wanted tokens into the target, others aside."""
    heads, tokens, _ = stored.spec.shape
    target = as_bytes(segment.target)
    row_bytes = target.shape[-1]
    if target.shape[1] > 1 and target.strides[1] != row_bytes:
        raise ValueError("the tokens of a head must lie one after the other in the target")
    if segment.start == 0 and segment.stop == tokens:
        return [head.reshape(-1) for head in target]
    before, after = segment.start * row_bytes, (tokens - segment.stop) * row_bytes
    aside = np.empty((heads, before + after), dtype=np.uint8)
    buffers = []
    for head, spare in zip(target, aside, strict=True):
        buffers += [spare[:before], head.reshape(-1), spare[before:]]
    return [buffer for buffer in buffers if buffer.nbytes]
