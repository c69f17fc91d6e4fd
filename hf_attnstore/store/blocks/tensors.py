"""A block's tensors in host memory: made in one piece, seen as bytes."""

from collections.abc import Sequence

import numpy as np
import torch

from .block import TensorSpec, padded
from .uninitialised import uninitialised


def host_memory(specs: Sequence[TensorSpec], *, pinned: bool) -> dict[str, torch.Tensor]:
    """Uninitialised tensors by name, one after the other in one piece of host memory: that is cheaper to get than many,
    and is copied faster."""
    sizes = [padded(spec.nbytes) for spec in specs]
    parts = uninitialised(torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)).split(sizes)
    return {s.name: part[: s.nbytes].view(s.dtype).view(s.shape) for s, part in zip(specs, parts, strict=True)}


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A uint8 view of a CPU tensor whose last dimension is contiguous; the last axis counts bytes."""
    return tensor.view(torch.uint8).numpy()


def copy_bytes(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies a CPU tensor into one of its dtype and shape, by this thread alone: torch would do it with a team of
    threads for each I/O thread, which slows computing."""
    np.copyto(as_bytes(target), as_bytes(source))
