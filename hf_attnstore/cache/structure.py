"""How a model is built: its decoder layers, and where each of them computes."""

from typing import Any

import torch
from torch import nn


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
