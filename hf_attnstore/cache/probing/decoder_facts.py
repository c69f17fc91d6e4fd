"""What is to be known of a decoder before anything of it is kept, found out by asking it.

- Does it go on from its cache as if it had been given all tokens at once? Not every model of transformers does: some
  do not look back only, some take one token at a time, some count positions by the tokens that are no padding.
- Does it read the encoder's output only to make keys and values of it, once? If so, with these in its cache it can be
  given nothing but NaN instead and must compute the same logits, bit for bit; then the encoder need not run.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ...store.store import AttentionStore
from ..model.argument import as_forward_takes
from ..model.structure import decoder_config, encoder_of
from .known import Known

logger = logging.getLogger("hf_attnstore")

_POSITIONS = 6
_TOKENS = (5, 7, 6, 9)
_ALONE = 1
"""Tokens fed before the others, to see whether these go on from there."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""By dtype: how far KV and logits may be apart, relative to the largest, where rounding is all that differs."""


@dataclass(frozen=True)
class DecoderFacts:
    """What a decoder is like."""

    problem: str = ""
    """Why none of its KV can be kept; empty if it can."""
    counts_padding: bool = False
    """Whether padding tokens among its ids change what comes after them, so that these can't be kept."""
    width: int = 0
    """Width of the encoder's output, where that need not be there once its KV is; else 0."""


@dataclass
class _Output(BaseModelOutput):
    """An encoder's output with what mixtures of experts add to it."""

    router_logits: tuple[torch.FloatTensor] | None = None
    router_probs: tuple[torch.FloatTensor] | None = None


@dataclass
class _MaskedOutput(_Output):
    """An encoder's output that comes with a mask of its own, as some of speech do; here without."""

    attention_mask: torch.Tensor | None = None


def decoder_facts(model: nn.Module, fingerprint: str, like: torch.Tensor, store: AttentionStore | None) -> DecoderFacts:
    """What a model's decoder is like. Found out once for each fingerprint, by a few short forwards; the store remembers
    it beyond the process.

    Args:
        like: a tensor on the device, and of the dtype, that the encoder's output has.
    """
    return _KNOWN.of(fingerprint, store, partial(_ask, model, like))


def stand_in(facts: DecoderFacts, positions: int, like: torch.Tensor) -> BaseModelOutput | None:
    """What to pass as `encoder_outputs` in place of an output that is not read.

    Args:
        positions: of the output that it stands for.
        like: a tensor on the device, and of the dtype, that the output would have.

    Returns:
        An output `[1, positions, width]` of NaN; None where the model needs the real one.
    """
    return _unreadable(positions, facts.width, like) if facts.width else None


def _decoded(note: Mapping[str, Any]) -> DecoderFacts:
    return DecoderFacts(str(note["problem"]), bool(note["counts_padding"]), int(note["width"]))


_KNOWN: Known[DecoderFacts] = Known("", "decoder", 1, asdict, _decoded)
"""The version is to be raised when facts may change."""


@torch.no_grad()
def _ask(model: nn.Module, like: torch.Tensor) -> DecoderFacts:
    problem = f"the decoder of {type(model).__name__} can't be asked how it works"
    for width in _widths(model):
        try:
            difference = _difference(model, width, like, _TOKENS)
        except Exception as error:  # of another width, or a model that can't be called like this
            logger.debug("a decoder with an encoder's output of width %d failed: %r", width, error)
            problem = f"the decoder of {type(model).__name__} can't be asked how it works ({error})"
            continue
        if difference:
            return DecoderFacts(f"the decoder of {type(model).__name__} does not go on from its cache: {difference}")
        needed = not _needs_no_output(model, width, like)
        return DecoderFacts("", _counts_padding(model, width, like), 0 if needed else width)
    return DecoderFacts(problem)


def _widths(model: nn.Module) -> list[int]:
    """How wide the encoder's output may be."""
    encoder: Any = getattr(encoder_of(model), "config", None)
    found = []
    for part in (encoder, getattr(encoder, "text_config", None), model.config):
        for name in ("hidden_size", "d_model"):
            width = getattr(part, name, None)
            if isinstance(width, int) and width not in found:
                found.append(width)
    return found


def _empty_cache(model: nn.Module) -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(config=decoder_config(model).get_text_config(decoder=True)), DynamicCache())


def _random(width: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn((1, _POSITIONS, width), generator=torch.Generator().manual_seed(0)).to(like)


def _unreadable(positions: int, width: int, like: torch.Tensor) -> _Output:
    shape = (1, positions, width)
    return _Output(last_hidden_state=torch.full(shape, float("nan"), dtype=like.dtype, device=like.device))


def _logits(model: nn.Module, output: BaseModelOutput, cache: EncoderDecoderCache, ids: Sequence[int]) -> torch.Tensor:
    """Logits `[tokens]` after the last of `ids`."""
    assert output.last_hidden_state is not None
    output.last_hidden_state = output.last_hidden_state.clone()  # one model adds something to it in place
    fed = torch.tensor([list(ids)], device=output.last_hidden_state.device)
    named = as_forward_takes(model, cache)
    made = model(encoder_outputs=output, decoder_input_ids=fed, use_cache=True, return_dict=True, **named)
    logits: torch.Tensor = made.logits[0, -1]
    return logits


def _difference(model: nn.Module, width: int, like: torch.Tensor, ids: Sequence[int]) -> str:
    """What differs where tokens are fed one after the other, instead of at once; empty if nothing does."""
    output = _MaskedOutput(last_hidden_state=_random(width, like))
    at_once, in_turn = _empty_cache(model), _empty_cache(model)
    expected = _logits(model, output, at_once, ids)
    _logits(model, output, in_turn, ids[:_ALONE])
    try:
        found = _logits(model, output, in_turn, ids[_ALONE:])
    except Exception as error:
        return f"several tokens at once are too many for it ({error})" if str(error) else "it fails"
    pairs: list[tuple[str, Any, Any]] = [("logits", expected, found)]
    layers: list[tuple[Any, Any]] = list(
        zip(at_once.self_attention_cache.layers, in_turn.self_attention_cache.layers, strict=True)
    )
    for a, b in layers:
        if a.is_initialized and b.is_initialized:
            pairs += [("keys", a.keys, b.keys), ("values", a.values, b.values)]
    for name, first, second in pairs:
        if first.shape != second.shape or not _close(first, second):
            return f"its {name} are others when it is given its tokens one after the other"
    return ""


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    largest = float(a.float().abs().max())
    return float((a.float() - b.float()).abs().max()) <= _TOLERANCE.get(a.dtype, 0.0) * max(largest, 1e-6)


def _counts_padding(model: nn.Module, width: int, like: torch.Tensor) -> bool:
    pad = getattr(model.config, "pad_token_id", None)
    if not isinstance(pad, int) or pad < 0:
        return False
    return any(bool(_difference(model, width, like, ids)) for ids in ((pad, 5, 7, 6), (5, pad, 7, 6)))


def _needs_no_output(model: nn.Module, width: int, like: torch.Tensor) -> bool:
    cache = _empty_cache(model)
    try:
        _logits(model, _Output(last_hidden_state=_random(width, like)), cache, _TOKENS[:2])
        other = copy.deepcopy(cache)
        real = _logits(model, _Output(last_hidden_state=_random(width, like)), cache, _TOKENS[2:])
        nothing = _logits(model, _unreadable(_POSITIONS, width, like), other, _TOKENS[2:])
    except Exception as error:
        logger.debug("the output of the encoder of %s is needed: %r", type(model).__name__, error)
        return False
    return bool(torch.isfinite(real).all()) and torch.equal(real, nothing)
