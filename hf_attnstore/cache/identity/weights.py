"""What a model computes with, as plain tensors: below tensor subclasses, packed parameters and quantised modules, and
where accelerate has moved it.

Quantised weights are bytes that mean nothing without their scales, tables and block sizes. These are parts of a
tensor subclass (torchao, quanto, DTensor), attributes of a parameter (bitsandbytes), entries of a module's state
that are no tensors (torch's own quantisation), or plain attributes beside the parameter (HQQ).
"""

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

Part = tuple[str, torch.Tensor | str]
"""A name, and a plain tensor of this name or words that say how tensors are to be understood."""

_DEPTH = 8
_WORDS = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.layout, torch.memory_format, enum.Enum)
_PLAIN_CLASSES = (torch.Tensor, nn.Parameter, nn.Buffer)
_OF_MODULES = frozenset(vars(nn.Module()))


def plain_parts(name: str, tensor: torch.Tensor) -> Iterator[Part]:
    """The plain tensors that a parameter or buffer consists of, and how they are put together.

    Raises:
        ValueError: its content can't be got at.
    """
    if hasattr(tensor, "placements") and hasattr(tensor, "to_local"):  # a DTensor: of all ranks' parts, this one's
        yield name, f"shard {list(map(str, tensor.placements))} of {tuple(tensor.shape)}"
        yield from plain_parts(name, getattr(tensor, "_local_tensor"))  # noqa: B009
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, context = flatten()
        yield name, f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype}"
        for part in names:
            yield from plain_parts(f"{name}.{part}", getattr(tensor, part))
        yield from _understood(f"{name}.context", context, 0)
        return
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ValueError(f"{name} is a {type(tensor).__name__}, which shows nothing of its content")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} is not a dense tensor ({tensor.layout})")
    plain = tensor.as_subclass(torch.Tensor) if type(tensor) not in _PLAIN_CLASSES else tensor
    if plain.is_quantized:
        yield from _quantised(name, plain)
    else:
        yield name, plain


def _quantised(name: str, tensor: torch.Tensor) -> Iterator[Part]:
    yield name, f"{tensor.qscheme()} {tensor.dtype}"
    yield f"{name}.values", tensor.int_repr()
    if "per_channel" in str(tensor.qscheme()):
        yield f"{name}.scales", tensor.q_per_channel_scales()
        yield f"{name}.zero_points", tensor.q_per_channel_zero_points()
    else:
        yield f"{name}.scale", f"{tensor.q_scale()!r} {tensor.q_zero_point()}"


def attribute_parts(name: str, tensor: torch.Tensor) -> Iterator[Part]:
    """What a parameter has beside its content, such as a quantisation state. Of ordinary parameters, whose attributes
    are marks of whoever loaded them, tensors only."""
    attributes = getattr(tensor, "__dict__", None)
    if not attributes or hasattr(tensor, "__tensor_flatten__"):
        return
    ordinary = type(tensor) in _PLAIN_CLASSES
    for key in sorted(attributes):
        if key.startswith("_") or (ordinary and not isinstance(attributes[key], torch.Tensor)):
            continue
        yield from _understood(f"{name}.{key}", attributes[key], 0, strict=not ordinary)


def keeps_more(module: nn.Module) -> bool:
    """Whether a module has state of its own kind, beside parameters and buffers."""
    kind = type(module)
    return (
        kind._save_to_state_dict is not nn.Module._save_to_state_dict
        or kind.get_extra_state is not nn.Module.get_extra_state
    )


def module_parts(prefix: str, module: nn.Module) -> Iterator[Part]:
    """What a module computes with beside the content of its parameters and buffers.

    Raises:
        ValueError: that can't be got at.
    """
    if keeps_more(module):
        state: dict[str, Any] = {}
        module._save_to_state_dict(state, "", True)
        for key in sorted(state):
            if key not in module._parameters and key not in module._buffers:
                yield from _understood(f"{prefix}.{key}", state[key], 0)
        return
    for key, tensor in module._parameters.items():
        if tensor is not None:
            yield from attribute_parts(f"{prefix}.{key}", tensor)
    yield from hidden_parts(prefix, module)


