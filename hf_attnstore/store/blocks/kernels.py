"""Decoding by compiled loops, where the package was built with a compiler: one pass instead of torch's two to five.

`_dequantise.c` gives the bits that torch gives. Where it is not there, or for tensors that it does not know, whoever
asks is told so and does it with torch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from ...errors import LoadError

_BFLOAT16 = {torch.float32: 0, torch.bfloat16: 1}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where they were not built."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_dequantise{suffix}")
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
                scaled = found.attnstore_scaled_by
            except (OSError, AttributeError):  # of another machine
                return None
            at, long = ctypes.c_void_p, ctypes.c_long
            scaled.argtypes = (at, ctypes.c_int, long, *(at, long) * 5, long, ctypes.c_int, *(long,) * 6)
            found.attnstore_joined32.argtypes = [at, at, at, at, long]
            found.attnstore_joined16.argtypes = [at, at, at, long]
            found.attnstore_joined32.restype = found.attnstore_joined16.restype = None
            return found
    return None


def scaled(
    codes: torch.Tensor,
    steps: torch.Tensor,
    lowest: torch.Tensor | None,
    out: torch.Tensor,
    order: torch.Tensor | None = None,
    widths: torch.Tensor | None = None,
) -> bool:
    """Writes codes times steps, plus the lowest, into `out`, `[..., heads, tokens, dim]` with one dimension before
    these or none. False where that is left to torch.

    Args:
        codes: int8 of the shape of `out`, or uint8 `[..., dim / 2]`, two channels in a byte.
        steps, lowest: float16 `[..., heads, tokens / a, dim / b]`, of which `by_group` has been checked.
        order, widths: see `rounding.Sharing`; without them low nibbles are the first half of a row.

    Raises:
        LoadError: these are none.
    """
    found = library()
    if found is None or out.dtype not in _BFLOAT16 or out.shape[-1] > found.attnstore_most():
        return False
    heads, tokens, dim = out.shape[-3:]
    shared = codes.dtype == torch.uint8 and lowest is not None
    width = dim // 2 if shared else dim
    parts = [codes, steps, lowest, order, widths]
    kinds = [torch.uint8 if shared else torch.int8, torch.float16, torch.float16, torch.uint8, torch.uint8]
    shapes = [(heads, tokens, width), steps.shape[-3:], steps.shape[-3:], (heads, dim), (heads, width)]
    where: list[int | None] = []
    for part, kind, shape in zip(parts, kinds, shapes, strict=True):
        one = part[0] if part is not None and part.ndim > len(shape) else part
        if part is not None and (one.dtype != kind or one.shape != shape or not one.is_contiguous()):  # type: ignore[union-attr]
            return False
        apart = part.stride(0) if one is not part and part is not None else 0
        where += (None, 0) if part is None else (part.data_ptr(), apart)
    where.insert(1, int(shared))
    if (order is None) != (widths is None) or (order is not None and not shared) or out.stride()[-2:] != (dim, 1):
        return False
    several, apart = (out.shape[0], out.stride(0)) if out.ndim == 4 else (1, 0)
    rows, columns = steps.shape[-2:]
    place = out.data_ptr(), apart, out.stride(-3)
    if found.attnstore_scaled_by(*where, *place, _BFLOAT16[out.dtype], several, heads, tokens, dim, rows, columns):
        raise LoadError("codes are in an order that is none")
    return True


def joined(first: torch.Tensor, second: torch.Tensor, low: torch.Tensor | None, out: torch.Tensor) -> bool:
    """Puts together what `lossless` takes apart, all of `[heads, tokens, dim]`. False where that is left to numpy."""
    found = library()
    if found is None or out.stride()[-2:] != (out.shape[-1], 1):
        return False
    for head in range(out.shape[0]):
        count = out[head].numel()
        at = [part[head].data_ptr() for part in (first, second, *(() if low is None else (low,)), out)]
        (found.attnstore_joined16 if low is None else found.attnstore_joined32)(*at, count)
    return True
