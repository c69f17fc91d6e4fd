"""What an encoder is given, as a digest: the same digest, the same output.

Everything counts that may reach the encoder: ids, features, embeddings, masks, whatever a model's own encoder takes.
What `generate` or the decoder alone reads does not. Doubt makes a digest differ, which costs time and nothing else.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..model.argument import CACHE_NAMES
from ..model.structure import encoder_of
from .foreign import is_setting

_DECODER_ONLY = ("decoder_", "cross_attn")
_NEVER = frozenset(CACHE_NAMES) | frozenset("use_cache return_dict labels logits_to_keep cache_position".split())
_PLAIN = (bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class EncoderInput:
    """What an encoder is given: a digest of it, or the reason why it has none."""

    digest: bytes = b""
    parts: Mapping[str, bytes] = field(default_factory=dict)
    """Digests of its parts, by name: a first forward may bring the input itself, the next ones its output."""
    problem: str = ""
    positions: int | None = None
    """Of the encoder's output, where that is what is given."""


@cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(signature(function).parameters)


def is_for_decoder(name: str) -> bool:
    """Whether an argument concerns the decoder alone."""
    return name.startswith(_DECODER_ONLY)


def encoder_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of a `generate`, or of a forward by name, those that may reach the encoder."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    given = {**({"inputs": args[0]} if args else {}), **kwargs}
    known = _parameters(type(model).forward) | _parameters(type(encoder_of(model)).forward)
    generate: Any = getattr(type(model), "generate", None)
    own = _parameters(generate) - known if generate is not None else frozenset()
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or name in _NEVER or is_for_decoder(name):
            continue
        if name == "inputs":
            found[main] = value
        elif name == main or name == "encoder_outputs" or not (is_setting(name) or name in own):
            found[name] = value
    return found


def encoder_input(inputs: Mapping[str, Any], main: str) -> EncoderInput:
    """The digest of what reaches the encoder, by name, of which `main` is the tensor that is encoded."""
    outputs = inputs.get("encoder_outputs")
    data = outputs[0] if outputs is not None else inputs.get(main, inputs.get("inputs_embeds"))
    if not isinstance(data, torch.Tensor) or data.ndim < 2:
        return EncoderInput(problem="the encoder's input is not given as a tensor with a batch")
    if data.shape[0] != 1:
        return EncoderInput(problem=f"a batch of {data.shape[0]} inputs of the encoder")
    parts: dict[str, bytes] = {}
    for name, value in inputs.items():
        tensor = value[0] if name == "encoder_outputs" else value
        if isinstance(tensor, torch.Tensor):
            try:
                parts[name] = content_digest(tensor)
            except (RuntimeError, TypeError) as error:
                return EncoderInput(problem=f"{name} can't be read ({error})")
        elif isinstance(value, _PLAIN):
            parts[name] = repr(value).encode()
        else:
            return EncoderInput(problem=f"{name} are not identified by content")
    digest = _digest(*(piece for name in sorted(parts) for piece in (name.encode(), parts[name])))
    return EncoderInput(digest, parts, positions=data.shape[1] if outputs is not None else None)


def content_digest(tensor: torch.Tensor) -> bytes:
    """A digest of a tensor's dtype, shape and values."""
    described = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _digest(described, values.tobytes())


def _digest(*parts: bytes) -> bytes:
    hasher = hashlib.blake2b(digest_size=32, person=b"attnstore-input")
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()
