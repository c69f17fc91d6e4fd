"""What is held of an encoder's output: the keys and values that the decoder makes of it.

They depend on all that the encoder was given, and are of use as a whole or not at all: they are kept as a unit, below
a root that names the encoder's input by content. The decoder's own tokens have a root like that, too.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache

from ..errors import LoadError
from ..session.chain import TokenChain
from ..session.spans import total_tokens
from ..session.units import find_unit, unit_ids
from ..session.view import View
from ..store.blocks.keys import Key, input_root
from .layers.by_token import FullLayer
from .model.structure import device_of
from .probing.decoder_facts import DecoderFacts, decoder_facts
from .transfer.load import Pace, Restore, plan_restore
from .transfer.save import BlockSaver

if TYPE_CHECKING:
    from .held import Held
    from .turn import Turn


class CrossAttentionSide(Cache):
    """Keys and values of the encoder's output, each `[batch, heads, positions, dim]`, in all layers or none."""

    layers: list[FullLayer]  # type: ignore[assignment]

    def __init__(self, layers: Sequence[FullLayer] = (), **_: Any) -> None:
        # some models make an empty one of the same class, with settings for layers that are no concern of ours
        super().__init__(layers=list(layers))

    @property
    def positions(self) -> int:
        """Positions of the encoder's output that every layer holds; 0 where any of them lacks them."""
        lengths = {layer.length for layer in self.layers}
        return lengths.pop() if len(lengths) == 1 else 0

    @property
    def rows(self) -> int:
        """The batch size; 0 if nothing is held."""
        return self.layers[0].rows if self.layers else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets what a layer holds of the encoder's output, each `[batch, heads, positions, dim]`."""
        layer = self.layers[layer_idx]
        layer.reset()  # a forward that failed half-way may have left something
        return layer.update(key_states, value_states)


class EncoderOutput:
    """The second part of what the cache of a model with an encoder holds."""

    def __init__(self, side: CrossAttentionSide) -> None:
        self.side = side
        self.is_updated: dict[int, bool] = dict.fromkeys(range(len(side.layers)), False)
        """Which layers hold what they need of the encoder's output; the model's layers read and set it."""
        self.digest = b""
        """Of the encoder's input; empty where it has none, and then nothing is reused or kept."""
        self.given: dict[str, bytes] = {}
        """Digests of the parts of the encoder's input, as far as they were given."""
        self.left_out = False
        """Whether the encoder does not run in this turn: what it would give is not read."""
        self.pace = Pace()
        self.load: Restore | None = None
        self.blocks: tuple[Key, ...] = ()
        """Where the store has what is held of the encoder's output."""
        self.reused_positions = 0
        self.fingerprint = ""
        """Of the model that what is held belongs to."""
        self.special: int | None = None
        """The decoder's padding token, where what comes after one can't be kept."""

    @property
    def is_held(self) -> bool:
        """Whether all layers hold what they need."""
        return bool(self.side.positions) and all(self.is_updated.values())

    def clear(self) -> None:
        """Lets go of what is held of the encoder's output."""
        if self.load is not None:
            self.load.abandon()
            self.load = None
        for layer in self.side.layers:
            layer.reset()
        for number in self.is_updated:
            self.is_updated[number] = False
        self.blocks = ()
        self.reused_positions = 0

    def forget(self) -> None:
        """Lets go of it, and of which encoder's input that was."""
        self.clear()
        self.digest = b""
        self.given = {}

    def settle(self) -> None:
        """Lets go of what a forward left that failed before all layers had theirs."""
        if self.load is None and not self.is_held:
            self.clear()

    def before_layer(self, number: int) -> None:
        """A decoder layer is about to compute."""
        if self.load is not None:
            self.load.before_layer(number)


def attend_to(held: "Held", encoder: EncoderOutput, digest: bytes) -> None:
    """From now on what is held, and kept, is that of this encoder's input."""
    held.see_through(View.plain(input_root(held.model_root, "decoder", digest, held.secret), held.secret))
    if digest != encoder.digest:
        encoder.forget()
        encoder.digest = digest


def _root(held: "Held", encoder: EncoderOutput) -> Key:
    return input_root(held.model_root, "encoder", encoder.digest, held.secret)


def facts_of(model: nn.Module, held: "Held") -> DecoderFacts:
    """What the model's decoder is like, as it is now."""
    dtype: torch.dtype = getattr(model, "dtype", torch.float32)
    like = torch.empty(0, dtype=dtype, device=device_of(model))
    return decoder_facts(model, held.fingerprint, like, held.setup.store)


