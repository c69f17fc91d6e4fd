"""What a cache holds of an encoder's output: the keys and values that the decoder makes of it.

They depend on all that the encoder was given, and are of use as a whole or not at all: they are kept as a unit, below
a root that names the encoder's input by content. The decoder's own tokens have a root like that, too.
"""

import copy
from typing import Any

import torch
from transformers import EncoderDecoderCache

from ..errors import LoadError
from ..session.chain import TokenChain
from ..session.spans import total_tokens
from ..session.units import find_unit, unit_ids
from ..session.view import View
from ..store.blocks.keys import Key, chain_root, input_root
from .cache import AttentionStoreCache
from .cross import CrossAttentionSide, SelfAttentionSide
from .layers.by_token import FullLayer
from .transfer.load import Pace, Restore, plan_restore
from .transfer.save import BlockSaver


class EncoderOutputCache(AttentionStoreCache, EncoderDecoderCache):
    """A cache that holds what a decoder makes of its encoder's output too."""

    parks = False
    """The decoder's tokens are of use with what is kept of the encoder's output only."""

    def _prepare_empty(self) -> None:
        super()._prepare_empty()
        self._self_side = SelfAttentionSide(self)
        self._cross_side = CrossAttentionSide([FullLayer() for _ in self.layers])
        self.is_updated: dict[int, bool] = dict.fromkeys(range(len(self.layers)), False)
        """Which layers hold what they need of the encoder's output; the model's layers read and set it."""
        self._digest = b""
        """Of the encoder's input; empty where it has none, and then nothing is reused or kept."""
        self._given: dict[str, bytes] = {}
        """Digests of the parts of the encoder's input, as far as they were given."""
        self._left_out = False
        self._encoder_pace = Pace()
        self._encoder_restore: Restore | None = None
        self._encoder_blocks: tuple[Key, ...] = ()
        """Where the store has what is held of the encoder's output."""
        self._reused_positions = 0

    @property
    def self_attention_cache(self) -> SelfAttentionSide:  # type: ignore[override]
        """The decoder's own tokens."""
        return self._self_side

    @property  # type: ignore[override]
    def cross_attention_cache(self) -> CrossAttentionSide:
        """What the decoder keeps of the encoder's output."""
        return self._cross_side

    @cross_attention_cache.setter
    def cross_attention_cache(self, other: Any) -> None:
        """T5Gemma's `generate` puts an empty one without sliding windows in its place; this one has none."""

    # which encoder's input

    def _attend_to(self, digest: bytes) -> None:
        """From now on what is held, and kept, is that of this encoder's input."""
        secret = self._store.secret if self._store is not None else b""
        self._see_through(View.plain(input_root(self._model_root(), "decoder", digest, secret), secret))
        if digest != self._digest:
            self._forget_encoder()
            self._digest = digest

    def _model_root(self) -> Key:
        if self._store is not None:
            return self._store.root(self._fingerprint)
        return chain_root(self._fingerprint, "")

    def _encoder_root(self) -> Key:
        secret = self._store.secret if self._store is not None else b""
        return input_root(self._model_root(), "encoder", self._digest, secret)

    # what is held

    def _encoder_is_held(self) -> bool:
        return bool(self._cross_side.positions) and all(self.is_updated.values())

    def _clear_encoder(self) -> None:
        """Lets go of what is held of the encoder's output."""
        if self._encoder_restore is not None:
            self._encoder_restore.abandon()
            self._encoder_restore = None
        for layer in self._cross_side.layers:
            layer.reset()
        for number in self.is_updated:
            self.is_updated[number] = False
        self._encoder_blocks = ()
        self._reused_positions = 0

    def _forget_encoder(self) -> None:
        self._clear_encoder()
        self._digest = b""
        self._given = {}

    def reset(self) -> None:
        with self._guard:
            super().reset()
            self._forget_encoder()

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionStoreCache":
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, EncoderOutputCache)
        twin._cross_side = CrossAttentionSide([copy.deepcopy(layer, memo) for layer in self._cross_side.layers])
        twin.is_updated = dict(self.is_updated)
        twin._digest, twin._given = self._digest, dict(self._given)
        return twin

    # loading

    def _take_up_encoder(self) -> int:
        """Gets what is known of the encoder's output into the layers, or on its way there. Returns its positions; 0 if
        the encoder has to run."""
        cross = self._cross_side
        if not self._digest:
            return 0
        if self.rows > 1 or cross.rows > 1:
            self.batch_select_indices(torch.tensor([0]))
        if self._encoder_is_held():
            return cross.positions
        self._clear_encoder()
        if self._store is None:
            return 0
        failures = self._store.failures
        spans = find_unit(self._encoder_root(), self._chain.block_size, self._store)
        positions = total_tokens(spans)
        if self._store.failures != failures:
            self._note("a load failed, the encoder runs again: a block could not be read", "load failed")
        if not positions:
            return 0
        try:
            restore = plan_restore(
                cross.layers, self._attachment.devices, spans, positions, positions, self._store, self._encoder_pace
            )
        except LoadError as error:
            self._note(f"a load failed, the encoder runs again: {error}", "load failed")
            self._clear_encoder()
            return 0
        self._encoder_restore = self._watched(restore)
        if restore is not None:
            restore.start()
        for number in self.is_updated:
            self.is_updated[number] = True
        self._encoder_blocks = tuple(span.block for span in spans)
        return positions

    def _finish_encoder(self) -> None:
        restore, self._encoder_restore = self._encoder_restore, None
        if restore is None:
            return
        try:
            restore.finish()
        except BaseException:
            self._clear_encoder()
            raise
        finally:
            self._stats.add_load(restore.load.stats, restore.exposed_seconds)
        self._from_disk = [*self._from_disk, *restore.load.from_disk]

    def _finish_restore(self) -> None:
        super()._finish_restore()
        self._finish_encoder()

    def _settle(self, *, keep_load: bool = False) -> None:
        super()._settle(keep_load=keep_load)
        if self._encoder_restore is None and not self._encoder_is_held():
            self._clear_encoder()  # a forward failed before all layers had theirs

    def before_layer(self, number: int) -> None:
        super().before_layer(number)
        if self._encoder_restore is not None:
            self._encoder_restore.before_layer(number)

    def _end_forward(self) -> None:
        super()._end_forward()
        self._finish_encoder()

    def _report_encoder(self) -> None:
        self._stats.encoder_reused = self._reused_positions
        self._stats.encoder_skipped = self._left_out

    # saving

    def _hand_over(self) -> None:
        try:
            self._finish_encoder()
        except LoadError as error:
            self._note(f"a load failed, the encoder runs again: {error}", "load failed")
        nbytes, seconds = self._save_encoder()
        super()._hand_over()
        self._stats.saved_bytes += nbytes
        self._stats.save_seconds += seconds

    def _save_encoder(self) -> tuple[int, float]:
        """Hands over what is held of the encoder's output, unless the store has it. Returns bytes and seconds."""
        positions = self._cross_side.positions
        if self._store is None or self._saver is None or not self._digest or not self._encoder_is_held():
            return 0, 0.0
        size = self._chain.block_size
        chain = TokenChain(self._encoder_root(), size, unit_ids(positions, size), secret=self._store.secret)
        keys = tuple(chain.key(number) for number in range(-(-positions // size)))
        if self._store.known(keys) == len(keys):
            self._encoder_blocks = keys
            return 0, 0.0
        saver = BlockSaver(self._cross_side.layers, chain, self._store, self._fingerprint)
        saver.begin_turn(0, None)
        self._encoder_blocks = keys if saver.finish(positions) == positions else ()
        saver.release()
        return saver.saved_bytes, saver.seconds

    def _blocks_beside(self) -> tuple[Key, ...]:
        return self._encoder_blocks

    def _commit(self, tokens: int) -> None:
        super()._commit(tokens)
        if self._store is not None and self._encoder_blocks:
            self._store.touch(self._encoder_blocks)
