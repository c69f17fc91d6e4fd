"""Finding out whether somebody else can see a tensor's memory, through a view of it."""

from functools import cache
from typing import Any

import torch

_uses: Any = getattr(torch._C, "_storage_Use_Count", None)
"""How many tensors, and other holders, a storage has. Where torch does not say it, everything counts as watched."""


def _count(tensor: torch.Tensor) -> int:
    return int(_uses(tensor.untyped_storage()._cdata))


@cache
def _alone(is_view: bool) -> int:
    """The count of a tensor that nobody else has a view of. One that is a view itself has its base beside it."""
    with torch.inference_mode(False):
        tensor = torch.empty(4)
        return _count(tensor.view(2, 2) if is_view else tensor)


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether there is another tensor, or array, with the same memory. The very same object does not count."""
    if _uses is None:
        return True
    return _count(tensor) > _alone(tensor._base is not None)
