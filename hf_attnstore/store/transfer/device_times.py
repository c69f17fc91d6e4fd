"""When things happen on CUDA devices, told by the host's clock."""

import threading
import time
from collections.abc import Iterable

import torch


class Mark:
    """A place in a device's queue of work. Called, it says when the device came to it, and waits until it has."""

    def __init__(self, event: torch.cuda.Event, reference: tuple[torch.cuda.Event, float]) -> None:
        self._event = event
        self._reference = reference

    def __call__(self) -> float:
        """Seconds of `time.perf_counter`."""
        event, seconds = self._reference
        self._event.synchronize()
        return seconds + event.elapsed_time(self._event) / 1e3


class DeviceTimes:
    """Makes marks. Each device's clock is set by the host's once, which waits for what the device is doing.

    Args:
        devices: those that will be asked about; what is no CUDA device is left out.
    """

    def __init__(self, devices: Iterable[torch.device | None]) -> None:
        self._references: dict[torch.device, tuple[torch.cuda.Event, float]] = {}
        self._setting = threading.Lock()
        for device in devices:
            if device is not None and device.type == "cuda":
                self._reference(device)

    def __bool__(self) -> bool:
        return bool(self._references)

    def _reference(self, device: torch.device) -> tuple[torch.cuda.Event, float]:
        with self._setting:
            if device not in self._references:
                stream = torch.cuda.current_stream(device)
                stream.synchronize()  # only then does the next event happen when it is asked for
                event = torch.cuda.Event(enable_timing=True)
                event.record(stream)
                event.synchronize()
                self._references[device] = event, time.perf_counter()
            return self._references[device]

    def mark(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> Mark:
        """Marks the end of what a stream was given so far; by default the stream on which the device computes."""
        reference = self._reference(device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream if stream is not None else torch.cuda.current_stream(device))
        return Mark(event, reference)
