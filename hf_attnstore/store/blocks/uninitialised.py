"""Memory that nothing was written to yet: every such tensor of the package is made here, or passes through here."""

import torch

fill: int | None = None
"""A byte that all of it is filled with. Tests set it to 255, which is NaN in every floating-point dtype: then what is
read before it is written shows."""


def uninitialised(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is, whatever is in it."""
    if fill is not None and tensor.device.type != "meta":
        tensor.view(-1).view(torch.uint8).fill_(fill)
    return tensor
