"""A cache's side of load-or-recompute: what can be chosen, and what choosing it turned out to cost."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...session.spans import Span
from ...settings import value_of
from ...store.store import AttentionStore
from ...store.transfer.depth import lookahead_depth, read_buffer_layers
from ..identity.fingerprint import remember
from ..layers.kept import KeptLayer
from ..transfer.load import Restore
from .decide import Choice, Exploration, Option, choose
from .learn import Costs

logger = logging.getLogger("hf_attnstore")


_LONG = 512
_FEW = 32
"""Of a prompt of at least so many tokens, what is less than a thirty-second part of it is not reused before costs are
known. Behind the first held token attention is no longer causal from its first row to its last, but masked: torch then
computes the masked half as well. SmolLM2 took 1.3 times as long for 2,000 tokens behind 4 as for all of them."""


@dataclass
class Learned:
    """What is known of a model on its devices with a store, by all caches of the process."""

    costs: Costs
    exploration: Exploration = field(default_factory=Exploration)
    warm: bool = False
    """Whether the model has computed: the first forward of all takes longer."""


_learned: dict[tuple[str, str, str], Learned] = {}
_learning = threading.Lock()


def wanted(gate: bool | None) -> bool:
    """Whether a cache is to choose between loading and computing; None leaves that to the settings."""
    return gate if gate is not None else value_of("gate").lower() not in ("off", "0", "no")


def device_label(devices: Sequence[torch.device | None]) -> str:
    """What computes, as far as it matters for how long that takes."""
    kinds = sorted({str(device) for device in devices if device is not None and device.type != "cpu"})
    if not kinds:
        return f"cpu, {torch.get_num_threads()} threads"
    names = {torch.cuda.get_device_name(kind) for kind in kinds if kind.startswith("cuda")}
    return ", ".join([*kinds, *sorted(names)])


def learned_of(fingerprint: str, label: str, store: AttentionStore) -> Learned:
    """What is known of a model on such devices with a store, begun with what the store remembers of other processes."""
    place = (fingerprint, label, str(store.path))
    with _learning:
        if place not in _learned:
            remember(_learned, place, Learned(Costs.from_json(store.note(note_name(fingerprint, label)))))
        return _learned[place]


def forget() -> None:
    """Forgets what this process has learned; what stores remember stays."""
    with _learning:
        _learned.clear()


def note_name(fingerprint: str, label: str) -> str:
    return f"{fingerprint}/costs/{label}"


class Gate:
    """Chooses how much of what is known of a prompt a cache reuses, and learns from what that costs.

    Args:
        enabled: whether to choose. Without, everything is reused; costs are learned all the same.
        devices: of the model's layers.
        learns: whether to learn, without which there is nothing to choose by.
    """

    def __init__(self, *, enabled: bool, devices: Sequence[torch.device | None], learns: bool = True) -> None:
        self.enabled = enabled and learns
        self.learns = learns
        self.devices = devices
        self._on_cpu = all(device is None or device.type == "cpu" for device in devices)
        self._cuda = next((d for d in devices if d is not None and d.type == "cuda"), None)
        self.learned: Learned | None = None
        self._fingerprint = self._label = ""
        self._forward: tuple[int, int, float, Any] | None = None
        self._events: list[tuple[int, int, Any, Any]] = []
        self._computed: list[tuple[int, int, float]] = []
        self._loaded: list[tuple[str, int, float]] = []

    # choosing

    def begin_turn(self, fingerprint: str, store: AttentionStore | None) -> None:
        """A turn of the model of that fingerprint begins."""
        self._forward = None
        self._events, self._computed, self._loaded = [], [], []
        self._fingerprint, self._label = fingerprint, device_label(self.devices)
        self.learned = learned_of(fingerprint, self._label, store) if store is not None and self.learns else None

    @property
    def costs(self) -> Costs | None:
        """What the turn's model is known to cost; None where nobody asks."""
        return self.learned.costs if self.learned is not None else None

    def estimate(self, prompt: int) -> float | None:
        """Seconds to compute a prompt of so many tokens from nothing; None while unknown."""
        return self.learned.costs.estimate(prompt) if self.learned is not None and prompt else None

    def can_choose(self) -> bool:
        """Whether enough was measured to choose at all."""
        return self.learned is not None and self.learned.costs.can_choose()

    def choose(
        self,
        layers: Sequence[KeptLayer],
        lengths: Sequence[int],
        spans: Sequence[Span],
        prompt: int,
        whole_from: Callable[[int], int],
        tier_of: Callable[[bytes], str],
        checkpoints: dict[int, bytes],
    ) -> Choice:
        """Which of `lengths`, in ascending order, of a prompt's leading tokens to reuse.

        Args:
            layers: as they are now.
            spans: where the KV of all leading tokens that are known is.
            whole_from: for a length, the position from which layers need their KV for the sake of saving.
            tier_of: the tier that a block would be loaded from.
            checkpoints: by length, the one whose states would be loaded.
        """
        last = len(lengths) - 1
        known = lengths[last]
        learned = self.learned
        if learned is None or not learned.costs.can_choose() or len(learned.costs.layer_bytes) != len(layers):
            if lengths[0] == 0 and prompt >= _LONG and known * _FEW < prompt:
                return Choice(
                    0, f"reuse 0 of {known:,}: going on from so few takes longer than computing all {prompt:,}"
                )
            return Choice(last, f"reuse {known:,} of {known:,}: too little was measured yet")
        costs = learned.costs
        tiers = _Tiers(spans, tier_of)
        groups = _alike(layers, costs.layer_bytes)
        options = []
        for length in lengths:
            load: dict[str, int] = {}
            for layer, nbytes in groups:
                start = layer.missing_from(length, whole_from(length))
                for tier, tokens in tiers.tokens(start, length).items():
                    load[tier] = load.get(tier, 0) + tokens * nbytes
            if length in checkpoints:
                tier = tier_of(checkpoints[length])
                load[tier] = load.get(tier, 0) + costs.state_bytes
            options.append(Option(length, load))
        choice = choose(options, prompt, costs, layers=len(layers), overlapped=not self._on_cpu)
        choice = learned.exploration.adjust(options, choice)
        if choice.place != last:
            logger.info("load or recompute: %s", choice.reason)
        return choice

    def look_ahead(self, restore: Restore, choice: Choice | None, layers: int) -> None:
        """Sets how many layers of a load to a device are asked for at once, by what they are predicted to take."""
        if self._on_cpu or choice is None or not choice.load_seconds or not choice.compute_seconds:
            return
        load, compute = choice.load_seconds, choice.compute_seconds
        ahead = lookahead_depth(load / layers, compute / layers, layers)
        restore.look_ahead(max(ahead, read_buffer_layers(load, compute, layers)))

    # learning

    def begin_forward(self, history: int, new: int, elsewhere: float) -> None:
        """A forward of `new` tokens after `history` begins, one row of text.

        Args:
            elsewhere: seconds that were spent on loading and saving so far.
        """
        self._forward = None
        if new < 2 or self.learned is None:
            return
        event = None
        if not self._on_cpu:
            if self._cuda is None:
                return  # nobody can tell when a forward ends there
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._cuda))
        self._forward = history, new, time.perf_counter() - elsewhere, event

    def end_forward(self, elsewhere: float) -> None:
        """The forward has ended; `elsewhere` as in `begin_forward`, of now."""
        forward, self._forward = self._forward, None
        learned = self.learned
        if forward is None or learned is None:
            return
        history, new, began, event = forward
        if not learned.warm:
            learned.warm = True
            if event is None:
                learned.costs.observe_first(history, new, time.perf_counter() - elsewhere - began)
        elif event is not None:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record(torch.cuda.current_stream(self._cuda))
            self._events.append((history, new, event, ended))
        else:
            self._computed.append((history, new, time.perf_counter() - elsewhere - began))

    def loaded(self, restore: Restore) -> None:
        """A load has ended well."""
        learned = self.learned
        if learned is None:
            return
        tiers = {tier: nbytes for tier, nbytes in restore.load.stats.bytes_from.items() if nbytes}
        if not tiers:
            return
        opening = max(tiers, key=lambda tier: (tier != "memory", tiers[tier]))  # files are opened, blocks are there
        taken = restore.load.needed_from()
        for tier, nbytes in tiers.items():
            seconds = taken.get(tier, 0.0) + (restore.planning_seconds if tier == opening else 0.0)
            self._loaded.append((tier, nbytes, seconds))
        if restore.load.whole_bytes:
            learned.costs.state_bytes = restore.load.whole_bytes

    def end_turn(self, layers: Sequence[KeptLayer], store: AttentionStore | None) -> None:
        """The turn has ended: works out what was learned, and has the store remember it."""
        learned = self.learned
        if learned is None:
            return
        costs = learned.costs
        for history, new, event, ended in self._events:
            if ended.query():
                self._computed.append((history, new, event.elapsed_time(ended) / 1e3))
        for history, new, seconds in self._computed:
            costs.observe_prefill(history, new, seconds)
        for tier, nbytes, seconds in self._loaded:
            surprise = costs.observe_load(tier, nbytes, seconds)
            learned.exploration.loaded(tier, surprise=surprise)
        self._events, self._computed, self._loaded = [], [], []
        known = costs.layer_bytes
        if len(known) != len(layers) or not all(known):  # those of a fingerprint stay the same
            sizes = [_token_bytes(layer) for layer in layers]
            if any(sizes):
                costs.layer_bytes = sizes
        costs.refresh()
        if store is not None and costs.worth_keeping():
            store.set_note(note_name(self._fingerprint, self._label), learned.costs.to_json())


