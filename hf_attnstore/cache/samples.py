"""Parts of a model's tensors: bounded samples that identify them, and a few values that are cheap to look at."""

from ctypes import string_at

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
    return tensor.as_strided((_QUICK_VALUES,), ((values - 1) // (_QUICK_VALUES - 1),))


def peek(tensor: torch.Tensor, address: int) -> bytes | None:
    """The bytes of `few_values` of a tensor whose data lies at `address`, read without tensor operations: for a model
    on the CPU these take longer than all else that is looked at before a turn. None where they are not in host memory
    one after the other."""
    values = tensor.numel()
    if not address or values < _QUICK_VALUES or not tensor.is_cpu or not tensor.is_contiguous():
        return None
    size = tensor.itemsize
    step = (values - 1) // (_QUICK_VALUES - 1) * size
    return b"".join([string_at(address + place * step, size) for place in range(_QUICK_VALUES)])


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
