"""Bringing KV back, layer by layer, while the model computes."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...errors import LoadError
from ...session.matching import Checkpoint
from ...session.spans import Span, overlapping
from ...store.blocks.keys import window_key
from ...store.store import AttentionStore
from ...store.transfer.depth import lookahead_depth
from ...store.transfer.load import Load
from ...store.transfer.stages import Piece, Stage
from ..layers.buffers import outliving_inference_mode
from ..layers.kept import KeptLayer
from ..layers.states import decode_numbers
from ..positions.geometry import Geometry, Rotation
from .coalesced import make_rooms
from .names import by_layer_of, specs_of, tensor_name
from .record import TurnRecorder


@dataclass
class Pace:
    """Seconds per layer, as measured on one model: what the look-ahead goes by."""

    load: float = 0.0
    compute: float = 0.0

    def measured(self, load: float, compute: float) -> None:
        """Mixes in a new measurement, seconds per layer."""
        self.load = load if not self.load else (self.load + load) / 2
        self.compute = compute if not self.compute else (self.compute + compute) / 2


def as_it_comes(restore: "Restore") -> None:
    """Begins a load: brings all layers at once where nothing of that could be hidden behind computing, else asks for
    the first ones."""
    restore.preload()
    restore.ask()


class Restore:
    """A load into the layers of a cache. Made with nothing moved yet; `start` and the layers' hooks drive it."""

    recorder: TurnRecorder | None = None
    begin: Callable[["Restore"], None] = staticmethod(as_it_comes)

    def __init__(
        self, layers: Sequence[KeptLayer], load: Load, pace: Pace, rotated_tokens: int = 0, first_loaded: int = 0
    ) -> None:
        self._layers = layers
        self.first_loaded = first_loaded
        """Position from which something is loaded; what comes before is in the layers."""
        self.rotated_tokens = rotated_tokens
        """Tokens whose keys are rotated as they arrive, in the layer with the most of them."""
        self._load = load
        self._pace = pace
        self._depth = lookahead_depth(pace.load, pace.compute, len(layers))
        self._clock: float | None = None
        self._waited = 0.0
        self._compute: list[float] = []
        self.exposed_seconds = 0.0
        self.planning_seconds = 0.0
        """What it took to plan the load: finding room, opening blocks."""
        for number, layer in enumerate(layers):
            layer.pending = partial(self._wait, number)

    @property
    def load(self) -> Load:
        return self._load

    def look_ahead(self, layers: int) -> None:
        """Sets how many layers are asked for beyond the one that computes."""
        self._depth = layers

    def start(self) -> None:
        """Begins, as `begin` says.

        Raises:
            LoadError: a block could not be read, where all of them are brought.
        """
        self._load.recorder = self.recorder
        self.begin(self)

    def preload(self) -> None:
        """Brings all layers, where there is nothing to wait for: see `Load.preload`."""
        self._timed(0, self._load.preload)

    def ask(self) -> None:
        """Asks for the first layers."""
        self._load.request(self._depth)

    def settle(self) -> None:
        """Brings all layers, one after the other."""
        for layer in self._layers:
            layer.settle()

    def before_layer(self, number: int) -> None:
        """A decoder layer is about to compute: keeps the next ones on their way, and measures the pace."""
        self._load.request(number + self._depth)
        if self._layers[number].has_state:  # models look at a state without asking the cache
            self._layers[number].settle()
        now = time.perf_counter()
        if self._clock is not None:
            self._compute.append(max(now - self._clock - self._waited, 0.0))
        self._clock, self._waited = now, 0.0

    def _wait(self, number: int) -> None:
        self._waited += self._timed(number, partial(self._load.wait, number))

    def _timed(self, number: int, wait: Callable[[], float]) -> float:
        """Waits for a layer, or for all from it on. Returns the seconds that took."""
        began = self.recorder.now(number) if self.recorder is not None else 0.0
        waited = wait()
        if self.recorder is not None and waited:
            self.recorder.waited(number, began)
        self.exposed_seconds += waited
        return waited

    def finish(self) -> None:
        """Ends the load: every layer is complete, or the error of the first that is not.

        Raises:
            LoadError: a block could not be read.
        """
        try:
            self.settle()
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
    layers: Sequence[KeptLayer],
    devices: Sequence[torch.device | None],
    spans: Sequence[Span],
    length: int,
    whole_from: int,
    store: AttentionStore,
    pace: Pace,
    geometry: Geometry | None = None,
    checkpoint: Checkpoint | None = None,
    patience: Callable[[], float | None] | None = None,
    apart: Sequence[int] = (),
) -> Restore | None:
    """Makes every layer hold what it needs at `length` tokens; what is missing is loaded from `spans`.

    Args:
        whole_from: position from which all layers need their KV, for the sake of saving.
        geometry: how keys are moved, for spans that are not where they were made.
        checkpoint: where the running states at `length` come from; None where the layers have them, or have none.
        patience: tells how many seconds it may be waited for where other machines have it; None for as long as that
            tier says.
        apart: layers whose windows are blocks of their own.

    Returns:
        The load that brings it, not started; None where nothing is missing.

    Raises:
        LoadError: a block is missing or damaged, or its tensors are not what the layers need.
    """
    missing = [
        (number, layer.missing_from(length, whole_from), layer.needed_from(length, whole_from))
        for number, layer in enumerate(layers)
    ]
    if checkpoint is None and all(start >= length for _, start, _ in missing):
        for layer in layers:
            layer.crop_to(length)
            layer.length = length
        return None
    earliest = min(start for _, start, _ in missing)
    first_block = next(overlapping(spans, earliest, length), None)
    described = store.describe(first_block.block) if first_block is not None else {}
    parts = {start: list(overlapping(spans, start, length)) for start in {start for _, start, _ in missing}}
    pieces = {start: [Piece(s.block, s.start, s.stop, s.shift) for s in part] for start, part in parts.items()}
    windows = {
        start: [Piece(window_key(s.block, store.secret), s.start, s.stop, s.shift) for s in parts[start]]
        for start in {start for number, start, _ in missing if number in apart}
    }
    rotated = sum(span.last - span.first for span in parts[earliest] if span.shift)
    if rotated and (geometry is None or not geometry.movable):
        raise LoadError("the stored keys belong to other positions, and this model's can't be moved")
    by_layer = by_layer_of(described)
    first_window = next((part[0] for part in windows.values() if part), None)
    if first_window is not None:
        by_layer |= by_layer_of(store.describe(first_window.key))
    specs = {number: specs_of(by_layer, number) for number, start, _ in missing if start < length}
    stages: list[Stage] = []
    with outliving_inference_mode():
        fresh = {
            number: specs[number]
            for number, start, first in missing
            if start == first == 0 < length and _in_host_memory(devices[number])
        }
        rooms = make_rooms(layers, fresh, length)
        for number, start, first in missing:
            layer = layers[number]
            if start >= length:
                layer.crop_to(length)
                layer.length = length
                stages.append(Stage())
                continue
            room = rooms.get(number)
            if room is not None:
                layer.restore_into(room.buffers, length)  # type: ignore[attr-defined]
                targets = room.targets
            else:
                low = first if start == first else layer.first
                found = layer.restore(low, start, length, specs[number], devices[number])
                targets = {tensor_name(number, name): target for name, target in found.items()}
            stage = Stage((windows if number in apart else pieces)[start], targets)
            stage.joint = room.joint if room is not None else None
            if geometry is not None and any(span.shift for span in parts[start]):
                turned = {"keys": geometry.layers[number].keys, "values": geometry.layers[number].values}
                stage.arrived = partial(
                    _rotate, {tensor_name(number, n): r for n, r in turned.items() if r is not None}
                )
            stages.append(stage)
    if checkpoint is not None:
        _install(layers, devices, checkpoint, store, stages)
    return Restore(layers, store.load(stages, patience), pace, rotated, earliest)


