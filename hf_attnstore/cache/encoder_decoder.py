"""SequenceToSequenceCache: the cache of encoder-decoder models.

It holds two things: the decoder's own tokens, as any cache does, and the keys and values that the decoder makes of the
encoder's output. Both depend on what the encoder was given, so both are kept below roots that name its content: the
first as a chain of tokens, the second as a unit, which is of use as a whole or not at all.
"""

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache

from ..errors import CacheUseError, LoadError
from ..store.store import AttentionStore
from . import begin
from . import encoder_output as encoders
from .cache import AttentionStoreCache, one_row
from .encoder_output import CrossAttentionSide, EncoderOutput
from .inputs.encoder import EncoderInput, content_digest, encoder_input, encoder_inputs, is_for_decoder
from .inputs.foreign import foreign_input, mask_problem, position_problem
from .layers.by_token import FullLayer
from .layers.kept import KeptLayer
from .model.argument import CACHE_NAMES
from .model.structure import is_encoder_decoder
from .probing.decoder_facts import DecoderFacts
from .setup import Setup

_DECODER_NAMES = {
    "decoder_input_ids": "input_ids",
    "decoder_inputs_embeds": "inputs_embeds",
    "decoder_attention_mask": "attention_mask",
    "decoder_position_ids": "position_ids",
}
"""What a decoder's inputs are called in the model's forward, and what they are for the cache."""
_SHARED_NAMES = ("cache_position", *CACHE_NAMES)
_MASK = "attention_mask"


@dataclass(frozen=True)
class Awaited:
    """A `generate` whose prompt is known when its first forward comes."""

    prompt: int | None
    """How many of the first forward's tokens are the prompt; None for all, where there can't be drafts among them."""
    new_tokens: int
    """How many are expected on top."""
    whole: bool = False
    """Whether all of the prompt is to be computed, as something of every token is asked for."""


class GenerateRunsAgainError(Exception):
    """A model's own `generate` decodes more than once, with an encoder's output that was left out. Never seen by
    users: the turn is begun again with the encoder."""