class _Tiers:
    """How many tokens of spans are in which tier."""

    def __init__(self, spans: Sequence[Span], tier_of: Callable[[bytes], str]) -> None:
        self._runs: list[tuple[int, int, str]] = []
        for span in spans:
            tier = tier_of(span.block)
            if self._runs and self._runs[-1][1:] == (span.first, tier):
                self._runs[-1] = (self._runs[-1][0], span.last, tier)
            else:
                self._runs.append((span.first, span.last, tier))

    def tokens(self, start: int, stop: int) -> dict[str, int]:
        """Tokens by tier of positions `[start, stop)`."""
        found: dict[str, int] = {}
        for first, last, tier in self._runs:
            count = min(last, stop) - max(first, start)
            if count > 0:
                found[tier] = found.get(tier, 0) + count
        return found


def _alike(layers: Sequence[KeptLayer], sizes: Sequence[int]) -> list[tuple[KeptLayer, int]]:
    """One of each set of layers that need the same positions, with the bytes of a token in all of them."""
    found: dict[tuple[Any, ...], tuple[KeptLayer, int]] = {}
    for layer, size in zip(layers, sizes, strict=True):
        if size:
            kind = (layer.window, layer.rows > 0, layer.first, layer.length)
            found[kind] = (layer, size + (found[kind][1] if kind in found else 0))
    return list(found.values())


def _token_bytes(layer: KeptLayer) -> int:
    """Bytes of one token's KV in a layer that holds some; 0 where nothing is kept by token."""
    if not layer.by_token or not layer.rows or layer.length <= layer.first:
        return 0
    return sum(tensor.nbytes for tensor in layer.piece(layer.length - 1, layer.length).values())
