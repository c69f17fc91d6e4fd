"""Layers that keep a running state: right for exactly one number of tokens, and never to be cropped.

The classes are transformers' own (models ask `isinstance`), with what a cache needs to take their state out and to put
it back: every tensor and number among their attributes, whatever they are called.
"""

import copy
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from ...store.blocks.block import TensorSpec
from .buffers import empty
from .by_token import FullLayer, SlidingLayer
from .kept import KeptLayer

_CONVOLUTION = (
    "conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized",
    "has_previous_state", "conv_kernel_size", "dtype", "device",
)  # fmt: skip
_OWN = frozenset({"pending", "first", "length", "expected", "kind", "record_past", "_fresh"})
"""Attributes that are no part of the state."""


class RunningState(KeptLayer):
    """The part of a layer that is a running state. To be mixed into a class of transformers."""

    has_state = True
    fits_batches = False
    is_compileable = False
    state_names: tuple[str, ...] = ()
    """The attributes that make up the state; empty for all there are."""
    _fresh: dict[str, Any]

    def remember_fresh(self) -> None:
        """The layer has just been made: takes down how that looks."""
        self._fresh = copy.deepcopy(dict(self._attributes()))

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.__dict__.items():
            if name not in _OWN and (name in self.state_names or not self.state_names):
                yield name, value

    def _leaves(self) -> Iterator[tuple[str, Any]]:
        """Everything the state consists of, by name: dictionaries are opened up."""
        for name, value in self._attributes():
            if isinstance(value, dict):
                yield from ((f"{name}.{key}", item) for key, item in value.items())
            else:
                yield name, value

    def capture(self) -> tuple[dict[str, torch.Tensor], dict[str, int | bool]]:
        """The state of the first row: tensors (views, `[1, …]`) and numbers, by name."""
        self.settle()
        leaves = list(self._leaves())
        tensors = {name: value[:1] for name, value in leaves if isinstance(value, torch.Tensor) and value.ndim}
        return tensors, {name: value for name, value in leaves if isinstance(value, int)}

    def install(
        self, specs: Mapping[str, TensorSpec], numbers: Mapping[str, int | bool], device: torch.device | None
    ) -> dict[str, torch.Tensor]:
        """Takes on a state that was captured. Returns the tensors, by name, whose content is about to arrive."""
        self.forget()
        where = device or torch.device("cpu")
        tensors = {name: empty(tuple(spec.shape), spec.dtype, where) for name, spec in specs.items()}
        for name, value in (*numbers.items(), *tensors.items()):
            self._set(name, value)
        self._place(tensors)
        return tensors

    def _place(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes down what the state is made of, as layers do when they see their first token."""
        first = next(iter(tensors.values()), None)
        if first is not None:
            for name, origin in (("dtype", first.dtype), ("device", first.device)):
                if not self.state_names or name in self.state_names:
                    setattr(self, name, origin)

    def _set(self, name: str, value: Any) -> None:
        attribute, _, inner = name.partition(".")
        if not inner:
            setattr(self, attribute, value)
            return
        there: dict[Any, Any] = self.__dict__.setdefault(attribute, {})
        key = next((key for key in there if str(key) == inner), int(inner) if inner.isdigit() else inner)
        there[key] = value

    def forget(self) -> None:
        """Goes back to having seen no token."""
        self.pending = None
        for name in [name for name, _ in self._attributes() if name not in self._fresh]:
            delattr(self, name)
        for name, value in copy.deepcopy(self._fresh).items():
            setattr(self, name, value)

    def step_back(self, count: int) -> bool:
        """Undoes the last `count` tokens, where that can be done. 0 lets go of what was kept for going back."""
        return count == 0

    def forget_past(self) -> None:
        if getattr(self, "record_past", False):
            self.step_back(0)
            self.record_past = False

    def take_over(self, other: KeptLayer) -> None:
        super().take_over(other)
        self.thaw()

    def thaw(self) -> None:
        """Makes tensors that were made in inference mode usable outside of it."""
        if not torch.is_inference_mode_enabled():
            self._replace(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    def _replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.inference_mode(False):
            for name, value in list(self._leaves()):
                if isinstance(value, torch.Tensor) and value.ndim:
                    self._set(name, change(value))

    @property
    def rows(self) -> int:
        tensors = (value for _, value in self._leaves() if isinstance(value, torch.Tensor) and value.ndim)
        return next((tensor.shape[0] for tensor in tensors), 0)

    # the contract of a transformers layer

    def reset(self) -> None:
        self.forget()
        self.first = self.length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select_rows(lambda tensor: tensor[indices, ...])

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.settle()
        self._replace(select)


class ConvolutionState(RunningState):
    """What layers with transformers' linear-attention state share."""

    fits_batches = True
    state_names = _CONVOLUTION
    record_past: bool
    conv_states: Any

    def capture(self) -> tuple[dict[str, torch.Tensor], dict[str, int | bool]]:
        tensors, numbers = super().capture()
        if getattr(self, "record_past", False):  # wider then: only the last of it counts
            for name in [name for name in tensors if name.startswith("conv_states")]:
                size = numbers.get(name.replace("conv_states", "conv_kernel_size"))
                tensors[name] = tensors[name][..., -size:] if size else tensors[name]
        return tensors, numbers

    def put_together(self, rows: Sequence[Any], pads: Sequence[int], end: int) -> None:
        """As of all layers; the state of a row that has seen no token, while others have, is zeros: that is what the
        model begins with."""
        super().put_together(rows, pads, end)
        captured = [row.capture() for row in rows]
        seen = next((found for found in captured if found[0]), captured[0])
        self.forget()
        for name, number in seen[1].items():
            self._set(name, number)
        with torch.inference_mode(False):
            tensors = {
                name: torch.cat([found.get(name, torch.zeros_like(like)) for found, _ in captured])
                for name, like in seen[0].items()
            }
        for name, tensor in tensors.items():
            self._set(name, tensor)
        self._place(tensors)

    def take_row(self, batch: Any, place: int, start: int, stop: int, *, states: bool) -> None:
        super().take_row(batch, place, start, stop, states=states)
        if not states:
            return
        _, numbers = batch.capture()
        self.forget()
        for name, number in numbers.items():
            self._set(name, number)
        tensors = {n: t[place : place + 1].clone() for n, t in batch._leaves() if isinstance(t, torch.Tensor)}
        for name, tensor in tensors.items():
            self._set(name, tensor)
        self._place(tensors)

    def step_back(self, count: int) -> bool:
        if not getattr(self, "record_past", False):
            return count == 0
        sizes = getattr(self, "conv_kernel_size", {})
        states = {number: state for number, state in self.conv_states.items() if state is not None}
        recurrent = any(self.__dict__.get("is_recurrent_states_initialized", {}).values())
        if count and (recurrent or any(state.shape[-1] < count + sizes[n] for n, state in states.items())):
            return False
        for number, state in states.items():
            end = state.shape[-1] - count
            self.conv_states[number] = state[..., max(end - sizes[number], 0) : end].clone()
        return True


class StateLayer(ConvolutionState, LinearAttentionLayer):
    """Linear attention, SSM, convolution: a running state and nothing else."""

    def __init__(self, **settings: Any) -> None:
        LinearAttentionLayer.__init__(self, **settings)
        self.remember_fresh()

    def get_seq_length(self) -> int:
        return self.length

    def end_forward(self, count: int) -> None:
        if self.rows:  # else the model keeps its state elsewhere, as RecurrentGemma does in its modules
            super().end_forward(count)


@LinearAttentionAndFullAttentionLayer.register  # which `Cache.is_linear` asks, by a rule of its own in each version
class HybridLayer(ConvolutionState, LinearAttentionLayer, FullLayer):  # type: ignore[override]
    """A running state beside full attention."""

    device: Any = None
    dtype: Any = None

    def __init__(self, **settings: Any) -> None:
        FullLayer.__init__(self)
        LinearAttentionLayer.__init__(self, **settings)
        self.remember_fresh()

    @property
    def rows(self) -> int:
        return FullLayer.rows.fget(self) or super().rows  # type: ignore[attr-defined]

    def reset(self) -> None:
        self.forget()
        FullLayer.reset(self)

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        FullLayer._select_rows(self, select)
        self._replace(select)

    get_seq_length = FullLayer.get_seq_length
    get_max_length = FullLayer.get_max_length
    crop = FullLayer.crop


class HybridSlidingLayer(ConvolutionState, LinearAttentionLayer, SlidingLayer):  # type: ignore[override]
    """A running state beside sliding attention."""

    device: Any = None
    dtype: Any = None

    def __init__(self, window: int, **settings: Any) -> None:
        SlidingLayer.__init__(self, window)
        LinearAttentionLayer.__init__(self, **settings)
        self.remember_fresh()

    @property
    def rows(self) -> int:
        return SlidingLayer.rows.fget(self) or super().rows  # type: ignore[attr-defined]

    def reset(self) -> None:
        self.forget()
        SlidingLayer.reset(self)

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        SlidingLayer._select_rows(self, select)
        self._replace(select)

    get_seq_length = SlidingLayer.get_seq_length
    get_max_length = SlidingLayer.get_max_length
    crop = SlidingLayer.crop
    activate_past_recording = SlidingLayer.activate_past_recording


class OwnState(RunningState):
    """A running state that a model keeps under a name of its own, in tensors `[rows, …]` that it writes to in place."""

    state_names = ("states",)

    def __init__(self) -> None:
        self.states: dict[int, torch.Tensor] = {}
        self.remember_fresh()

    def begin(self, tensors: Sequence[torch.Tensor]) -> None:
        """Takes on what a model begins with."""
        self.states = dict(enumerate(tensors))


_Dummy: Any = getattr(cache_utils, "DummyLayer", object)
"""Older transformers (5.17) have none: there a cache has no layer where nothing is kept."""


class SharedLayer(KeptLayer, _Dummy):
    """A layer without a cache of its own: it uses another's, or needs none."""

    def __init__(self) -> None:
        _Dummy.__init__(self)

    def reset(self) -> None:
        self.pending = None
        self.length = 0


def snapshot_of(layer: Any, *, reusable: bool) -> RunningState:
    """A layer of a model's own kind, of which everything is a running state.

    Args:
        layer: as `DynamicCache` has just made it.
        reusable: whether it is known that its attributes are all of its state. If not it computes as it would
            without this package, and nothing of it is ever put back.
    """
    made = _kept_class(type(layer), reusable)  # type: ignore[arg-type]
    kept: RunningState = object.__new__(made)
    kept.__dict__.update(copy.deepcopy(layer.__dict__))
    kept.remember_fresh()
    return kept


@cache
def _kept_class(cls: Hashable, reusable: bool) -> type[RunningState]:
    # without the name of the kind: transformers would take the new class for the one that serves it
    assert isinstance(cls, type)
    return type(f"Kept{cls.__name__}", (RunningState, cls), {"_layer_type": None, "reusable": reusable})


def encode_numbers(numbers: Mapping[int, Mapping[str, int | bool]]) -> str:
    """The numbers of the layers' states, by layer and name, as JSON."""
    return json.dumps({str(layer): dict(found) for layer, found in numbers.items()}, separators=(",", ":"))


def decode_numbers(encoded: str) -> dict[int, dict[str, int | bool]]:
    """What `encode_numbers` made JSON of.

    Raises:
        ValueError: it is something else.
    """
    found = json.loads(encoded)
    if not isinstance(found, dict) or not all(isinstance(numbers, dict) for numbers in found.values()):
        raise ValueError("these are not the numbers of layers")
    for numbers in found.values():
        if not all(type(number) in (int, bool) for number in numbers.values()):
            raise ValueError("these are not numbers")
    return {int(layer): numbers for layer, numbers in found.items()}