def identify(turn: "Turn", encoder: EncoderOutput, digest: bytes | None) -> None:
    """Makes sure that what is held belongs to the model, and to the encoder's input where its digest is known."""
    setup, held = turn.setup, turn.held
    if encoder.fingerprint != held.fingerprint:
        encoder.fingerprint = held.fingerprint
        encoder.forget()
    if not turn.untracked:
        facts = facts_of(setup.model, held)
        config: Any = setup.model.config
        encoder.special = int(config.pad_token_id) if facts.counts_padding else None
        if facts.problem:
            turn.untrack(facts.problem)
    if turn.untracked:
        encoder.forget()
    elif digest is not None:
        attend_to(held, encoder, digest)


def take_up(turn: "Turn", encoder: EncoderOutput) -> int:
    """Gets what is known of the encoder's output into the layers, or on its way there. Returns its positions; 0 if the
    encoder has to run."""
    setup, held, cross = turn.setup, turn.held, encoder.side
    if not encoder.digest:
        return 0
    if held.rows > 1 or cross.rows > 1:
        held.select_rows(torch.tensor([0]))
    if encoder.is_held:
        return cross.positions
    encoder.clear()
    store = setup.store
    if store is None:
        return 0
    failures = store.failures
    spans = find_unit(_root(held, encoder), held.chain.block_size, store)
    positions = total_tokens(spans)
    if store.failures != failures:
        turn.note("a load failed, the encoder runs again: a block could not be read", "load failed")
    if not positions:
        return 0
    try:
        load = plan_restore(cross.layers, setup.attachment.devices, spans, positions, positions, store, encoder.pace)
    except LoadError as error:
        turn.note(f"a load failed, the encoder runs again: {error}", "load failed")
        encoder.clear()
        return 0
    if load is not None:
        encoder.load = turn.as_wanted(load)
        load.start()
    for number in encoder.is_updated:
        encoder.is_updated[number] = True
    encoder.blocks = tuple(span.block for span in spans)
    return positions


def finish(turn: "Turn", encoder: EncoderOutput) -> None:
    """Waits for what is on its way of the encoder's output.

    Raises:
        LoadError: it will not come. Nothing of it is held then.
    """
    load, encoder.load = encoder.load, None
    if load is None:
        return
    try:
        load.finish()
    except BaseException:
        encoder.clear()
        raise
    finally:
        turn.stats.add_load(load.load.stats, load.exposed_seconds)
    turn.from_disk = [*turn.from_disk, *load.load.from_disk]


def report(turn: "Turn", encoder: EncoderOutput) -> None:
    """Says what was reused of the encoder's output."""
    turn.stats.encoder_reused = encoder.reused_positions
    turn.stats.encoder_skipped = encoder.left_out


def hand_over(turn: "Turn", encoder: EncoderOutput) -> None:
    """Gives the store what is held of the encoder's output, unless it has it."""
    try:
        finish(turn, encoder)
    except LoadError as error:
        turn.note(f"a load failed, the encoder runs again: {error}", "load failed")
    held, store, positions = turn.held, turn.setup.store, encoder.side.positions
    if store is None or held.saver is None or not encoder.digest or not encoder.is_held:
        return
    size = held.chain.block_size
    chain = TokenChain(_root(held, encoder), size, unit_ids(positions, size), secret=store.secret)
    keys = tuple(chain.key(number) for number in range(-(-positions // size)))
    if all(map(store.has, keys)):
        encoder.blocks = keys
        return
    saver = BlockSaver(encoder.side.layers, chain, store, held.fingerprint)
    saver.begin_turn(0, None)
    encoder.blocks = keys if saver.finish(positions) == positions else ()
    saver.release()
    turn.stats.saved_bytes += saver.saved_bytes
    turn.stats.save_seconds += saver.seconds


def other_than_before(encoder: EncoderOutput, parts: Mapping[str, bytes], positions: int | None, mask: str) -> str:
    """Name of the first argument of the encoder whose digest is not that of the forward before, or "".

    If one forward brought the raw input and the other the encoder's output, only their lengths can be compared.

    Args:
        parts: digests by argument.
        positions: of the encoder's output, if that was given.
        mask: the name of the mask among them, which is compared last.
    """
    for name, digest in parts.items():
        if name != mask and encoder.given.get(name, digest) != digest:
            return name
    knows = any(name in encoder.given for name in parts if name != mask)
    if not knows and positions not in (None, encoder.side.positions):
        return "encoder_outputs"
    return mask if parts.get(mask) != encoder.given.get(mask) else ""
