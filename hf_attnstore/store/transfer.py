"""Moving blocks into place, stage by stage.

A load consists of stages (for a model: its layers, in order). The consumer asks for stages ahead of use and waits
for one stage at a time.

Where a stage's targets lie in host memory the consumer computes on the CPU, and threads that read ahead take the
very cores it computes with: one that preempts a thread of a parallel region holds up all the others, and the
interpreter's lock is handed to and fro (measured on two cores: half as long again for a resumed turn; a thread that
only helps while the consumer waits, or only until it comes for its first stage, costs what it brings too). Asking for
such a stage only makes the kernel read its files into the page cache, and the consumer itself reads or copies
them into place when it gets there. For targets on a device the I/O threads do everything.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from ..errors import LoadError
from ..timeline import Time
from .device_times import DeviceTimes
from .devices import DeviceCopies, host_tensors
from .disk import BlockFile
from .keys import Key
from .placing import Rows, read_adjacent
from .stages import Joint, Source, Stage, Ways
from .threads import IOThreads


@dataclass
class LoadStats:
    """What a load has done so far."""

    bytes: int = 0
    """Bytes put in place."""
    seconds: float = 0.0
    """Time spent reading and copying, summed over I/O threads."""
    blocks_from: Counter[str] = field(default_factory=Counter)
    """Number of blocks by tier."""
    bytes_from: Counter[str] = field(default_factory=Counter)
    """`bytes` by tier."""
    seconds_from: dict[str, float] = field(default_factory=dict)
    """`seconds` by tier."""

    def add(self, seconds: float, bytes_from: Mapping[str, int], reading: Mapping[str, float]) -> None:
        """Adds a part of a load that took so long, of which some tiers are known to have taken a share by themselves;
        what is left went by the others."""
        self.seconds += seconds
        for tier, nbytes in bytes_from.items():
            self.bytes += nbytes
            self.bytes_from[tier] += nbytes
        others = {tier: nbytes for tier, nbytes in bytes_from.items() if tier not in reading}
        left = seconds - (sum(reading.values()) if others else 0.0)
        for tier, nbytes in bytes_from.items():
            share = nbytes / max(sum((others or bytes_from).values()), 1)
            taken = reading[tier] if others and tier in reading else left * share
            self.seconds_from[tier] = self.seconds_from.get(tier, 0.0) + taken


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
        self._files = {key: source for key, (_, source) in sources.items() if isinstance(source, BlockFile)}
        self._from_disk = list(self._files)
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._here = [stage.device is None or stage.device.type == "cpu" for stage in self._stages]
        self._in_place = [not stage.needs() for stage in self._stages]
        self._remaining = [len(stage.needs()) for stage in self._stages]
        self._devices = DeviceCopies(t for stage in self._stages for t in stage.all_targets())
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
        """Asks for every stage up to and including `stage`; returns at once."""
        while self._requested <= min(stage, len(self._stages) - 1):
            number = self._requested
            self._requested += 1
            wanted = self._stages[number]
            if self._here[number]:
                for key in wanted.needs() if self._files else ():
                    if key in self._files:
                        self._files[key].will_need([*wanted.targets, *wanted.whole])
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
                self._idle.wait_for(lambda: self._remaining[stage] == 0 or self.error is not None)
        if self.error is not None:
            raise self.error
        self._devices.wait(stage)
        return time.perf_counter() - began

    def finish(self) -> None:
        """Ends the load: nothing is written into a target any more when this returns. Idempotent."""
        with self._idle:
            self._cancelled = True
            self._idle.wait_for(lambda: not self._outstanding)
            if self._closed:
                return
            self._closed = True
        self._devices.drain()
        for file in self._files.values():
            file.close()
        self._sources, self._files, self._ways = {}, {}, {}
        self._stages = [Stage() for _ in self._stages]

    # on the consumer's thread

    def _fetch(self, number: int) -> None:
        """Puts a stage in place in host memory. Interrupted, it counts as not done and starts again."""
        began = time.perf_counter()
        stage, joint = self._stages[number], self._joint(number)
        numbers = range(number, number + (joint.stages if joint is not None else 1))
        stages = [self._stages[place] for place in numbers]
        key = b""
        reading: dict[str, float] = {}
        states: dict[str, torch.Tensor] = {}
        try:
            ways = self._ways.get(id(stage.pieces))
            if ways is None:
                ways = self._ways[id(stage.pieces)] = Ways(stage.pieces, self._sources)
            rows = Rows({name: t for each in stages for name, t in each.targets.items()}) if ways.files else None
            for piece, tier, file, first in ways.files:
                key, started = piece.key, time.perf_counter()
                assert rows is not None
                rows.read(file, piece.start, piece.stop, first)
                reading[tier] = reading.get(tier, 0.0) + time.perf_counter() - started
            if stage.whole:
                key = stage.checkpoint
                states = self._whole_tensors(stage)
        except LoadError as error:
            self.error = error
            if key:
                self._on_failure(key, error)
            return
        except Exception as error:
            self.error = LoadError(f"reading block {key.hex()} failed: {error!r}")
            return
        if joint is None or not joint.join(ways.runs):
            for each in stages:
                each.join(ways.runs)
        for name, state in states.items():
            stage.whole[name].copy_(state)
        for place, each in zip(numbers, stages, strict=True):
            each.finish()
            self._in_place[place] = True
        token_bytes = sum(each.token_bytes for each in stages)
        bytes_from = {tier: tokens * token_bytes for tier, tokens in ways.tokens_from.items()}
        if states:
            tier = self._sources[stage.checkpoint][0]
            bytes_from[tier] = bytes_from.get(tier, 0) + sum(target.nbytes for target in stage.whole.values())
        self._account(number, time.perf_counter() - began, bytes_from, reading, len(stages))

    def _joint(self, number: int) -> Joint | None:
        """What a stage is put in place by together with those after it, as long as none of them is there."""
        joint = self._stages[number].joint
        return joint if joint is not None and not any(self._in_place[number : number + joint.stages]) else None

    def _whole_tensors(self, stage: Stage) -> dict[str, torch.Tensor]:
        """The tensors of a stage's checkpoint, in host memory."""
        source = self._sources[stage.checkpoint][1]
        found = host_tensors(source, stage.whole, read_adjacent, pinned=self._devices.pinned)
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
        whole = host_tensors(self._sources[piece.key][1], targets, read_adjacent, pinned=self._devices.pinned)
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
        except LoadError as error:
            self.error = error
            self._on_failure(key, error)
        except Exception as error:  # a thread that dies would leave the model waiting for ever
            self.error = LoadError(f"reading block {key.hex()} failed: {error!r}")
        finally:
            with self._idle:
                self._remaining[number] -= 1
                self._outstanding -= 1
                self._idle.notify_all()
