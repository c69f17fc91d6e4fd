"""Bringing KV back, layer by layer, while the model computes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import LoadError
from ..session.spans import Span, overlapping
from ..store.blocks import TensorSpec
from ..store.policy import lookahead_depth
from ..store.store import AttentionStore
from ..store.transfer import Load, Piece, Stage
from .layers import NAMES, SlidingLayer, StoreLayer


def tensor_name(layer: int, name: str) -> str:
    """The name of a layer's tensor in a block."""
    return f"layers.{layer}.{name}"


@dataclass
class Pace:
    """Seconds per layer, as measured on one model: what the look-ahead goes by."""

    load: float = 0.0
    compute: float = 0.0

    def measured(self, load: float, compute: float) -> None:
        """Mixes in a new measurement, seconds per layer."""
        self.load = load if not self.load else (self.load + load) / 2
        self.compute = compute if not self.compute else (self.compute + compute) / 2


def first_needed(layer: StoreLayer, length: int, block_size: int) -> int:
    """Position from which a layer needs KV to go on at `length`, and to save what follows in whole blocks."""
    if not isinstance(layer, SlidingLayer):
        return 0
    return min(layer._window_from(length), length - length % block_size)


def resident_from(layer: StoreLayer, length: int, block_size: int) -> int:
    """Position from which KV must be loaded for the layer to go on at `length`; `length` if nothing must be."""
    need = first_needed(layer, length, block_size)
    if layer.is_initialized and layer.first <= need and layer.length > need:
        return min(layer.length, length)
    return need


class Restore:
    """A load into the layers of a cache. Made with nothing moved yet; `start` and the layers' hooks drive it."""

    def __init__(self, layers: Sequence[StoreLayer], load: Load, pace: Pace) -> None:
        self._layers = layers
        self._load = load
        self._pace = pace
        self._depth = lookahead_depth(pace.load, pace.compute, len(layers))
        self._clock: float | None = None
        self._waited = 0.0
        self._compute: list[float] = []
        self.exposed_seconds = 0.0
        for number, layer in enumerate(layers):
            layer.pending = partial(self._wait, number)

    @property
    def load(self) -> Load:
        return self._load

    def start(self) -> None:
        """Asks for the first layers; returns at once."""
        self._load.request(self._depth)

    def before_layer(self, number: int) -> None:
        """A decoder layer is about to compute: keeps the next ones on their way, and measures the pace."""
        self._load.request(number + self._depth)
        now = time.perf_counter()
        if self._clock is not None:
            self._compute.append(max(now - self._clock - self._waited, 0.0))
        self._clock, self._waited = now, 0.0

    def _wait(self, number: int) -> None:
        waited = self._load.wait(number)
        self.exposed_seconds += waited
        self._waited += waited

    def finish(self) -> None:
        """Ends the load: every layer is complete, or the error of the first that is not.

        Raises:
            LoadError: a block could not be read.
        """
        try:
            for layer in self._layers:
                layer.settle()
        finally:
            self._load.finish()
        if self._compute:
            load = sum(self._load.stage_seconds) / len(self._layers)
            self._pace.measured(load, sum(self._compute) / len(self._compute))

    def abandon(self) -> None:
        """Ends the load whatever its state; the layers' content is not to be used."""
        for layer in self._layers:
            layer.pending = None
        self._load.finish()


def plan_restore(
    layers: Sequence[StoreLayer],
    devices: Sequence[torch.device | None],
    spans: Sequence[Span],
    length: int,
    block_size: int,
    store: AttentionStore,
    pace: Pace,
) -> Restore | None:
    """Makes every layer hold what it needs at `length` tokens; what is missing is loaded from `spans`.

    Returns:
        The load that brings it, not started; None where nothing is missing.

    Raises:
        LoadError: a block is missing or damaged, or its tensors are not what the layers need.
    """
    missing = [
        (number, resident_from(layer, length, block_size), first_needed(layer, length, block_size))
        for number, layer in enumerate(layers)
    ]
    if all(start >= length for _, start, _ in missing):
        for layer in layers:
            layer.crop_to(length)
        return None
    earliest = min(start for _, start, _ in missing)
    described = store.describe(next(overlapping(spans, earliest, length)).block)
    pieces = {
        start: [Piece(span.block, span.start, span.stop) for span in overlapping(spans, start, length)]
        for start in {start for _, start, _ in missing}
    }
    stages: list[Stage] = []
    for number, start, first in missing:
        layer = layers[number]
        if start >= length:
            layer.crop_to(length)
            stages.append(Stage())
            continue
        specs = _specs(described, number)
        targets = layer.restore(first if start == first else layer.first, start, length, specs, devices[number])
        names = [spec.name for spec in specs]
        stages.append(Stage(pieces[start], dict(zip(names, targets, strict=True))))
    return Restore(layers, store.load(stages), pace)


def _specs(described: Mapping[str, TensorSpec], number: int) -> tuple[TensorSpec, TensorSpec]:
    try:
        keys, values = (described[tensor_name(number, name)] for name in NAMES)
    except KeyError:
        raise LoadError(f"a stored block has no KV of layer {number}") from None
    return keys, values
