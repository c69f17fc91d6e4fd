"""How a model is built: the kinds of its cache layers, its decoder layers, and where each of them computes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerKind:
    """What a layer caches: everything (`window` is None), or what its sliding window of `window` tokens needs."""

    name: str
    window: int | None = None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder whose output its decoder attends to."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that has the cache: the decoder of an encoder-decoder, else the model itself."""
    if not is_encoder_decoder(model):
        return model
    get_decoder: Any = getattr(model, "get_decoder")  # noqa: B009
    decoder: nn.Module = get_decoder()
    return decoder


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of an encoder-decoder."""
    get_encoder: Any = getattr(model, "get_encoder")  # noqa: B009
    encoder: nn.Module = get_encoder()
    return encoder


def decoder_config(model: nn.Module) -> Any:
    """The configuration of the part of a model that has the cache. T5's decoder, say, has one of its own, which may
    have another number of layers."""
    return getattr(decoder_of(model), "config", None) or model.config


def layer_kinds(config: Any) -> list[LayerKind]:
    """The kind of every cache layer, in order.

    Raises:
        UnsupportedModelError: the model has a layer of another kind.
    """
    text = config.get_text_config(decoder=True)
    layers = DynamicCache(config=text).layers
    names = getattr(text, "layer_types", None) or [None] * len(layers)
    if not layers:
        raise UnsupportedModelError(f"{config.model_type} does not say which layers it has")
    kinds = []
    for number, (layer, name) in enumerate(zip(layers, names, strict=False)):
        if type(layer) is DynamicLayer and name in (None, "full_attention"):
            kinds.append(LayerKind("full_attention"))
        elif type(layer) is DynamicSlidingWindowLayer and name in (None, "sliding_attention") and _slides(text, name):
            kinds.append(LayerKind("sliding_attention", int(layer.sliding_window)))
        else:
            shown = name or type(layer).__name__
            raise UnsupportedModelError(
                f"layer {number} of {config.model_type} is of kind {shown!r}, which this version can't keep "
                "(it keeps full_attention and sliding_attention); use the model without the store"
            )
    return kinds


def _slides(text_config: Any, name: str | None) -> bool:
    """Whether a layer with a window slides, rather than being cut into chunks."""
    return name is not None or getattr(text_config, "sliding_window", None) is not None


def cache_kinds(model: nn.Module) -> list[LayerKind]:
    """The kind of every cache layer of a model, in order; for an encoder-decoder, of its decoder.

    Raises:
        UnsupportedModelError: see `layer_kinds`.
    """
    kinds = layer_kinds(decoder_config(model))
    if not is_encoder_decoder(model) or decoder_layers(decoder_of(model), len(kinds)):
        return kinds
    counts = {len(module) for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)}
    there = [count for count in sorted(counts) if decoder_layers(decoder_of(model), count)]
    if there and len(set(kinds)) == 1:  # the configuration speaks of the encoder's layers
        return kinds[:1] * there[-1]
    return kinds


def decoder_layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The modules that each hold the attention of one cache layer, in order; empty if they can't be told apart."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            numbers = [_attention_number(layer) for layer in module]
            if numbers == list(range(count)):
                return list(module)
    return []


def _attention_number(layer: nn.Module) -> int | None:
    numbers = (getattr(module, "layer_idx", None) for module in layer.modules())
    return next((number for number in numbers if isinstance(number, int)), None)


def compute_device(layer: nn.Module) -> torch.device | None:
    """The device on which a decoder layer computes, also where accelerate moves its weights; None if unknown."""
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for candidate in getattr(hook, "hooks", (hook,)):
            device = getattr(candidate, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    for parameter in layer.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return None
