"""How a model is built: its decoder layers, and where each of them computes."""

import torch
from torch import nn


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