def hidden_parts(prefix: str, module: nn.Module, *, unpack: bool = True) -> Iterator[Part]:
    """Content that lies in a module's plain attributes: packed objects, and the tensors beside quantised weights.
    Beside ordinary weights such tensors are scratch, which changes from call to call.

    Args:
        unpack: whether to open packed objects, which costs a copy; else they are told apart as objects.
    """
    quantised = None
    for key, value in vars(module).copy().items():  # another thread may be attaching something
        if key in _OF_MODULES or key.startswith("_hf"):
            continue
        if isinstance(value, torch.ScriptObject):
            if unpack:
                yield from _understood(f"{prefix}.{key}", value, 0)
            else:
                yield f"{prefix}.{key}", str(id(value))
        elif isinstance(value, (torch.Tensor, dict, list, tuple)):
            if quantised is None:
                quantised = _is_quantised(module)
            if quantised:
                yield from _understood(f"{prefix}.{key}", value, 0, strict=False)


def _is_quantised(module: nn.Module) -> bool:
    """Whether a module has matrices of short integers or eight-bit floats."""
    matrices = (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.ndim > 1)
    return any(
        t.dtype is not torch.bool
        and (t.dtype.itemsize == 1 or (not t.dtype.is_floating_point and t.dtype.itemsize <= 4))
        for t in matrices
    )


def _understood(name: str, value: Any, depth: int, *, strict: bool = True) -> Iterator[Part]:
    """The tensors in a value, and what else says how they are to be understood, the same in every process.

    Args:
        strict: whether what can't be understood is an error, rather than left out.
    """
    if depth > _DEPTH:
        raise ValueError(f"{name} is too deeply nested")
    if isinstance(value, torch.Tensor):
        yield from plain_parts(name, value)
    elif value is None or isinstance(value, _WORDS):
        yield name, repr(value)
    elif isinstance(value, (torch.device, nn.Module)):
        return  # where something lies must not matter; modules are looked at by themselves
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _understood(f"{name}.{key}", value[key], depth + 1, strict=strict)
    elif isinstance(value, (list, tuple)):
        yield name, f"{len(value)} entries"
        for number, entry in enumerate(value):
            yield from _understood(f"{name}.{number}", entry, depth + 1, strict=strict)
    elif isinstance(value, (set, frozenset)):
        yield name, repr(sorted(map(repr, value)))
    elif isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        yield name, f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    elif isinstance(value, torch.ScriptObject):
        try:
            state = value.__getstate__()
        except Exception as error:
            raise ValueError(f"{name} is packed and can't be opened ({error})") from error
        yield from _understood(name, state, depth + 1, strict=strict)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        yield name, type(value).__qualname__
        yield from _understood(name, dict(vars(value)), depth + 1, strict=strict)
    elif strict:
        raise ValueError(f"{name} is a {type(value).__name__}, which says nothing of its content")


def offloaded(module: nn.Module, name: str) -> torch.Tensor | None:
    """The content of a parameter that accelerate has moved away."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", (hook,)):
        weights = getattr(candidate, "weights_map", None)
        if weights is not None:
            try:
                return weights[name]
            except KeyError:
                continue
    return None


def offloaded_in_memory(module: nn.Module, name: str) -> torch.Tensor | None:
    """The content of a parameter that accelerate keeps in host memory; None for one on disk, or not offloaded."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", (hook,)):
        weights = getattr(candidate, "weights_map", None)
        dataset, prefix = getattr(weights, "dataset", weights), getattr(weights, "prefix", "")
        held = getattr(dataset, "state_dict", dataset)
        if isinstance(held, Mapping) and isinstance(held.get(prefix + name), torch.Tensor):
            tensor: torch.Tensor = held[prefix + name]
            return tensor
    return None
