"""What people do without the library: keep a DynamicCache, or write one to a file and read it back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel

from hf_attnstore.lab.bench.shapes import BenchError
from hf_attnstore.lab.bench.timing import timed_generate

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def kv_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that a cache holds."""
    return sum(tensor.nbytes for tensor in tensors_of(cache).values())


def filled_cache(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    """A DynamicCache that holds exactly `ids` (`[1, tokens]`): the one new token is never fed."""
    cache = DynamicCache(config=model.config)
    timed_generate(model, ids, 0, lambda: cache)
    if cache.get_seq_length() != ids.shape[1]:
        raise BenchError(f"The cache holds {cache.get_seq_length()} tokens, not the history's {ids.shape[1]}.")
    return cache


def tensors_of(cache: DynamicCache) -> dict[str, torch.Tensor]:
    """A cache's tensors by name, `layers.<i>.keys` and `layers.<i>.values`, in layer order."""
    named = {}
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise BenchError(f"Layer {index} keeps no keys and values; the bench measures attention layers only.")
        named[f"layers.{index}.keys"] = keys.contiguous()
        named[f"layers.{index}.values"] = values.contiguous()
    return named


def cache_of(model: PreTrainedModel, named: dict[str, torch.Tensor], tokens: int) -> DynamicCache:
    """A DynamicCache around the given tensors, without copying them on the CPU.

    Args:
        named: what `tensors_of` gave.
        tokens: how many tokens the cache has seen (a sliding layer holds fewer).
    """
    cache = DynamicCache(config=model.config)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        keys = named[f"layers.{index}.keys"].to(model.device)
        values = named[f"layers.{index}.values"].to(model.device)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = tokens
    return cache


def write_torch(cache: DynamicCache, path: Path) -> None:
    torch.save(tensors_of(cache), path)


def read_torch(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return loaded


def write_safetensors(cache: DynamicCache, path: Path) -> None:
    save_file({name: tensor.cpu() for name, tensor in tensors_of(cache).items()}, path)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def read_safetensors_lean(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file tensor by tensor straight into fresh memory, with no map and no copy.

    For measurements of memory: `load_file` maps the file, and mapped pages count as the process's own.
    """
    named = {}
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            tensor = torch.empty(math.prod(entry["shape"]), dtype=_DTYPES[entry["dtype"]])
            file.seek(8 + length + entry["data_offsets"][0])
            target, at = memoryview(tensor.view(torch.uint8).numpy().data), 0
            while at < len(target) and (got := file.readinto(target[at:])):
                at += got
            if at < len(target):
                raise BenchError(f"{path.name} ends inside {name}.")
            named[name] = tensor.view(entry["shape"])
    return named
