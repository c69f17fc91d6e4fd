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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..session.chain import common_prefix
from ..session.view import View
from ..store.blocks.keys import Key
from ..store.memory.device_tier import DeviceEntry, DeviceTier
from .held import Held
from .layers.kept import KeptLayer, UnknownAttributeError
from .turn import Turn

logger = logging.getLogger("hf_attnstore")


@dataclass(eq=False)
class Parked:
    """What a cache held when its turn had ended, and nothing of the model."""

    fingerprint: str
    root: Key
    """Of the plain chains that its blocks could be in: the model's, in the store's namespace and codec."""
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
    donor: "weakref.ref[Held]"
    donor_held: int
    """How many tokens of the buffers whoever has the donor can see."""
    versions: list[int] = field(default_factory=list)
    arrived: list[tuple[torch.device, torch.cuda.Event]] = field(default_factory=list)
    """When what wrote the tensors is done, on each device with streams."""

    def __post_init__(self) -> None:
        tensors = list(self.tensors())
        self.versions = _versions(tensors)
        for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self.arrived.append((device, event))

    def tensors(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            yield from layer.tensors()

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
        if self.versions != _versions(self.tensors()):
            return "its tensors were written to from outside"
        return ""

    def wait(self) -> None:
        """What the current streams do from now on comes after what wrote the tensors."""
        for device, event in self.arrived:
            event.wait(torch.cuda.current_stream(device))
        for tensor in self.tensors():
            if tensor.device.type == "cuda":  # its memory is not given to others before this stream is done with it
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Parking:
    """Parks what is held at the end of a turn, and begins a turn with what was parked of its session."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._setup = held.setup
        self._parked: DeviceEntry | None = None
        """What of this object is in the device tier, or was."""
        self._forgotten = 0
        """What the tier's count of forgotten sessions was when the turn began."""

    def _tier(self) -> DeviceTier | None:
        """The tier to park in, where this cache does."""
        setup = self._setup
        if setup.store is None or not setup.parks or not setup.ranks.alone:
            return None
        tier = setup.store.device_tier
        return tier if tier.capacity and (setup.attachment.computes_on_cpu or not tier.host_only) else None

    # parking

    def park(self, turn: Turn) -> None:
        """The turn has ended: leaves what is held to the next turn of the session, whichever object that has."""
        setup, held, tier = self._setup, self._held, self._tier()
        length = _parkable(turn)
        if tier is None or not length:
            return
        if not setup.saves and tier.forgotten != self._forgotten:
            return  # nobody holds the session for who only reads: it may have been deleted meanwhile
        nbytes = _allocated(held.layers)
        if nbytes < tier.least:  # the tier says so, too: this is before anything was done for it
            return
        try:
            layers = [layer.twin() for layer in held.layers]
        except UnknownAttributeError as unknown:
            logger.debug("not parked: %s", unknown)
            return
        for layer in layers:
            layer.crop_to(length)
        parked = Parked(
            fingerprint=held.fingerprint,
            root=held.model_root,
            view=held.view,
            ids=held.chain.ids[:length].copy(),
            layers=layers,
            states_at=held.states_at,
            checkpoints={tokens: key for tokens, key in held.checkpoints.items() if tokens <= length},
            places=_places(setup.model),
            changes=setup.attachment.fingerprint.changes,
            donor=weakref.ref(held),
            donor_held=held.length,
        )
        assert setup.store is not None
        namespace = setup.store.namespace
        self._parked = tier.park(setup.attachment.parked, setup.session, nbytes, parked, namespace=namespace)

    def unpark(self) -> None:
        """This object is about to go on: what it parked is its own again. Where somebody else has taken that over, it
        still may be read here, but not written to."""
        entry, self._parked = self._parked, None
        if entry is None or self._setup.store is None:
            return
        if self._setup.store.device_tier.take(entry) is None and entry.state == "taken":
            for layer in self._held.layers:
                layer.lend()

    # taking over

    def begin_turn(self) -> None:
        """A turn begins."""
        self.unpark()
        self._held.in_store = 0
        tier = self._tier()
        self._forgotten = tier.forgotten if tier is not None else 0

    def take(self, turn: Turn, ids: np.ndarray) -> None:
        """Goes on with what was parked of the session, if that has more of the conversation `ids` than is held."""
        setup, held, tier = self._setup, self._held, self._tier()
        if tier is None or turn.untracked:
            return
        own = common_prefix(held.conversation, ids)
        best: tuple[int, DeviceEntry] | None = None
        assert setup.store is not None
        for entry in tier.entries(setup.attachment.parked, setup.session, setup.store.namespace):
            parked: Parked | None = entry.content
            if parked is None or (parked.fingerprint == held.fingerprint and parked.root != held.model_root):
                continue  # it may have gone through a codec that this store does not write by
            if parked.fingerprint != held.fingerprint:
                if setup.session is not None:
                    _refuse(turn, tier, entry, "the model's weights or settings changed", "other model")
                continue
            common = common_prefix(parked.conversation, ids)
            # a conversation without a name is another one, if it has little in common with this
            enough = 2 * common >= len(parked.ids) if setup.session is None else common > 0
            if enough and common > max(own, best[0] if best else 0):
                best = common, entry
        if best is None:
            return
        taken = tier.take(best[1])
        if taken is None:
            return
        problem = taken.problem(setup.model, setup.attachment.fingerprint.changes)
        if problem:
            _refuse(turn, tier, best[1], problem, "not as it was parked")
            return
        self._take_over(taken)
        turn.taken = held.view.position(best[0])

    def _take_over(self, parked: Parked) -> None:
        """Holds from now on what was parked, which is nobody else's any more."""
        held = self._held
        held.clear()
        parked.wait()
        donor = parked.donor()
        for own, theirs in zip(held.layers, parked.layers, strict=True):
            own.take_over(theirs)
            if donor is not held:
                own.share(parked.donor_held, parked.donor)
            own.own_states(watched_only=donor is None)
        held.change_view(parked.view, parked.ids)
        if held.saver is None:
            for own in held.layers:
                own.keep_until_saved(None)
        held.length = len(parked.ids)
        held.states_at = parked.states_at
        held.checkpoints = dict(parked.checkpoints)


def _parkable(turn: Turn) -> int:
    """How many of the leading tokens held may be parked: those that were handed over to the store, and identified;
    0 if none may."""
    setup, held = turn.setup, turn.held
    if turn.untracked or held.uneven or held.rows != 1 or len(held.chain) != held.length:
        return 0
    if setup.saves:
        length = held.length if held.saver is not None else 0
    else:  # what was only read for is not kept, not even here
        length = min(held.length, held.in_store)
        if length < held.length and not held.view.is_plain:
            return 0
    if held.states and held.states_at != length:
        return 0
    return length if length and all(layer.is_whole(length) for layer in held.layers) else 0


def _refuse(turn: Turn, tier: DeviceTier, entry: DeviceEntry, reason: str, missed: str) -> None:
    tier.drop(entry)
    if not turn.stats.recomputed:
        session = turn.setup.session
        name = f"session {session!r}" if session is not None else "a conversation"
        turn.note(f"what the device tier held of {name} is not used: {reason}", missed)


def _places(model: nn.Module) -> frozenset[torch.device]:
    return frozenset(parameter.device for parameter in model.parameters())


def _allocated(layers: Sequence[KeptLayer]) -> int:
    """Bytes allocated for the tensors of layers, their spare capacity included."""
    storages = [tensor.untyped_storage() for layer in layers for tensor in layer.tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """How often each was written to; -1 for those that nobody counts it of."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
