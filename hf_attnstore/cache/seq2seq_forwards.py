"""Forwards of a model with an encoder: what of them the cache's own forwards see, and whether they go on with the
encoder's input of those before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import CacheUseError
from .encoder_output import EncoderOutputCache
from .inputs.encoder import EncoderInput, content_digest, encoder_input, encoder_inputs, is_for_decoder
from .inputs.foreign import foreign_input, mask_problem, position_problem
from .model.argument import CACHE_NAMES

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


class SequenceToSequenceForwards(EncoderOutputCache):
    """A cache that follows the forwards of a model with an encoder."""

    def _prepare_empty(self) -> None:
        super()._prepare_empty()
        self._awaited: Awaited | None = None
        self._special: int | None = None
        """The padding token, where what comes after one can't be kept."""

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

    def _begin_prompt(self, named: Mapping[str, Any], awaited: Awaited) -> None:
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
            limit = 0 if awaited.whole else len(row) - 1
            self.begin_turn(row, limit=limit, new_tokens=awaited.new_tokens, checked=True)
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
