"""Recording a turn's timeline: the side of it that knows of layers, forwards and devices."""

import time
from collections.abc import Sequence

import torch

from ...store.store import AttentionStore
from ...store.transfer.device_times import DeviceTimes
from ...timeline import Event, Time, Timeline, in_order, seconds
from .streams import save_stream

MOST_STEPS = 2_000
"""Decoding steps that are recorded one by one; what comes after them is one event."""


def layer_name(number: int) -> str:
    """The name of what happens to or in a layer."""
    return f"layer {number}"


class TurnRecorder:
    """Records one turn. Used by the thread that has the turn, except for the timeline, which is for all.

    Args:
        devices: where the model's layers compute. Times of what CUDA devices do are theirs.
    """

    def __init__(self, store: AttentionStore | None, devices: Sequence[torch.device | None]) -> None:
        self.timeline = Timeline()
        self.times = DeviceTimes(devices)
        self._store = store
        self._devices = devices
        self._forward: tuple[str, Time] | None = None
        self._layer: tuple[int, Time] | None = None
        self._decoding = self._by_layer = False
        self._steps = 0
        self._rest: tuple[Time, Time] | None = None
        if store is not None:
            store.recorders.include(self.timeline)

    def events(self) -> tuple[Event, ...]:
        """What was recorded so far, in the order of beginning."""
        events = self.timeline.events()
        if self._rest is not None:
            begin, end = self._rest
            name = f"steps {MOST_STEPS + 1:,} to {self._steps:,}"
            events = in_order([*events, Event("compute", name, seconds(begin), seconds(end))])
        return events

    def end(self) -> None:
        """The turn is over. What the store does in the background is recorded until it has done all that the turn left
        it to do."""
        store, self._store = self._store, None
        if store is not None:
            store.stop_recording(self.timeline)

    # computing

    def begin_forward(self, tokens: int, *, decoding: bool) -> None:
        """A forward begins: one that decodes is recorded as a whole, another layer by layer."""
        self._decoding, self._by_layer, self._layer = decoding, False, None
        name = f"step {self._steps + 1:,}" if decoding else f"{tokens:,} tokens"
        self._forward = name, self.now(0)

    def before_layer(self, number: int) -> None:
        """A decoder layer is about to compute."""
        if self._forward is not None and not self._decoding:
            self._by_layer = True
            self._layer = number, self.now(number)

    def after_layer(self, number: int) -> None:
        """It has computed, or was told to."""
        layer, self._layer = self._layer, None
        if layer is not None and layer[0] == number:
            self.timeline.add("compute", layer_name(number), layer[1], self.now(number))

    def end_forward(self) -> None:
        """The forward has ended well."""
        forward, self._forward = self._forward, None
        if forward is None:
            return
        name, began = forward
        self._steps += self._decoding
        if self._steps > MOST_STEPS:
            self._rest = (self._rest[0] if self._rest is not None else began), self.now(-1)
        elif not self._by_layer:  # where a model's layers are not seen, all of them together
            self.timeline.add("compute", name, began, self.now(-1))

    # loading and saving

    def waited(self, number: int, began: Time) -> None:
        """A layer has what is loaded for it, or the device will not compute it before. It needed it since `began`."""
        self.timeline.add("wait", layer_name(number), began, self.now(number))

    def brought(self, stage: int, how: str, begin: Time, end: Time, stages: int = 1) -> None:
        """A part of a load has been put in place; `stage` is the number of its layer, the first of so many."""
        name = layer_name(stage) if stages == 1 else f"layers {stage} to {stage + stages - 1}"
        self.timeline.add("load", f"{name}{how and ', '}{how}", begin, end)

    def saved(self, what: int | str, began: Time) -> None:
        """KV was handed over since `began`: that of a layer, or what is said."""
        if isinstance(what, str):
            self.timeline.add("save", what, began)
            return
        end = self.now(what)
        device = self._devices[what]
        if self.times and device is not None and device.type == "cuda":
            end = self.times.mark(device, save_stream(device))
        self.timeline.add("save", layer_name(what), began, end)

    def now(self, layer: int) -> Time:
        """This moment, where a layer computes: on a device, when it comes to it."""
        device = self._devices[layer] if self.times else None
        if device is not None and device.type == "cuda":
            return self.times.mark(device)
        return time.perf_counter()
