"""The way of KV from host memory to a device: pinned staging, a copy stream for each device, events per stage."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from ..blocks.block import Block
from ..blocks.codecs import CodedBlock
from ..blocks.stored import StoredBlock
from ..blocks.tensors import as_bytes
from ..memory.size import on_pressure


@on_pressure
def _give_back_pinned_memory() -> None:
    """torch keeps pinned memory that nobody uses any more, to use it again."""
    empty: Callable[[], None] | None = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        empty()


def host_tensors(source: Block | StoredBlock, names: Iterable[str], *, pinned: bool) -> dict[str, torch.Tensor]:
    """Whole tensors of a block in host memory, `[heads, tokens, dim]` each."""
    if isinstance(source, Block) and not isinstance(source, CodedBlock):
        source.wait_ready()
        return {name: source.tensors[name] for name in names}
    return source.fetch(names, pinned=pinned)


_SMALL = 32_768
"""Bytes: torch copies no more than so many values, of whatever size, with one thread."""


class DeviceCopies:
    """Copies to devices, beside what they compute. A stage is in place for a stream that has waited for its events."""

    def __init__(self, targets: Sequence[torch.Tensor]) -> None:
        devices = {target.device for target in targets if target.device.type == "cuda"}
        self._streams = {device: torch.cuda.Stream(device) for device in devices}
        self._events: dict[int, list[torch.cuda.Event]] = defaultdict(list)
        self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.seconds = 0.0
        """Time that copies to devices took, known after `drain`."""
        for device, stream in self._streams.items():  # targets may lie in memory that queued kernels still read
            stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def pinned(self) -> bool:
        """Whether sources should lie in pinned memory."""
        return bool(self._streams)

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream on which copies to a device go; None if it has none of its own."""
        return self._streams.get(device)

    def copy(
        self,
        stage: int,
        sources: Mapping[str, torch.Tensor],
        targets: Mapping[str, torch.Tensor],
        arrived: Callable[[Mapping[str, torch.Tensor]], None] | None,
    ) -> None:
        """Copies tensors by name, then has `arrived` finish the targets, all on the copy stream."""
        device = next(iter(targets.values())).device
        stream = self._streams.get(device)
        if stream is None:  # a device without streams of its own to copy on
            for name, target in targets.items():
                if target.device.type == "cpu" and target.nbytes > _SMALL:
                    # torch would copy with a team of threads for each I/O thread, which slows computing: chat/openmp.py
                    np.copyto(as_bytes(target), as_bytes(sources[name]))
                else:
                    target.copy_(sources[name])
            if arrived is not None:
                arrived(targets)
            return
        with torch.cuda.stream(stream):
            began = torch.cuda.Event(enable_timing=True)
            began.record(stream)
            for name, target in targets.items():
                target.copy_(sources[name], non_blocking=True)
                target.record_stream(stream)
            if arrived is not None:
                arrived(targets)
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream)
        self._events[stage].append(event)
        self._copies.append((began, event))

    def wait(self, stage: int) -> None:
        """Makes the current streams wait for what the stage has copied."""
        for event in self._events.get(stage, ()):
            event.wait()

    def drain(self) -> None:
        """Returns when nothing is being copied any more."""
        for stream in self._streams.values():
            stream.synchronize()
        copies, self._copies = self._copies, []
        self.seconds += sum(began.elapsed_time(ended) for began, ended in copies) / 1e3
