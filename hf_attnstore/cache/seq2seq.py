"""SequenceToSequenceCache: the cache of encoder-decoder models.

It holds two things: the decoder's own tokens, as any cache does, and the keys and values that the decoder makes of the
encoder's output. Both depend on what the encoder was given, so both are kept below roots that name its content: the
first as a chain of tokens, the second as a unit, which is of use as a whole or not at all.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EncoderDecoderCache

from ..errors import CacheUseError, LoadError
from ..session.chain import TokenChain
from ..session.spans import total_tokens
from ..session.units import find_unit, unit_ids
from ..session.view import View
from ..store.keys import Key, chain_root, input_root
from ..store.store import AttentionStore
from .cache import AttentionStoreCache, device_of
from .cross import CrossAttentionSide, SelfAttentionSide
from .decoder_facts import DecoderFacts, decoder_facts
from .encoder_input import EncoderInput, content_digest, encoder_input, encoder_inputs, is_for_decoder
from .inputs import foreign_input, mask_problem, position_problem
from .layers import FullLayer
from .restore import Pace, Restore, plan_restore
from .saver import BlockSaver

_DECODER_NAMES = {
    "decoder_input_ids": "input_ids",
    "decoder_inputs_embeds": "inputs_embeds",
    "decoder_attention_mask": "attention_mask",
    "decoder_position_ids": "position_ids",
}
"""What a decoder's inputs are called in the model's forward, and what they are for the cache."""
_SHARED_NAMES = ("cache_position", "past_key_values")


_MASK = "attention_mask"


class GenerateRunsAgainError(Exception):
    """A model's own `generate` decodes more than once, with an encoder's output that was left out. Never seen by
    users: the turn is begun again with the encoder."""


@dataclass(frozen=True)
class _Awaited:
    """A `generate` whose prompt is known when its first forward comes."""

    prompt: int | None
    """How many of the first forward's tokens are the prompt; None for all, where there can't be drafts among them."""
    new_tokens: int


class SequenceToSequenceCache(AttentionStoreCache, EncoderDecoderCache):
    """What `AttentionStoreCache(model, …)` gives for a model with an encoder: an `EncoderDecoderCache` too.

    `generate` is called as ever, with all of the encoder's input, and all of the decoder's where it has any
    (`decoder_input_ids`). Where the encoder's input is known by content, what the decoder keeps of its output is
    loaded, and the encoder does not run, unless the decoder reads its output elsewhere too.

    Args:
        model, session, store, record, save, wait: see `AttentionStoreCache`. A session is the encoder's input and the
            decoder's tokens of its last turn. Nothing is ever dropped here, so `drop` has no effect.

    Raises:
        CacheUseError: a `window` or `keep_first` was given.
    """

    parks = False
    """The decoder's tokens are of use with what is kept of the encoder's output only."""

    def __init__(
        self,
        model: nn.Module,
        session: str | None = None,
        store: AttentionStore | None = None,
        *,
        window: int | None = None,
        keep_first: int = 0,
        drop: float = 0.0,
        record: bool = False,
        save: bool = True,
        wait: float = 0.0,
        gate: bool | None = None,
    ) -> None:
        if window is not None or keep_first:
            raise CacheUseError("encoder-decoder models have no window: leave out window and keep_first")
        super().__init__(model, session, store, drop=0, record=record, save=save, wait=wait, gate=gate)

    def _prepare_empty(self) -> None:
        super()._prepare_empty()
        self._self_side = SelfAttentionSide(self)
        self._cross_side = CrossAttentionSide([FullLayer() for _ in self.layers])
        self.is_updated: dict[int, bool] = dict.fromkeys(range(len(self.layers)), False)
        """Which layers hold what they need of the encoder's output; the model's layers read and set it."""
        self._digest = b""
        """Of the encoder's input; empty where it has none, and then nothing is reused or kept."""
        self._wanted: bytes | None = None
        """The digest for which a turn is about to begin."""
        self._given: dict[str, bytes] = {}
        """Digests of the parts of the encoder's input, as far as they were given."""
        self._awaited: _Awaited | None = None
        self._special: int | None = None
        """The padding token, where what comes after one can't be kept."""
        self._runs = 0
        self._left_out = False
        self._encoder_pace = Pace()
        self._encoder_restore: Restore | None = None
        self._encoder_blocks: tuple[Key, ...] = ()
        """Where the store has what is held of the encoder's output."""
        self._reused_positions = 0

    # what `generate` and models see

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

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # transformers sets this once at the beginning of every decoding: a model's own `generate` may have several
        self._runs += 1
        if self._in_turn and self._checked and self._runs > 1:
            self._begin_another_run()

    def check_dynamic_cache(self, method: str) -> None:
        """Everything that is defined for dynamic caches is defined here."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # before its first forward, nobody knows how much of a prompt will be reused: all of it is to be fed
        return 0 if self._awaited is not None else super().get_seq_length(layer_idx)

    def __repr__(self) -> str:
        return (
            f"AttentionStoreCache(session={self.session!r}, tokens={self._held}, layers={len(self.layers)}, "
            f"encoder_positions={self._cross_side.positions})"
        )

    def match(self, input_ids: torch.Tensor, new_tokens: int = 0, **encoder: Any) -> int:
        """Loads what is known of a decoder's tokens, for a loop of one's own.

        Args:
            input_ids: `[1, tokens]`, all of the decoder's tokens so far.
            new_tokens: how many more are to be generated.
            encoder: what the encoder is given, by the names of the model's forward (`input_ids` as `inputs`), with its
                mask; or `encoder_outputs`.

        Returns:
            The number of leading tokens that are in the cache, at most `tokens - 1`: feed the model the rest, with
            the same encoder's input.

        Raises:
            CacheUseError: the encoder's input has no content to go by.
            SessionBusyError: another turn is running on the session.
        """
        given = self._identify_encoder(encoder)
        if given.problem:
            raise CacheUseError(f"nothing can be matched for this encoder's input: {given.problem}")
        self.save()
        self._wanted = given.digest
        reused = super().match(input_ids, new_tokens)
        with self._guard:
            self._given = dict(given.parts)
            try:
                self._reused_positions = self._take_up_encoder()
                self._finish_encoder()
            except LoadError:
                self._clear_encoder()
            self._report_encoder()
        return reused

    def resume(self) -> torch.Tensor:
        raise CacheUseError(
            "a session of an encoder-decoder model can't be resumed without the encoder's input: call match() with it"
        )

    # turns

    def begin_generation(self, given: EncoderInput, prompt: int | None, new_tokens: int, unreadable: str = "") -> int:
        """Starts the turn of a `generate`, of which the decoder's prompt is known when its first forward comes.

        Args:
            prompt: how many of the first forward's tokens are the prompt; None for all of them.
            new_tokens: how many are expected on top.
            unreadable: why nothing is to be loaded, if so; nothing is saved then.

        Returns:
            Positions of the encoder's output whose KV is known; 0 if the encoder has to run.
        """
        self._acquire()
        with self._guard:
            try:
                self._wanted = given.digest
                self._open()
                self._checked = True
                self._runs = 0
                self._left_out = False
                if unreadable:
                    self._untrack(unreadable)
                if self._untracked:
                    self._forget_encoder()
                    self._clear()
                self._given = dict(given.parts) if self._digest else {}
                self._reused_positions = self._take_up_encoder()
                self._awaited = _Awaited(prompt, new_tokens)
            except BaseException:
                self._clear()
                self._clear_encoder()
                self._close_turn()
                raise
            return self._reused_positions

    def leave_out_encoder(self) -> None:
        """The encoder does not run in this turn: what it would give is not read."""
        self._left_out = True

    @property
    def facts(self) -> DecoderFacts:
        """What the model's decoder is like, as it is now."""
        dtype: torch.dtype = getattr(self._model, "dtype", torch.float32)
        like = torch.empty(0, dtype=dtype, device=device_of(self._model))
        return decoder_facts(self._model, self._fingerprint, like, self._store)

    @property
    def encoder_sample(self) -> torch.Tensor:
        """A tensor on the device, and of the dtype, of what the encoder gives, of which the KV is known."""
        layer = self._cross_side.layers[0]
        return torch.empty(0, dtype=layer.dtype, device=layer.device)

    def begin_unidentified_turn(self, reason: str, prompt_tokens: int = 0, *, expected: bool = False) -> None:
        super().begin_unidentified_turn(reason, prompt_tokens, expected=expected)
        self._runs = 0
        self._left_out = False
        self._awaited = None
        self._forget_encoder()

    def abandon(self, error: LoadError) -> None:
        with self._guard:
            self._awaited = None
            self._clear_encoder()
            super().abandon(error)

    def abandon_run(self) -> None:
        """The turn is to be begun again, though nothing was wrong with what was loaded."""
        with self._guard:
            self._awaited = None
            self._forward = None
            self._clear_encoder()
            self._clear()
            self._reopening = True

    def _begin_another_run(self) -> None:
        if self._left_out:
            raise GenerateRunsAgainError
        with self._guard:
            self._forward = None
            self._awaited = None
            self._clear()
            self._forget_encoder()
            self._untrack("this model's generate decodes several times: only the first of them is one that can be kept")

    def end_turn(self) -> None:
        with self._guard:
            self._awaited = None
            super().end_turn()

    def reset(self) -> None:
        with self._guard:
            super().reset()
            self._forget_encoder()

    def _identify(self) -> None:
        before = self._fingerprint
        super()._identify()
        if before != self._fingerprint:
            self._forget_encoder()
        wanted, self._wanted = self._wanted, None
        if not self._untracked:
            config: Any = self._model.config
            facts = self.facts
            self._special = int(config.pad_token_id) if facts.counts_padding else None
            if facts.problem:
                self._untrack(facts.problem)
        if self._untracked:
            self._forget_encoder()
        elif wanted is not None:
            self._attend_to(wanted)

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

    # the encoder's output

    def _encoder_root(self) -> Key:
        secret = self._store.secret if self._store is not None else b""
        return input_root(self._model_root(), "encoder", self._digest, secret)

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
            load = restore.load.stats
            stats = self._stats
            stats.loaded_bytes += load.bytes
            stats.load_seconds += load.seconds
            stats.exposed_load_seconds += restore.exposed_seconds
            tiers = dict(stats.blocks_from)
            for tier, count in load.blocks_from.items():
                tiers[tier] = tiers.get(tier, 0) + count
            stats.blocks_from = tiers
        self._from_disk = [*self._from_disk, *restore.load.from_disk]

    def _finish_restore(self) -> None:
        super()._finish_restore()
        self._finish_encoder()

    def _settle(self, *, keep_load: bool = False) -> None:
        super()._settle(keep_load=keep_load)
        if self._encoder_restore is None and not self._encoder_is_held():
            self._clear_encoder()  # a forward failed before all layers had theirs

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

    # forwards

    def _begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        awaited, self._awaited = self._awaited, None
        if awaited is not None:
            self._begin_prompt(named, awaited)
        elif not self._checked:
            if not self._in_turn:
                self._begin_own_turn()
            self._check_encoder(named)
        shown = {
            **{name: value for name, value in named.items() if is_for_decoder(name) and name not in _DECODER_NAMES},
            **{plain: named.get(name) for name, plain in _DECODER_NAMES.items()},
            **{name: named.get(name) for name in _SHARED_NAMES if name in named},
        }
        replaced = super()._begin_forward(shown)
        forward, cross = self._forward, self._cross_side
        if forward is not None and cross.rows not in (0, forward.rows):
            if cross.rows != 1:
                raise CacheUseError(f"the cache holds {cross.rows} rows, the forward has {forward.rows}")
            self._finish_encoder()
            cross.batch_repeat_interleave(forward.rows)
        if not replaced:
            return None
        names = {plain: name for name, plain in _DECODER_NAMES.items()}
        return {names.get(name, name): value for name, value in replaced.items()}

    def _begin_prompt(self, named: Mapping[str, Any], awaited: _Awaited) -> None:
        """The first forward of a `generate`: its ids are the prompt, in as many rows as are generated."""
        ids = named.get("decoder_input_ids")
        if not self._untracked:
            if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
                self._untrack("the decoder's prompt is not given as ids [rows, tokens]")
            elif not bool((ids == ids[:1]).all()):
                self._untrack("several rows that differ")
            else:
                self._check_prompt(named, ids.shape[1])
        if self._untracked:
            self._clear()
            if not self._left_out:
                self._forget_encoder()
            self._prompt_tokens = self._stats.prompt_tokens = ids.shape[1] if isinstance(ids, torch.Tensor) else 0
        else:
            assert isinstance(ids, torch.Tensor)
            row: np.ndarray = ids[0, : awaited.prompt].detach().cpu().numpy()
            self._reopening = True  # the turn has begun already, only its prompt was not known
            self.begin_turn(row, limit=len(row) - 1, new_tokens=awaited.new_tokens, checked=True)
        self._report_encoder()

    def _check_prompt(self, named: Mapping[str, Any], count: int) -> None:
        """Untracks a prompt that its ids do not identify: a model's own `generate` may mask some of it."""
        others = {
            name: value
            for name, value in named.items()
            if is_for_decoder(name)
            and name not in ("decoder_input_ids", "decoder_attention_mask", "decoder_position_ids")
        }
        foreign = foreign_input(others)
        mask = named.get(_MASK)
        seen = content_digest(mask[:1]) if isinstance(mask, torch.Tensor) else None
        problem = (
            (f"{foreign} are not identified by token ids" if foreign else None)
            or mask_problem(named.get("decoder_attention_mask"), count)
            or position_problem(named.get("decoder_position_ids"), 0, count)
            # prefilling in chunks cuts the encoder's mask as if it were the decoder's
            or ("the decoder is given another mask than the encoder" if seen != self._given.get(_MASK) else None)
        )
        if problem:
            self._untrack(problem)

    def _track(self, ids: torch.Tensor | None, rows: int, count: int, named: Mapping[str, Any]) -> None:
        if self._special is not None and not self._untracked and ids is not None and bool((ids == self._special).any()):
            self._untrack("padding tokens among the decoder's ids, which this model does not count as positions")
        super()._track(ids, rows, count, named)

    def _end_forward(self) -> None:
        super()._end_forward()
        self._finish_encoder()

    def before_layer(self, number: int) -> None:
        super().before_layer(number)
        if self._encoder_restore is not None:
            self._encoder_restore.before_layer(number)

    def _identify_encoder(self, named: Mapping[str, Any]) -> EncoderInput:
        main = str(getattr(self._model, "main_input_name", "input_ids"))
        return encoder_input(encoder_inputs(self._model, (), named), main)

    def _check_encoder(self, named: Mapping[str, Any]) -> None:
        """In a loop of one's own: which encoder's input a forward is about, and whether it is that of those before."""
        if self._held and self._untracked:
            return
        given = self._identify_encoder(named)
        if self._given and not given.problem:
            other = self._other_than_before(given)
            if not other:
                self._given = {**given.parts, **self._given}
                return
            if self._held and other == _MASK:
                self._untrack("the encoder's mask is another than before")
                return
            if self._held:
                raise CacheUseError(
                    f"this forward's {other} are others than those that the cache holds KV of, which the decoder would "
                    "go on reading: call reset() before, or make another cache"
                )
        if not given.problem and not self._untracked:
            self._attend_to(given.digest)
            self._given = dict(given.parts)
            return
        if given.problem:
            self._untrack(given.problem)
        self._forget_encoder()

    def _other_than_before(self, given: EncoderInput) -> str:
        """The name of a part of the encoder's input that is not as before; empty if there is none. That an input and
        an output belong together can be seen from their length only."""
        parts = given.parts
        for name, digest in parts.items():
            if name != _MASK and self._given.get(name, digest) != digest:
                return name
        if not any(name in self._given for name in parts if name != _MASK) and given.positions not in (
            None,
            self._cross_side.positions,
        ):
            return "encoder_outputs"
        return _MASK if parts.get(_MASK) != self._given.get(_MASK) else ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionStoreCache":
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, SequenceToSequenceCache)
        twin._cross_side = CrossAttentionSide([copy.deepcopy(layer, memo) for layer in self._cross_side.layers])
        twin.is_updated = dict(self.is_updated)
        twin._digest, twin._given = self._digest, dict(self._given)
        return twin
