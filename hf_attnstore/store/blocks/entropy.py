"""Codecs that write what is likely in fewer bits: `lossless`, for slow disks and networks, and `int8z`.

Exponents of keys and values take few values, mantissas and signs are noise (order-0 entropy: 0.67 of bfloat16, 0.835
of float32). So each value is turned by a bit, which puts the sign last and the exponent into the first byte; that byte
of all values is one zstd frame of literals, by Huffman's code alone, and the others are written as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from ...errors import LoadError
from . import kernels
from .block import BlockMeta
from .codecs import register
from .rounding import Compiled, Int8, Parts, is_known, only, put_first, scaled

try:
    import zstandard
except ImportError as error:
    raise LoadError(
        "the codecs int8z and lossless need the zstandard package: pip install 'hf-attnstore[codecs]'", transient=True
    ) from error

_own = threading.local()
_INT8Z = frozenset(("codes", "deltas", "scale", "mean", "first"))


def squeezed(plane: np.ndarray) -> torch.Tensor:
    """Bytes as a zstd frame, a uint8 tensor."""
    if not hasattr(_own, "compressor"):
        # matches are never worth their while here: literals alone decode twice as fast
        params: Any = zstandard.ZstdCompressionParameters(
            compression_level=1, window_log=17, min_match=7, hash_log=6, chain_log=6, search_log=1,
            strategy=zstandard.STRATEGY_FAST,
        )  # fmt: skip
        _own.compressor = zstandard.ZstdCompressor(compression_params=params)
    frame = _own.compressor.compress(np.ascontiguousarray(plane).data)
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def opened(frame: torch.Tensor, count: int) -> torch.Tensor:
    """The bytes of a zstd frame, uint8.

    Raises:
        LoadError: it is none of so many bytes.
    """
    if not hasattr(_own, "decompressor"):
        _own.decompressor = zstandard.ZstdDecompressor()
    plane = torch.empty(count, dtype=torch.uint8)
    room, done = plane.numpy(), 0
    try:
        with _own.decompressor.stream_reader(frame.numpy()) as reader:
            while done < count and (more := reader.readinto(room[done:])):
                done += more
            done += len(reader.read(1))
    except zstandard.ZstdError as error:
        raise LoadError(f"a coded tensor can't be read: {error}") from None
    if done != count:
        raise LoadError(f"a coded tensor has other than {count} values")
    return plane


class Lossless(Compiled):
    """Every bit comes back."""

    name: ClassVar[str] = "lossless"
    lossy: ClassVar[bool] = False
    stacks: ClassVar[bool] = False

    def encode(self, name: str, tensor: torch.Tensor, meta: BlockMeta) -> Parts | None:
        if not is_known(tensor):
            return None
        bits = _bits(tensor)
        width = 8 * bits.itemsize
        turned = bits << 1
        turned |= bits >> (width - 1)
        parts = {"exponents": squeezed((turned >> (width - 8)).astype(np.uint8))}
        if parts["exponents"].numel() >= tensor.numel():
            return None
        parts["mantissas"] = torch.from_numpy((turned >> (width - 16)).astype(np.uint8))
        if width == 32:
            parts["low"] = torch.from_numpy(turned.astype(np.uint16).view(np.int16))
        return parts

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        first = opened(parts["exponents"], out.numel()).view(out.shape)
        second, third = parts["mantissas"], parts.get("low")
        if (third is not None) != (out.itemsize == 4):
            raise LoadError(f"these are no parts of a tensor of {out.dtype}")
        if kernels.joined(first, second, third, out):
            return
        exponents, mantissas = first.numpy(), second.numpy()
        low = third.numpy().view(np.uint16) if third is not None else None
        width = 8 * out.itemsize
        for head in range(out.shape[0]):
            turned = exponents[head].astype(np.uint32 if low is not None else np.uint16)
            turned <<= 8
            turned |= mantissas[head]
            if low is not None:
                turned <<= 16
                turned |= low[head]
            bits = _bits(out[head])
            np.right_shift(turned, 1, out=bits)
            turned <<= width - 1
            bits |= turned


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The bits of each value. A view."""
    kind = (torch.int32, np.uint32) if tensor.itemsize == 4 else (torch.int16, np.uint16)
    return tensor.view(kind[0]).numpy().view(kind[1])


class SqueezedInt8(Int8):
    """int8 with coarser steps, of which Huffman's code takes four to six bits. Values get a share of their token's
    deviation. Keys are coded by how far they are from the mean of their channel, in steps between those that are equal
    for all channels of a head, as an error counts by its size (better on SmolLM2), and those that are a share of their
    channel's deviation, as queries are larger where keys are smaller (better on Gemma 3)."""

    name: ClassVar[str] = "int8z"
    stacks: ClassVar[bool] = False
    centred: ClassVar[bool] = True

    def encode(self, name: str, tensor: torch.Tensor, meta: BlockMeta) -> Parts | None:
        found = super().encode(name, tensor, meta)
        if found is None:
            return None
        codes = squeezed(found.pop("codes").numpy())
        return {"deltas" if "mean" in found else "codes": codes, **found}

    def steps(self, groups: torch.Tensor, keys: bool) -> torch.Tensor:
        if keys:
            square = groups.square().mean(dim=(1, 3))
            size = (square * square.mean(dim=1, keepdim=True)).pow_(0.25) / 12.5
        else:
            size = groups.var(dim=(1, 3), correction=0).sqrt_() / 6.5
        return torch.maximum(super().steps(groups, keys), size)

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        only(_INT8Z, parts)
        mean = parts.get("mean")
        frame = parts["codes" if mean is None else "deltas"]
        scaled(opened(frame, out.numel()).view(torch.int8).view(out.shape), parts["scale"], out, mean)
        put_first(parts, out)


for codec in (Lossless(), SqueezedInt8()):
    register(codec)
