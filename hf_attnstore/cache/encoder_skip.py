"""Leaving out the encoder where its keys and values are known.

The decoder of an encoder-decoder reads the encoder's output to make keys and values of it, once. Whether it reads it
anywhere else is not known of a model, so it is asked: with its cross attention's KV in the cache, a decoder that is
given nothing but NaN for the encoder's output must compute the same logits, bit for bit.
"""

import copy
import logging
import threading
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from .structure import decoder_config, encoder_of

logger = logging.getLogger("hf_attnstore")

_POSITIONS = 6
_TOKENS = (1, 2)
_probing = threading.Lock()
_sizes: dict[str, int] = {}
"""By fingerprint: the width of the encoder's output where it need not be there, 0 where it must be."""


def stand_in(model: nn.Module, fingerprint: str, positions: int, like: torch.Tensor) -> BaseModelOutput | None:
    """What to pass as `encoder_outputs` in place of an output that is not read.

    Args:
        positions: of the output that it stands for.
        like: a tensor on the device, and of the dtype, that the output would have.

    Returns:
        An output `[1, positions, width]` of NaN; None where the model needs the real one.
    """
    with _probing:
        if fingerprint not in _sizes:
            _sizes[fingerprint] = _probe(model, like)
        width = _sizes[fingerprint]
    return _unreadable(positions, width, like) if width else None


def _unreadable(positions: int, width: int, like: torch.Tensor) -> BaseModelOutput:
    shape = (1, positions, width)
    return BaseModelOutput(last_hidden_state=torch.full(shape, float("nan"), dtype=like.dtype, device=like.device))


def _widths(model: nn.Module) -> list[int]:
    """How wide the encoder's output may be."""
    config: Any = model.config
    encoder: Any = getattr(encoder_of(model), "config", None)
    found = []
    for part in (encoder, getattr(encoder, "text_config", None), getattr(config, "encoder", None), config):
        for name in ("hidden_size", "d_model"):
            width = getattr(part, name, None)
            if isinstance(width, int) and width not in found:
                found.append(width)
    return found


@torch.no_grad()
def _probe(model: nn.Module, like: torch.Tensor) -> int:
    """The width of the encoder's output if the decoder does not read it once its KV is there, else 0."""
    for width in _widths(model):
        try:
            same = _reads_nothing(model, width, like)
        except Exception as error:  # a model that can't be asked like this is asked for nothing
            logger.debug("a decoder with an encoder's output of width %d failed: %r", width, error)
            continue
        if same:
            return width
    logger.info("the encoder of %s runs also where its keys and values are known", type(model).__name__)
    return 0


def _reads_nothing(model: nn.Module, width: int, like: torch.Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, _POSITIONS, width), generator=generator).to(like)
    config = decoder_config(model).get_text_config(decoder=True)
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache())

    def logits(output: torch.Tensor, given: EncoderDecoderCache, token: int) -> torch.Tensor:
        ids = torch.tensor([[token]], device=like.device)
        encoded = BaseModelOutput(last_hidden_state=output)
        made: torch.Tensor = model(
            encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=given, use_cache=True, return_dict=True
        ).logits
        return made

    logits(hidden.clone(), cache, _TOKENS[0])
    other = copy.deepcopy(cache)
    real = logits(hidden.clone(), cache, _TOKENS[1])
    nothing = _unreadable(_POSITIONS, width, like).last_hidden_state
    assert nothing is not None
    return bool(torch.isfinite(real).all()) and torch.equal(real, logits(nothing, other, _TOKENS[1]))