class SelfAttentionSide(Cache):
    """The decoder's own tokens in a `SequenceToSequenceCache`: a view of its layers that holds nothing itself."""

    def __init__(self, owner: AttentionStoreCache) -> None:
        super().__init__(layers=owner.layers)  # type: ignore[arg-type]
        self._owner = weakref.ref(owner)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the KV of new tokens; see `AttentionStoreCache.update`."""
        owner = self._owner()
        assert owner is not None, "a forward with the cache keeps it alive"
        return owner.update(key_states, value_states, layer_idx, *args, **kwargs)


class SequenceToSequenceCache(
    AttentionStoreCache, EncoderDecoderCache, serves=lambda model, session: is_encoder_decoder(model)
):
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

    def __init__(
        self,
        model: nn.Module,
        session: str | None = None,
        store: AttentionStore | None = None,
        *,
        window: int | None = None,
        keep_first: int | None = None,
        drop: float = 0.0,
        record: bool = False,
        save: bool = True,
        wait: float = 0.0,
        gate: bool | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        if window is not None or keep_first:
            raise CacheUseError("encoder-decoder models have no window: leave out window and keep_first")
        if checkpoint_every is not None:
            raise CacheUseError("encoder-decoder models have no running states: leave out checkpoint_every")
        if isinstance(session, (list, tuple)):
            raise CacheUseError(
                "encoder-decoder models have no batches of conversations: make a cache for each session"
            )
        super().__init__(model, session, store, drop=0, record=record, save=save, wait=wait, gate=gate)

    def _begin_with(self, setup: Setup, layers: list[KeptLayer]) -> None:
        super()._begin_with(setup, layers)
        setup.parks = False  # the decoder's tokens are of use with what is kept of the encoder's output only
        self._self_side = SelfAttentionSide(self)
        self._attach_encoder(EncoderOutput(CrossAttentionSide([FullLayer() for _ in layers])))
        self._awaited: Awaited | None = None
        """What is known of the prompt of a `generate` that has begun, until its first forward comes."""
        self._runs = 0

    def _attach_encoder(self, encoder: EncoderOutput) -> None:
        self._encoder = self._held.encoder = encoder
        self.is_updated = encoder.is_updated

    # what `generate` and models see

    @property
    def self_attention_cache(self) -> SelfAttentionSide:  # type: ignore[override]
        """The decoder's own tokens."""
        return self._self_side

    @property  # type: ignore[override]
    def cross_attention_cache(self) -> CrossAttentionSide:
        """What the decoder keeps of the encoder's output."""
        return self._encoder.side

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
        if self.in_generate and self._runs > 1:
            self._begin_another_run()

    def check_dynamic_cache(self, method: str) -> None:
        """Everything that is defined for dynamic caches is defined here."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # before its first forward, nobody knows how much of a prompt will be reused: all of it is to be fed
        return 0 if self._awaited is not None else super().get_seq_length(layer_idx)

    def __repr__(self) -> str:
        return (
            f"AttentionStoreCache(session={self.session!r}, tokens={self._held.length}, layers={len(self.layers)}, "
            f"encoder_positions={self._encoder.side.positions})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionStoreCache":
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, SequenceToSequenceCache)
        own, copied = self._encoder, EncoderOutput(CrossAttentionSide(copy.deepcopy(self._encoder.side.layers, memo)))
        copied.is_updated = dict(own.is_updated)
        copied.digest, copied.given, copied.fingerprint = own.digest, dict(own.given), own.fingerprint
        twin._attach_encoder(copied)
        return twin

    def reset(self) -> None:
        with self._held.guard:
            super().reset()
            self._encoder.forget()

    # a loop of one's own

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
        ids = one_row(input_ids)
        self._inputs = {}
        reused = self._load_now(ids, len(ids) - 1, new_tokens, encoder=given.digest)
        own, turn = self._encoder, self._turn
        with self._held.guard:
            own.given = dict(given.parts)
            try:
                own.reused_positions = encoders.take_up(turn, own)
                encoders.finish(turn, own)
            except LoadError:
                own.clear()
            encoders.report(turn, own)
        return reused

    def resume(self) -> torch.Tensor:
        raise CacheUseError(
            "a session of an encoder-decoder model can't be resumed without the encoder's input: call match() with it"
        )

    # turns

    def begin_generation(self, given: EncoderInput, awaited: Awaited, unreadable: str = "") -> int:
        """Starts the turn of a `generate`, of which the decoder's prompt is known when its first forward comes.

        Args:
            awaited: what is known of the prompt by now.
            unreadable: why nothing is to be loaded, if so; nothing is saved then.

        Returns:
            Positions of the encoder's output whose KV is known; 0 if the encoder has to run.
        """
        self._acquire()
        with self._held.guard:
            turn, encoder = self._turn, self._encoder
            try:
                begin.open_turn(turn, given.digest)
                turn.checked = True
                self._runs = 0
                encoder.left_out = False
                if unreadable:
                    turn.untrack(unreadable)
                if turn.untracked:
                    encoder.forget()
                    self._held.clear()
                encoder.given = dict(given.parts) if encoder.digest else {}
                encoder.reused_positions = encoders.take_up(turn, encoder)
                self._awaited = awaited
            except BaseException:
                self._held.clear()
                encoder.clear()
                begin.release(turn)
                raise
            return encoder.reused_positions

    def leave_out_encoder(self) -> None:
        """The encoder does not run in this turn: what it would give is not read."""
        self._encoder.left_out = True

    @property
    def facts(self) -> DecoderFacts:
        """What the model's decoder is like, as it is now."""
        return encoders.facts_of(self.model, self._held)

    @property
    def encoder_sample(self) -> torch.Tensor:
        """A tensor on the device, and of the dtype, of what the encoder gives, of which the KV is known."""
        layer = self._encoder.side.layers[0]
        return torch.empty(0, dtype=layer.dtype, device=layer.device)

    def begin_unidentified_turn(self, reason: str, prompt_tokens: int = 0, **settings: bool) -> None:
        super().begin_unidentified_turn(reason, prompt_tokens, **settings)
        self._runs = 0
        self._encoder.left_out = False
        self._awaited = None
        self._encoder.forget()

    def abandon(self, error: LoadError | None = None) -> None:
        with self._held.guard:
            self._awaited = None
            super().abandon(error)

    def _begin_another_run(self) -> None:
        if self._encoder.left_out:
            raise GenerateRunsAgainError
        with self._held.guard:
            self._turn.forward = None
            self._awaited = None
            self._held.clear()
            self._encoder.forget()
            self._turn.untrack(
                "this model's generate decodes several times: only the first of them is one that can be kept"
            )

    def end_turn(self) -> None:
        with self._held.guard:
            self._awaited = None
            super().end_turn()

    # forwards

    def _begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        awaited, self._awaited = self._awaited, None
        if awaited is not None:
            self._begin_prompt(named, awaited)
        elif not self._turn.checked:
            if not self._turn.is_open:
                self._begin_own_turn()
            self._check_encoder(named)
        shown = {
            **{name: value for name, value in named.items() if is_for_decoder(name) and name not in _DECODER_NAMES},
            **{plain: named.get(name) for name, plain in _DECODER_NAMES.items()},
            **{name: named.get(name) for name in _SHARED_NAMES if name in named},
        }
        replaced = super()._begin_forward(shown)
        forward, cross = self._turn.forward, self._encoder.side
        if forward is not None and cross.rows not in (0, forward.rows):
            if cross.rows != 1:
                raise CacheUseError(f"the cache holds {cross.rows} rows, the forward has {forward.rows}")
            encoders.finish(self._turn, self._encoder)
            cross.batch_repeat_interleave(forward.rows)
        if not replaced:
            return None
        names = {plain: name for name, plain in _DECODER_NAMES.items()}
        return {names.get(name, name): value for name, value in replaced.items()}

    def _begin_prompt(self, named: Mapping[str, Any], awaited: Awaited) -> None:
        """The first forward of a `generate`: its ids are the prompt, in as many rows as are generated."""
        turn, held = self._turn, self._held
        ids = named.get("decoder_input_ids")
        if not turn.untracked:
            if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
                turn.untrack("the decoder's prompt is not given as ids [rows, tokens]")
            elif not bool((ids == ids[:1]).all()):
                turn.untrack("several rows that differ")
            else:
                self._check_prompt(named, ids.shape[1])
        if turn.untracked:
            held.clear()
            if not self._encoder.left_out:
                self._encoder.forget()
            turn.prompt_tokens = turn.stats.prompt_tokens = ids.shape[1] if isinstance(ids, torch.Tensor) else 0
        else:
            assert isinstance(ids, torch.Tensor)
            row: np.ndarray = ids[0, : awaited.prompt].detach().cpu().numpy()
            limit = 0 if awaited.whole else len(row) - 1
            try:
                begin.take_up_prompt(turn, self._parking, row, limit=limit, new_tokens=awaited.new_tokens)
            except BaseException:
                held.clear()  # half of what was planned may be in place
                raise
        encoders.report(turn, self._encoder)

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
        other_mask = seen != self._encoder.given.get(_MASK)
        problem = (
            (f"{foreign} are not identified by token ids" if foreign else None)
            or mask_problem(named.get("decoder_attention_mask"), count)
            or position_problem(named.get("decoder_position_ids"), 0, count)
            # prefilling in chunks cuts the encoder's mask as if it were the decoder's
            or ("the decoder is given another mask than the encoder" if other_mask else None)
        )
        if problem:
            self._turn.untrack(problem)

    def _identify_encoder(self, named: Mapping[str, Any]) -> EncoderInput:
        main = str(getattr(self.model, "main_input_name", "input_ids"))
        return encoder_input(encoder_inputs(self.model, (), named), main)

    def _check_encoder(self, named: Mapping[str, Any]) -> None:
        """In a loop of one's own: which encoder's input a forward is about, and whether it is that of those before."""
        turn, held, encoder = self._turn, self._held, self._encoder
        if held.length and turn.untracked:
            return
        given = self._identify_encoder(named)
        if encoder.given and not given.problem:
            other = encoders.other_than_before(encoder, given.parts, given.positions, _MASK)
            if not other:
                encoder.given = {**given.parts, **encoder.given}
                return
            if held.length and other == _MASK:
                turn.untrack("the encoder's mask is another than before")
                return
            if held.length:
                raise CacheUseError(
                    f"this forward's {other} are others than those that the cache holds KV of, which the decoder would "
                    "go on reading: call reset() before, or make another cache"
                )
        if not given.problem and not turn.untracked:
            encoders.attend_to(held, encoder, given.digest)
            encoder.given = dict(given.parts)
            return
        if given.problem:
            turn.untrack(given.problem)
        encoder.forget()
