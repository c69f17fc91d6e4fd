"""Tensor parallelism: processes that compute one model together keep their shares apart, and reuse the same tokens.

Each rank has the KV of its own heads, its own fingerprint (its weights are other slices) and its own sessions in the
store. But all ranks must feed the model the same tokens: a rank that lacks a block makes the others compute it too.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import AttentionStoreError

Result = TypeVar("Result")

_TENSOR_PARALLEL = "tp"


class OtherRankError(AttentionStoreError):
    """Another rank could not do what this one did."""


class Ranks:
    """One process that computes alone: whatever it finds is agreed on."""

    rank = 0
    size = 1

    @property
    def alone(self) -> bool:
        return self.size == 1

    def least(self, value: int) -> int:
        """The smallest of the values that the ranks call this with. All must call it, in the same order."""
        return value

    def all(self, well: bool) -> bool:
        """Whether `well` holds for every rank."""
        return bool(self.least(int(well)))

    def same(self, value: int) -> bool:
        """Whether every rank has the same `value`."""
        return self.all(self.least(value) == value)

    def attempt(self, action: Callable[[], Result]) -> Result:
        """Does something on every rank. If it fails for one, it fails for all, and none waits for one that is gone.

        Raises:
            OtherRankError: it failed on another rank only.
        """
        try:
            result = action()
        except Exception:
            self.least(0)
            raise
        if not self.least(1):
            raise OtherRankError(
                "another rank of this tensor-parallel model could not do what this one did: its error says why"
            )
        return result


class ManyRanks(Ranks):
    """One of several processes that compute a model together."""

    def __init__(self, mesh: Any) -> None:
        self.rank = int(mesh.get_local_rank())
        self.size = int(mesh.size())
        self._group = mesh.get_group()
        self._device = torch.device(mesh.device_type)

    def least(self, value: int) -> int:
        told = torch.tensor([value], dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MIN, group=self._group)
        return int(told.item())


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks that compute a model together with this one.

    Raises:
        ValueError: the model is spread over processes in a way that is not known.
    """
    mesh = _mesh_of(model)
    return Ranks() if mesh is None or mesh.size() == 1 else ManyRanks(mesh)


def known_ranks(model: nn.Module) -> Ranks:
    """`ranks_of`; of a model spread in a way that is not known, nothing is kept (it has no fingerprint), and nobody has
    to agree."""
    try:
        return ranks_of(model)
    except ValueError:
        return Ranks()


def _mesh_of(model: nn.Module) -> Any:
    """The device mesh over which heads are spread; None if they are not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    stated = getattr(model, "_device_mesh", None)
    if stated is not None and _has_dimension(stated):
        return stated[_TENSOR_PARALLEL]
    if stated is not None and stated.ndim == 1 and (getattr(model, "_tp_size", None) or 1) > 1:
        return stated
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            return None  # its shards are put together for computing: every rank has all heads, of its own prompts
    meshes = {p.device_mesh for p in model.parameters() if hasattr(p, "placements") and hasattr(p, "device_mesh")}
    for mesh in meshes:
        if _has_dimension(mesh):
            return mesh[_TENSOR_PARALLEL]
    if not meshes:
        return None
    if len(meshes) == 1 and next(iter(meshes)).ndim == 1:
        return next(iter(meshes))
    raise ValueError(
        f"its weights are spread over a device mesh without a dimension named {_TENSOR_PARALLEL!r}, so that the "
        "processes that share heads can't be told"
    )


def _has_dimension(mesh: Any) -> bool:
    return _TENSOR_PARALLEL in (getattr(mesh, "mesh_dim_names", None) or ())
