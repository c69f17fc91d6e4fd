"""Parts of a model's tensors: bounded samples that identify them, and a few values that are cheap to look at."""

from collections.abc import Sequence
from ctypes import c_uint8

import numpy as np
import torch

_RUNS, _RUN_LENGTH = 16, 64
_QUICK_VALUES = 4


def sample_of(tensor: torch.Tensor, runs: int = _RUNS, length: int = _RUN_LENGTH) -> torch.Tensor:
    """Up to `runs` evenly spread runs of `length` neighbouring values of `tensor`, as one dimension."""
    tensor = tensor.detach()
    if tensor.numel() <= runs * length:
        return tensor.reshape(-1)
    step = (tensor.numel() - length) // (runs - 1)
    if tensor.is_contiguous():
        return tensor.as_strided((runs, length), (step, 1), tensor.storage_offset()).reshape(-1)
    places = (torch.arange(runs)[:, None] * step + torch.arange(length)).reshape(-1).to(tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]


def few_values(tensor: torch.Tensor) -> torch.Tensor:
    """Some values of a tensor, spread over it, in one cheap step."""
    if not tensor.is_contiguous():
        return sample_of(tensor, _QUICK_VALUES, 1)
    values = tensor.numel()
    if values < _QUICK_VALUES:
        return tensor.detach().reshape(-1)
    return tensor.as_strided((_QUICK_VALUES,), (_distance(values),))


def _distance(values: int) -> int:
    """Of a few values, of so many that lie one after the other."""
    return (values - 1) // (_QUICK_VALUES - 1)


def peephole(tensor: torch.Tensor) -> np.ndarray | None:
    """`few_values` of a tensor in host memory, to be read without tensor operations: for a model on the CPU these take
    longer than all else that is looked at before a turn. None where the values are not in host memory, at equal
    distances.

    It keeps neither the tensor nor its memory: not to be read unless the tensor is there, and where and as large as it
    was.
    """
    count, address = tensor.numel(), tensor.data_ptr()
    if not address or count < _QUICK_VALUES or not tensor.is_cpu or not tensor.is_contiguous():
        return None
    size = tensor.itemsize
    memory = memoryview((c_uint8 * tensor.nbytes).from_address(address))
    return np.ndarray((_QUICK_VALUES,), f"V{size}", memory, strides=(_distance(count) * size,))


def seen_through(holes: Sequence[np.ndarray]) -> list[bytes]:
    """The bytes of the values as they are now."""
    return [hole.tobytes() for hole in holes]


def raw_bytes(values: torch.Tensor) -> bytes:
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


_COMPARED_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ORDINARY_DTYPES = frozenset(
    getattr(torch, name)
    for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()
)


def comparable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a dtype that everything can be done with, and the same bytes."""
    return tensor if tensor.dtype in _ORDINARY_DTYPES else tensor.view(_COMPARED_AS[tensor.dtype.itemsize])
