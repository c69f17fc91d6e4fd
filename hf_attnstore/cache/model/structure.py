"""How a model is built: its decoder layers, where each of them computes, and the positions it is made for."""

from collections.abc import Iterator
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


def own_state(model: nn.Module) -> str:
    """The type of a model that keeps a running state under a name of its own (RWKV, xLSTM); empty for others, and for
    code that is not transformers' own."""
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    known = kind in ("rwkv", "xlstm") and type(model).__module__.startswith(f"transformers.models.{kind}.")
    return kind if known else ""


def refiner() -> type | None:
    """The class of transformers that models have a `generate` from which refines blocks; None if it has none."""
    try:
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationMixin
    except ImportError:
        return None
    return DiffusionGemmaGenerationMixin


def in_canvases(model: nn.Module) -> type | None:
    """The class that a model has its `generate` from, if that refines whole blocks of tokens (DiffusionGemma): there
    an encoder writes the cache, and a decoder that sees all of a block reads it only. Else None."""
    return next((cls for cls in type(model).__mro__ if cls.__name__ == "DiffusionGemmaGenerationMixin"), None)


def takes_one_conversation(model: nn.Module) -> bool:
    """Whether what is kept of a model's conversations can't be put together in the rows of a batch."""
    return in_canvases(model) is not None or bool(own_state(model))


def cache_writer(model: nn.Module) -> nn.Module:
    """The part of a model whose forwards add to its cache: the model itself, where it does not refine blocks."""
    if in_canvases(model) is None:
        return model
    get_encoder: Any = getattr(getattr(model, "model"), "get_encoder")  # noqa: B009
    writer: nn.Module = get_encoder()
    return writer


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


def has_length_dependent_rope(config: Any) -> bool:
    """Whether the rotary frequencies change with the length of the text (dynamic NTK, LongRoPE)."""
    return any(rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope") for rope in _ropes(config))


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(found, dict):
        yield found
        yield from (rope for rope in found.values() if isinstance(rope, dict))


def position_limit(config: Any) -> int | None:
    """The number of tokens up to which KV depends on nothing that comes later; None if that is always so."""
    # models that state this number themselves (Phi) let go of their cache when a text grows beyond it
    original = getattr(config, "original_max_position_embeddings", None)
    if not has_length_dependent_rope(config):
        return original if isinstance(original, int) and original > 0 else None
    limits = [config.max_position_embeddings, original]
    limits += [rope.get("original_max_position_embeddings") for rope in _ropes(config)]
    return min(int(limit) for limit in limits if limit)


def positions_of(config: Any) -> int | None:
    """How many positions a model is made for, in tokens; None if it does not say."""
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    kinds = [rope for rope in _ropes(config) if rope.get("rope_type", rope.get("type")) == "dynamic"]
    # dynamic NTK reaches beyond
    return int(stated * max((float(rope.get("factor") or 1) for rope in kinds), default=1.0))


def device_of(model: nn.Module) -> torch.device:
    """Where a model wants its input."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if weight is None or weight.device.type == "meta":
        device: torch.device = getattr(model, "device", torch.device("cpu"))
        return device
    return torch.device(weight.device)
