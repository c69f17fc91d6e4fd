"""Buffers of several layers in one piece of host memory, so that what is loaded into them is copied in one go.

Of a few layers only: layers are to come one after the other, and the piece stays until the last has grown out of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...store.blocks.block import TensorSpec
from ...store.transfer.stages import Joint
from ..layers.buffers import none_of, with_capacity
from ..layers.by_token import FullLayer
from ..layers.kept import KeptLayer

_ENOUGH = 1 << 20
"""Bytes of a block that lie together; more of them are copied no faster."""
_PARTS = 4
"""So many times at least something arrives, where there are as many layers."""


@dataclass
class Room:
    """Buffers for a layer."""

    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    """By the layer's own names, each `[1, heads, capacity, dim]`."""
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    """What is to be filled of them, by the names in blocks, each `[heads, tokens, dim]`."""
    joint: Joint | None = None
    """For the first of the layers that lie together."""


def make_rooms(
    layers: Sequence[KeptLayer], specs: Mapping[int, Mapping[str, TensorSpec]], length: int
) -> dict[int, Room]:
    """Makes buffers in host memory for layers that hold nothing and are to hold `length` tokens.

    Args:
        specs: by the number of the layer, rising, what a block has of it by the layer's own names.

    Returns:
        By the layer's number; nothing for kinds of layers that hold what they have in ways of their own.
    """
    rooms: dict[int, Room] = {}
    for group in _groups(layers, specs):
        tensors = [(number, name, spec) for number in group for name, spec in specs[number].items()]
        heads, dim, dtype = sum(spec.shape[0] for *_, spec in tensors), tensors[0][2].shape[2], tensors[0][2].dtype
        capacity = max(length, *(layers[number].expected for number in group))
        whole = with_capacity(none_of(heads, dim, dtype, torch.device("cpu")), capacity)
        filled, sizes = whole[0, :, :length], [spec.shape[0] for *_, spec in tensors]
        # to slice the buffers one by one takes longer
        views = whole.split_with_sizes(sizes, 1), filled.split_with_sizes(sizes)
        for (number, name, spec), buffer, target in zip(tensors, *views, strict=True):
            room = rooms.setdefault(number, Room())
            room.buffers[name], room.targets[spec.name] = buffer, target
        rooms[group[0]].joint = Joint(tuple(spec.name for *_, spec in tensors), filled, len(group))
    return rooms


def _groups(layers: Sequence[KeptLayer], specs: Mapping[int, Mapping[str, TensorSpec]]) -> Iterator[list[int]]:
    """Neighbours whose tensors are alike, and enough of them."""
    group: list[int] = []
    nbytes, alike = 0, None
    most = max(len(layers) // _PARTS, 1)
    for number, own in specs.items():
        kinds = {(spec.dtype, spec.shape[1:]) for spec in own.values()}
        fits = type(layers[number]) is FullLayer and len(kinds) == 1 and len(next(iter(kinds))[1]) == 2
        full = nbytes >= _ENOUGH or len(group) == most
        if group and (full or not fits or number != group[-1] + 1 or kinds != alike):
            yield group
            group, nbytes = [], 0
        if fits:
            group.append(number)
            alike = kinds
            nbytes += sum(spec.nbytes for spec in own.values())
    if group:
        yield group
