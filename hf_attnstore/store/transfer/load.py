"""Moving blocks into place, stage by stage.

A load consists of stages (for a model: its layers, in order). The consumer asks for stages ahead of use and waits
for one stage at a time.

Where a stage's targets lie in host memory the consumer computes on the CPU, and threads that read ahead take the
very cores it computes with: one that preempts a thread of a parallel region holds up all the others, and the
interpreter's lock is handed to and fro (measured on two cores: half as long again for a resumed turn; a thread that
only helps while the consumer waits, or only until it comes for its first stage, costs what it brings too). Asking for
such a stage only makes the kernel read its files into the page cache, and the consumer itself reads or copies
them into place when it gets there. Before it computes at all the cores are free, though: where the page cache has all
files, so that there is nothing to wait for beside computing, everything is read at once then, by all that can help.
For targets on a device the I/O threads do everything.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch

from ...errors import LoadError
from ...timeline import Time
from ..blocks.codecs import CodedBlock
from ..blocks.keys import Key
from ..blocks.stored import StoredBlock
from ..blocks.tier import Source
from ..processes.threads import IOThreads
from .decoding import decodes_alone
from .device_times import DeviceTimes
from .devices import DeviceCopies, host_tensors
from .groups import Group
from .load_stats import LoadStats
from .stages import FilePiece, Stage, Ways

WORTH_SHARING = 4 << 20
"""Bytes of files from which on it pays to have them read by several threads."""


def cores_to_spare() -> int:
    """How many threads can help the consumer as long as it does not compute."""
    return torch.get_num_threads() - 1


class LoadRecorder(Protocol):
    """Somebody who takes down what a load does, when it happens. Called by any thread."""

    times: DeviceTimes

    def brought(self, stage: int, how: str, begin: Time, end: Time, stages: int = 1) -> None:
        """A part of a stage, or of so many from it on, was put in place; `how`, if there is more than one step on the
        way."""


class Load:
    """A running load. Made by `AttentionStore.load`; used by one thread."""

    recorder: LoadRecorder | None = None

    def __init__(
        self,
        threads: IOThreads,
        stages: Sequence[Stage],
        sources: dict[Key, tuple[str, Source]],
        on_failure: Callable[[Key, LoadError], None],
    ) -> None:
        self._threads = threads
        self._stages = list(stages)
        self._sources = sources
        self._files = {key: source for key, (_, source) in sources.items() if isinstance(source, StoredBlock)}
        self._from_disk = list(self._files)
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._here = [stage.in_host_memory for stage in self._stages]
        self._remaining = [stage.arrivals for stage in self._stages]
        self._in_place = [not count for count in self._remaining]
        self._devices = DeviceCopies([t for stage in self._stages for t in stage.all_targets()])
        self._ways: dict[int, Ways] = {}
        """By the `pieces` of stages, which most stages share."""
        self._requested = 0
        self._outstanding = 0
        self._cancelled = False
        self._closed = False
        self.error: LoadError | None = None
        self.stats = LoadStats(blocks_from=Counter(tier for tier, _ in sources.values()))
        self.stage_seconds = [0.0] * len(self._stages)

    def needed_from(self) -> dict[str, float]:
        """Seconds that the load needed by tier, as long as nothing held it up, once it has ended: on a device, I/O
        threads work side by side, and so does what copies."""
        found = dict(self.stats.seconds_from)
        if not all(self._here):
            for tier, seconds in found.items():
                share = self.stats.bytes_from[tier] / max(self.stats.bytes, 1)
                found[tier] = max(seconds / self._threads.count, self._devices.seconds * share)
        return found

    @property
    def whole_bytes(self) -> int:
        """Bytes of checkpoints that all stages bring."""
        return sum(target.nbytes for stage in self._stages for target in stage.whole.values())

    @property
    def from_disk(self) -> list[Key]:
        """The blocks that are not in memory, in the order of their use."""
        return self._from_disk

    def use_threads(self) -> None:
        """Has the I/O threads bring what is for host memory too. To be called before anything is asked for."""
        self._here = [False for _ in self._stages]

    def request(self, stage: int) -> None:
        """Asks for every stage up to and including `stage`, and for those that are put in place together with it;
        returns at once."""
        last = min(stage, len(self._stages) - 1)
        while self._requested <= last:
            number = self._requested
            self._requested += 1
            wanted = self._stages[number]
            if wanted.joint is not None:
                last = max(last, number + wanted.joint.stages - 1)
            if self._here[number]:
                names = [*wanted.targets, *wanted.whole]
                for key in wanted.needs() if self._files else ():
                    if key in self._files:
                        self._files[key].will_need(names)
                continue
            parts = wanted.parts()
            jobs = [partial(self._bring_piece, number, place, parts[place]) for place in range(len(wanted.pieces))]
            if wanted.whole:
                jobs.append(partial(self._bring_whole, number))
            with self._lock:
                self._outstanding += len(jobs)
            for key, job in zip(wanted.needs(), jobs, strict=True):
                self._threads.submit(partial(self._bring, number, key, job))

    def wait(self, stage: int) -> float:
        """Returns when `stage` is in place, with the seconds that took.

        Raises:
            LoadError: a block could not be read; what was to be loaded is not usable.
        """
        self.request(stage)
        began = time.perf_counter()
        if self._here[stage]:
            if self.error is None and not self._in_place[stage]:
                self._fetch(stage)
        else:
            with self._idle:
                self._idle.wait_for(
                    lambda: self._remaining[stage] == 0 or self.error is not None or self._threads.left_behind
                )
            if self._remaining[stage] and self.error is None:
                raise LoadError("the process was forked while this load was under way", transient=True)
        if self.error is not None:
            raise self.error
        self._devices.wait(stage)
        return time.perf_counter() - began

    def finish(self) -> None:
        """Ends the load: nothing is written into a target any more when this returns. Idempotent."""
        with self._idle:
            self._cancelled = True
            self._idle.wait_for(lambda: not self._outstanding or self._threads.left_behind)
            if self._closed:
                return
            self._closed = True
        self._devices.drain()
        for file in self._files.values():
            file.close()
        self._sources, self._files, self._ways = {}, {}, {}
        self._stages = [Stage() for _ in self._stages]

    # on the consumer's thread

    def preload(self) -> float:
        """Puts everything in place at once, with the help of the I/O threads, where that is faster than to bring stage
        after stage: what is for host memory, and in files that the page cache has, or in memory and coded.

        Returns:
            The seconds that took, 0 where it is left to `wait`.

        Raises:
            LoadError: a block could not be read; what was to be loaded is not usable.
        """
        files = self._files.values()
        coded = sum(source.nbytes for _, source in self._sources.values() if isinstance(source, CodedBlock))
        if coded + sum(file.layout.file_bytes for file in files) < WORTH_SHARING:
            return 0.0
        if not all(self._here) or not all(file.in_page_cache for file in files):
            return 0.0
        began = time.perf_counter()
        self._requested = len(self._stages)
        try:
            groups = self._groups()
            # what is decoded by torch is so with its own team of threads
            alone = all(decodes_alone(source) for _, source in self._sources.values())
        except LoadError as error:
            self._fail(error)
            raise
        pieces = deque((group, piece) for group in groups for piece in group.ways.files)
        self._threads.share(partial(self._read_all, pieces), cores_to_spare() if alone else 0)
        reading = time.perf_counter() - began
        tiers = {file.tier for group in groups for file in group.ways.files}
        if self.error is None:
            self._complete(groups, began, {tier: reading / len(tiers) for tier in tiers})
        if self.error is not None:
            raise self.error
        return time.perf_counter() - began

    def _groups(self) -> list[Group]:
        """All stages, as they are put in place together."""
        groups: list[Group] = []
        number = 0
        while number < len(self._stages):
            groups.append(self._group(number))
            number += len(groups[-1].stages)
        return groups

    def _read_all(self, pieces: "deque[tuple[Group, FilePiece]]") -> None:
        """Reads pieces until there are none left. Any number of threads may be at it."""
        while self.error is None:
            try:
                group, file = pieces.popleft()
            except IndexError:
                return
            try:
                group.rows.read(file)
            except Exception as error:
                self._fail(error, file.piece.key)
            except BaseException:
                pieces.clear()  # interrupted: nobody needs the rest
                raise

    def _fetch(self, number: int) -> None:
        """Puts a stage in place in host memory. Interrupted, it counts as not done and starts again."""
        began = time.perf_counter()
        key = b""
        reading: dict[str, float] = {}
        try:
            group = self._group(number)
            for file in group.ways.files:
                key, started = file.piece.key, time.perf_counter()
                group.rows.read(file)
                reading[file.tier] = reading.get(file.tier, 0.0) + time.perf_counter() - started
        except Exception as error:
            self._fail(error, key)
        else:
            self._complete([group], began, reading)

    def _complete(self, groups: Sequence[Group], began: float, reading: Mapping[str, float]) -> None:
        """Puts in place what is not read from blocks' files, all of which has been: then the stages are complete.

        Args:
            began: when that was begun, on the clock of `time.perf_counter`.
            reading: seconds of reading files, by tier.
        """
        bytes_from: Counter[str] = Counter()
        for group in groups:
            stage = group.stages[0]
            states: dict[str, torch.Tensor] = {}
            if stage.whole:
                try:
                    states = self._whole_tensors(stage)
                except Exception as error:
                    self._fail(error, stage.checkpoint)
                    return
            group.join()
            for name, state in states.items():
                stage.whole[name].copy_(state)
                bytes_from[self._sources[stage.checkpoint][0]] += stage.whole[name].nbytes
            for each in group.stages:
                each.finish()
            bytes_from.update(group.bytes_from())
        first, count = groups[0].number, sum(len(group.stages) for group in groups)
        self._in_place[first : first + count] = [True] * count
        self._account(first, time.perf_counter() - began, bytes_from, reading, count)

    def _group(self, number: int) -> Group:
        """What is put in place together with a stage: it and those that it is joined with, if none of them is there.

        Raises:
            LoadError: a block in memory is not what its name says.
        """
        stage = self._stages[number]
        ways = self._ways.get(id(stage.pieces))
        if ways is None:
            ways = self._ways[id(stage.pieces)] = Ways(stage.pieces, self._sources)
        joint = stage.joint
        if joint is not None and any(self._in_place[number : number + joint.stages]):
            joint = None
        count = joint.stages if joint is not None else 1
        return Group(number, self._stages[number : number + count], ways, joint)

    def _fail(self, error: Exception, key: Key = b"") -> None:
        """Nothing more is loaded, for this reason; the store is told of the block."""
        if not isinstance(error, LoadError):  # a thread that dies would leave the model waiting for ever
            self.error = LoadError(f"reading block {key.hex()} failed: {error!r}")
            return
        self.error = error
        if key:
            self._on_failure(key, error)

    def _whole_tensors(self, stage: Stage) -> dict[str, torch.Tensor]:
        """The tensors of a stage's checkpoint, in host memory."""
        source = self._sources[stage.checkpoint][1]
        found = host_tensors(source, stage.whole, pinned=self._devices.pinned)
        for name, target in stage.whole.items():
            if (found[name].shape, found[name].dtype) != (target.shape, target.dtype):
                raise LoadError(f"the {name} of a checkpoint is {tuple(found[name].shape)} {found[name].dtype}")
        return found

    def _account(
        self,
        number: int,
        seconds: float,
        bytes_from: Mapping[str, int],
        reading: Mapping[str, float],
        stages: int = 1,
    ) -> None:
        with self._lock:
            self.stats.add(seconds, bytes_from, reading)
            self.stage_seconds[number] += seconds
        if self.recorder is not None:
            end = time.perf_counter()
            self.recorder.brought(number, "read" if self._devices.pinned else "", end - seconds, end, stages)

    # on the I/O threads

    def _bring_piece(self, number: int, place: int, targets: Mapping[str, torch.Tensor]) -> int:
        """Brings one piece of a stage to a device."""
        stage = self._stages[number]
        piece = stage.pieces[place]
        whole = host_tensors(self._sources[piece.key][1], targets, pinned=self._devices.pinned)
        sources = {name: whole[name][:, piece.start : piece.stop] for name in targets}
        arrived = partial(stage.arrived, piece.shift) if stage.arrived is not None and piece.shift else None
        self._copy(number, sources, targets, arrived)
        return sum(target.nbytes for target in targets.values())

    def _bring_whole(self, number: int) -> int:
        """Brings a stage's part of a checkpoint to a device."""
        stage = self._stages[number]
        self._copy(number, self._whole_tensors(stage), stage.whole, None)
        return sum(target.nbytes for target in stage.whole.values())

    def _copy(
        self,
        number: int,
        sources: Mapping[str, torch.Tensor],
        targets: Mapping[str, torch.Tensor],
        arrived: Callable[[Mapping[str, torch.Tensor]], None] | None,
    ) -> None:
        """Copies a part of a stage to a device."""
        device = next(iter(targets.values())).device
        stream = self._devices.stream(device)
        if self.recorder is None or stream is None:
            self._devices.copy(number, sources, targets, arrived)
            return
        began = self.recorder.times.mark(device, stream)
        self._devices.copy(number, sources, targets, arrived)
        self.recorder.brought(number, "copy", began, self.recorder.times.mark(device, stream))

    def _bring(self, number: int, key: Key, bring: Callable[[], int]) -> None:
        """Runs one part of a stage's way to a device."""
        began = time.perf_counter()
        try:
            if not self._cancelled and self.error is None:
                nbytes = bring()
                self._account(number, time.perf_counter() - began, {self._sources[key][0]: nbytes}, {})
        except Exception as error:
            self._fail(error, key)
        finally:
            with self._idle:
                self._remaining[number] -= 1
                self._outstanding -= 1
                self._idle.notify_all()
