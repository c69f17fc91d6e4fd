"""SequenceToSequenceCache: the cache of encoder-decoder models.

It holds two things: the decoder's own tokens, as any cache does, and the keys and values that the decoder makes of the
encoder's output. Both depend on what the encoder was given, so both are kept below roots that name its content: the
first as a chain of tokens, the second as a unit, which is of use as a whole or not at all.
"""

from typing import Any

import torch
from torch import nn

from ..errors import CacheUseError, LoadError
from ..store.store import AttentionStore
from .cache import device_of
from .inputs.encoder import EncoderInput
from .probing.decoder_facts import DecoderFacts, decoder_facts
from .seq2seq_forwards import Awaited, SequenceToSequenceForwards


class GenerateRunsAgainError(Exception):
    """A model's own `generate` decodes more than once, with an encoder's output that was left out. Never seen by
    users: the turn is begun again with the encoder."""


class SequenceToSequenceCache(SequenceToSequenceForwards):
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

    def _prepare_empty(self) -> None:
        super()._prepare_empty()
        self._wanted: bytes | None = None
        """The digest for which a turn is about to begin."""
        self._runs = 0

    # what `generate` and models see

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

    def begin_generation(self, given: EncoderInput, awaited: Awaited, unreadable: str = "") -> int:
        """Starts the turn of a `generate`, of which the decoder's prompt is known when its first forward comes.

        Args:
            awaited: what is known of the prompt by now.
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
                self._awaited = awaited
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

    def begin_unidentified_turn(self, reason: str, prompt_tokens: int = 0, **settings: bool) -> None:
        super().begin_unidentified_turn(reason, prompt_tokens, **settings)
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