def _install(
    layers: Sequence[KeptLayer],
    devices: Sequence[torch.device | None],
    checkpoint: Checkpoint,
    store: AttentionStore,
    stages: list[Stage],
) -> None:
    """Makes the layers take on the states of a checkpoint, which come with the stages."""
    described, encoded = store.describe_checkpoint(checkpoint.key)
    by_layer = by_layer_of(described)
    try:
        numbers = decode_numbers(encoded or "")
    except ValueError as error:
        raise LoadError(f"a stored checkpoint is none ({error})") from None
    for number, layer in enumerate(layers):
        if layer.has_state:
            if number not in numbers:
                raise LoadError(f"a stored checkpoint has no state of layer {number}")
            targets = layer.install(  # type: ignore[attr-defined]
                specs_of(by_layer, number), numbers[number], devices[number]
            )
            stages[number].whole = {tensor_name(number, name): target for name, target in targets.items()}
            stages[number].checkpoint = checkpoint.key


def _in_host_memory(device: torch.device | None) -> bool:
    return device is None or device.type == "cpu"


def _rotate(rotations: Mapping[str, Rotation], shift: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Turns keys, each `[heads, tokens, dim]`, that have arrived as they were made, to where they are now."""
    for name, rotation in rotations.items():
        rotation.rotate_(tensors[name], shift)
