"""Leaving KV where it is between two turns: a cache that parks what it holds in the store's device tier, and one of
the next turn that takes it over.

Nothing is copied: the layers' buffers change hands. The object that parked them may live on, and somebody may read it,
or a view of its tensors. So what was parked is never overwritten while anybody can see it: who took it over writes
behind it, and copies before it would write into it (`StoreLayer.share`); the object that parked it copies before it
writes at all. What can't be protected like this, running states, is copied at once where somebody can see it.

That the bytes are still those that were parked is checked by the tensors' version counters, which count every write.
"""

import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..session.chain import common_prefix
from ..session.view import View
from ..store.blocks.keys import Key
from ..store.memory.device_tier import DeviceEntry, DeviceTier
from .choices import CacheChoices
from .layers.by_token import FullLayer, KeptLayer, SlidingLayer, StoreLayer
from .layers.indexed import Track
from .layers.shared_memory import is_watched
from .layers.states import RunningState

logger = logging.getLogger("hf_attnstore")

_PLAIN = (int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, weakref.ref)


class _UnknownError(Exception):
    """A layer has something that nobody knows how to hand on."""


@dataclass(eq=False)
class Parked:
    """What a cache held when its turn had ended, and nothing of the model."""

    fingerprint: str
    view: View
    ids: np.ndarray
    """`[tokens]`, those in view."""
    layers: list[KeptLayer]
    """Layers like those of the cache, with the same tensors."""
    states_at: int | None
    checkpoints: dict[int, Key]
    places: frozenset[torch.device]
    """Where the model was."""
    changes: int
    """How often the model had been found to have changed."""
    donor: "weakref.ref[ParkingCache]"
    donor_held: int
    """How many tokens of the buffers whoever has the donor can see."""
    versions: list[int] = field(default_factory=list)
    arrived: list[tuple[torch.device, torch.cuda.Event]] = field(default_factory=list)
    """When what wrote the tensors is done, on each device with streams."""

    def __post_init__(self) -> None:
        self.versions = _versions(self.layers)
        for device in {tensor.device for tensor in self.tensors() if tensor.device.type == "cuda"}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self.arrived.append((device, event))

    def tensors(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            yield from _tensors(layer.__dict__)

    @property
    def conversation(self) -> np.ndarray:
        """The ids `[tokens]` of the whole conversation, those dropped from the window included."""
        return self.view.whole(self.ids)

    def problem(self, model: nn.Module, changes: int) -> str:
        """Why it can't be gone on with; empty if it can.

        Args:
            changes: of the model, by now.
        """
        if self.changes != changes and self.places != _places(model):
            return "the model was moved to other devices"
        if self.versions != _versions(self.layers):
            return "its tensors were written to from outside"
        return ""

    def wait(self) -> None:
        """What the current streams do from now on comes after what wrote the tensors."""
        for device, event in self.arrived:
            event.wait(torch.cuda.current_stream(device))
        for tensor in self.tensors():
            if tensor.device.type == "cuda":  # its memory is not given to others before this stream is done with it
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


class ParkingCache(CacheChoices):
    """A cache that parks what it holds at the end of a turn, and begins one with what was parked of its session."""

    parks = True
    """Whether it takes part in that: not where what it holds is no conversation of its own."""

    def _prepare_empty(self) -> None:
        super()._prepare_empty()
        self._parked: DeviceEntry | None = None
        """What of this object is in the device tier, or was."""
        self._taken = 0
        """How many leading tokens of the turn's prompt came with what was taken over."""
        self._forgotten = 0
        """What the tier's count of forgotten sessions was when the turn began."""

    def _tier(self) -> DeviceTier | None:
        """The tier to park in, where this cache does."""
        if self._store is None or not self.parks or not self._ranks.alone:
            return None
        tier = self._store.device_tier
        return tier if tier.capacity and (self._attachment.computes_on_cpu or not tier.host_only) else None

    # parking

    def _park(self) -> None:
        """The turn has ended: leaves what is held to the next turn of the session, whichever object that has."""
        tier = self._tier()
        length = self._parkable()
        if tier is None or not length:
            return
        if not self._saving and tier.forgotten != self._forgotten:
            return  # nobody holds the session for who only reads: it may have been deleted meanwhile
        nbytes = _allocated(self.layers)
        if nbytes < tier.least:  # the tier says so, too: this is before anything was done for it
            return
        try:
            layers = [_twin(layer) for layer in self.layers]
        except _UnknownError as unknown:
            logger.debug("not parked: %s", unknown)
            return
        for layer in layers:
            layer.crop_to(length)
        parked = Parked(
            fingerprint=self._fingerprint,
            view=self._view,
            ids=self._chain.ids[:length].copy(),
            layers=layers,
            states_at=self._states_at,
            checkpoints={tokens: key for tokens, key in self._checkpoints.items() if tokens <= length},
            places=_places(self._model),
            changes=self._attachment.fingerprint.changes,
            donor=weakref.ref(self),
            donor_held=self._held,
        )
        assert self._store is not None
        self._parked = tier.park(self._attachment.parked, self.session, nbytes, parked, namespace=self._store.namespace)

    def _parkable(self) -> int:
        """How many of the leading tokens held may be parked: those that were handed over to the store, and identified;
        0 if none may."""
        if self._untracked or self._uneven or self.rows != 1 or len(self._chain) != self._held:
            return 0
        if self._saving:
            length = self._held if self._saver is not None else 0
        else:  # what was only read for is not kept, not even here
            length = min(self._held, self._in_store)
            if length < self._held and not self._view.is_plain:
                return 0
        if self._states and self._states_at != length:
            return 0
        return length if length and all(_is_whole(layer, length) for layer in self.layers) else 0

    def _unpark(self) -> None:
        """This object is about to go on: what it parked is its own again. Where somebody else has taken that over, it
        still may be read here, but not written to."""
        entry, self._parked = self._parked, None
        if entry is None or self._store is None:
            return
        if self._store.device_tier.take(entry) is None and entry.state == "taken":
            for layer in self.layers:
                if isinstance(layer, StoreLayer):
                    layer.lend()
                _copy_states(layer)

    # taking over

    def _begin_taking(self) -> None:
        """A turn begins."""
        self._in_store = 0
        tier = self._tier()
        self._forgotten = tier.forgotten if tier is not None else 0

    def _take_parked(self, ids: np.ndarray) -> None:
        """Goes on with what was parked of the session, if that has more of the conversation `ids` than is held."""
        self._taken = 0
        tier = self._tier()
        if tier is None or self._untracked:
            return
        own = common_prefix(self._view.whole(self._chain.ids), ids)
        best: tuple[int, DeviceEntry] | None = None
        assert self._store is not None
        for entry in tier.entries(self._attachment.parked, self.session, self._store.namespace):
            parked: Parked | None = entry.content
            if parked is None:
                continue
            if parked.fingerprint != self._fingerprint:
                if self.session is not None:
                    self._refuse(tier, entry, "the model's weights or settings changed", "other model")
                continue
            common = common_prefix(parked.conversation, ids)
            # a conversation without a name is another one, if it has little in common with this
            enough = 2 * common >= len(parked.ids) if self.session is None else common > 0
            if enough and common > max(own, best[0] if best else 0):
                best = common, entry
        if best is None:
            return
        taken = tier.take(best[1])
        if taken is None:
            return
        problem = taken.problem(self._model, self._attachment.fingerprint.changes)
        if problem:
            self._refuse(tier, best[1], problem, "not as it was parked")
            return
        self._take_over(taken)
        self._taken = self._view.position(best[0])

    def _refuse(self, tier: DeviceTier, entry: DeviceEntry, reason: str, missed: str) -> None:
        tier.drop(entry)
        if not self._stats.recomputed:
            name = f"session {self.session!r}" if self.session is not None else "a conversation"
            self._note(f"what the device tier held of {name} is not used: {reason}", missed)

    def _take_over(self, parked: Parked) -> None:
        """Holds from now on what was parked, which is nobody else's any more."""
        self._clear()
        parked.wait()
        donor = parked.donor()
        for own, theirs in zip(self.layers, parked.layers, strict=True):
            own.__dict__.clear()
            own.__dict__.update(theirs.__dict__)
            if isinstance(own, StoreLayer) and donor is not self:
                own.share(parked.donor_held, parked.donor)
            if isinstance(own, RunningState):
                own.thaw()
            _copy_states(own, watched_only=donor is None)
        self._change_view(parked.view, parked.ids)
        if self._saver is None:
            for own in self.layers:
                if isinstance(own, SlidingLayer):
                    own.saved_to = None
        self._held = len(parked.ids)
        self._states_at = parked.states_at
        self._checkpoints = dict(parked.checkpoints)

    def _report_taken(self, reused: int) -> None:
        """Says where the `reused` tokens of the prompt, of which a load may still bring some, come from."""
        first_loaded = self._restore.first_loaded if self._restore is not None else reused
        tokens = min(self._taken, reused, first_loaded)
        if tokens:
            self._stats.blocks_from = {"device": -(-tokens // self._chain.block_size)}


def _is_whole(layer: KeptLayer, length: int) -> bool:
    """Whether a layer has all that is needed to go on at `length`, and nothing on its way."""
    if layer.pending is not None or not layer.reusable or layer.length < length:
        return False
    if isinstance(layer, SlidingLayer):
        return layer.has_window(length)
    return layer.first == 0 if isinstance(layer, FullLayer) else True


def _places(model: nn.Module) -> frozenset[torch.device]:
    return frozenset(parameter.device for parameter in model.parameters())


# layers, as what they are made of


def _twin(layer: KeptLayer) -> KeptLayer:
    """A layer with the same tensors, of which everything else is its own.

    Raises:
        _UnknownError: the layer has attributes of a kind that may be shared without anybody seeing it.
    """
    made: KeptLayer = object.__new__(type(layer))
    made.__dict__.update({name: _same(value) for name, value in layer.__dict__.items()})
    return made


def _same(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, *_PLAIN)):
        return value
    if isinstance(value, dict):
        return {key: _same(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_same(item) for item in value)
    if isinstance(value, Track):
        return value.twin()
    raise _UnknownError(f"a layer has a {type(value).__name__}")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Track) and value.buffer is not None:
        yield value.buffer


def _allocated(layers: Sequence[KeptLayer]) -> int:
    """Bytes allocated for the tensors of layers, their spare capacity included."""
    storages = [tensor.untyped_storage() for layer in layers for tensor in _tensors(layer.__dict__)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _copy_states(layer: KeptLayer, *, watched_only: bool = False) -> None:
    """Makes all tensors of a layer its own, but for those that are written to behind their end only.

    Args:
        watched_only: only those that somebody else has a view of.
    """

    def own(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            with torch.inference_mode(False):
                return value.clone() if not watched_only or is_watched(value) else value
        if isinstance(value, dict):
            return {key: own(item) for key, item in value.items()}
        if isinstance(value, list):
            return [own(item) for item in value]
        if isinstance(value, Track) and value.buffer is not None:
            return Track(own(value.buffer), value.length)
        return value

    for name, value in layer.__dict__.items():
        if name not in ("_buffers", "_fresh"):
            layer.__dict__[name] = own(value)


def _versions(layers: list[KeptLayer]) -> list[int]:
    """How often each tensor was written to; -1 for those that nobody counts it of."""
    return [-1 if t.is_inference() else t._version for layer in layers for t in _tensors(layer.__dict__)]
