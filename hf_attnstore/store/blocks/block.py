"""What a block is: the KV of a run of consecutive tokens, as named tensors, and everything that identifies it.

A checkpoint is a block too: the running states of a model's layers after the last of its tokens, instead of something
of each of them. Its tokens are those of the last, perhaps short, block of the text that it sums up, and its parent is
a name of its own (`state_root`), so that neither is ever found in the place of the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Union

from ...errors import NotFiniteError
from ...lazy import np
from .keys import RAW, Key

if TYPE_CHECKING:
    import torch

TOKEN_IDS = "token_ids"
"""The tensor of a block's file that holds its ids."""

Bytes = Union["np.ndarray", memoryview]
"""A contiguous buffer of uint8."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor of a block; the token axis is the last but one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BlockMeta:
    """Everything about a block but its tensors."""

    key: Key
    parent: Key
    fingerprint: str
    start: int
    """Position of the first token in the chain, in tokens."""
    tokens: bytes
    """As from `encode_tokens`."""
    codec: str = RAW
    continues: Key = b""
    """The block before this one, where `parent` does not name it: in the first block after a truncation, and in
    checkpoints."""
    state: str | None = None
    """JSON that goes with the running states of a checkpoint; None in a block that has something of every token."""

    @property
    def predecessor(self) -> Key:
        """The block without which this one is worth nothing; for the first of a chain, its root."""
        return self.continues or self.parent

    @property
    def token_count(self) -> int:
        return len(self.tokens) // 4

    @property
    def stop(self) -> int:
        return self.start + self.token_count


@dataclass
class Block:
    """A block in host memory: tensors by name, in layer order, each contiguous, and `[heads, tokens, dim]` but in
    checkpoints.

    On an accelerator the tensors may still be arriving: `wait_ready` returns when they are there.
    """

    meta: BlockMeta
    tensors: dict[str, torch.Tensor]
    arriving: list[torch.cuda.Event] = field(default_factory=list)
    codable: frozenset[str] = frozenset()
    """Names of the tensors that the codec may have; the others are kept as they are."""
    _together: dict[tuple[str, ...], torch.Tensor | None] = field(default_factory=dict, repr=False, compare=False)
    _whole: bool | None = field(default=None, repr=False, compare=False)
    _finite: bool | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def wait_ready(self) -> None:
        """Returns when everything is there.

        Raises:
            NotFiniteError: see `check_finite`, which nobody could do before.
        """
        while self.arriving:
            self.arriving[-1].synchronize()
            self.arriving.pop()
        self.check_finite()

    def check_finite(self) -> None:
        """Looks through what is there already, once.

        Raises:
            NotFiniteError: there is NaN or infinity in it.
        """
        if self._finite is None:
            self._finite = all(map(is_finite, self.tensors.values()))
        if not self._finite:
            raise NotFiniteError(f"block {self.meta.key.hex()} has NaN or infinity in it")

    def together(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """Several tensors as one, `[all their heads, tokens, dim]`, where they lie one after the other in memory; else
        None."""
        if names not in self._together:
            self._together[names] = _as_one([self.tensors.get(name) for name in names])
        return self._together[names]

    @property
    def is_whole(self) -> bool:
        """Whether every tensor has something of every token."""
        if self._whole is None:
            self._whole = all(tensor.shape[1] == self.meta.token_count for tensor in self.tensors.values())
        return self._whole

    def specs(self) -> dict[str, TensorSpec]:
        return self._specs

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        return specs_of(self.tensors)


@dataclass(frozen=True)
class Match:
    """A block that begins like the wanted tokens."""

    key: Key
    common: int
    """Number of leading tokens that agree."""
    token_count: int
    """Number of tokens in the block."""


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """What there is to be known of tensors by name."""
    return {name: TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def _as_one(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    first = tensors[0]
    if first is None or first.ndim != 3:
        return None
    heads, end = 0, first.data_ptr()
    for tensor in tensors:
        if tensor is None or tensor.dtype != first.dtype or tensor.shape[1:] != first.shape[1:]:
            return None
        same_memory = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same_memory or tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        heads, end = heads + tensor.shape[0], end + tensor.nbytes
    _, tokens, dim = first.shape
    return first.as_strided((heads, tokens, dim), (tokens * dim, dim, 1))  # a single head's own stride may be anything


_SMALL = 32_768
"""Values: torch looks through no more than so many with one thread, and teams of I/O threads slow computing down."""


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor has neither NaN nor infinity in it. Takes about as long as copying it: the least and the
    greatest value are found without memory, and NaN is both."""
    if not tensor.is_floating_point():
        return True
    for part in tensor.view(-1).split(_SMALL):
        if part.numel() and not all(
            math.isfinite(bound.item()) for bound in (part if part.itemsize > 1 else part.float()).aminmax()
        ):
            return False
    return True


_ALIGNMENT = 16
"""Bytes. A larger one would leave gaps behind short blocks, so that their tensors would not lie together."""


def padded(nbytes: int) -> int:
    """The bytes that a tensor takes in memory where others of its block follow it."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def identity(meta: BlockMeta, spec: TensorSpec) -> bytes:
    """Everything that a tensor's place in the world depends on, for a proof to cover."""
    fields = (
        meta.key.hex(), meta.parent.hex(), meta.continues.hex(), meta.fingerprint, meta.start, meta.token_count,
        meta.codec, spec.name, spec.dtype, spec.shape,
    )  # fmt: skip
    return repr(fields if meta.state is None else (*fields, meta.state)).encode()
