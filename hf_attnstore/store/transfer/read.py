"""Reading pieces of blocks from their files straight into place in host memory.

Runs once for every block of every layer while the model waits, so that it is written to do little besides the
system call: what every piece of a stage has in common is looked at once.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ...errors import LoadError
from ..blocks.block import Bytes, TensorSpec
from ..blocks.codecs import CodedBlock
from ..blocks.format import StoredTensor
from ..blocks.stored import StoredBlock
from ..blocks.tensors import as_bytes
from .decoding import Decoding
from .stages import FilePiece


class _Target(NamedTuple):
    name: str
    heads: int
    dim: int
    dtype: torch.dtype
    token_bytes: int
    """Bytes of one token in one head."""
    rows: list[memoryview]
    """The bytes of every head. Views: to cut one takes a fraction of what it takes with an array."""


class Rows:
    """The targets of a stage, `[heads, tokens, dim]` each and contiguous within a head, to be read into."""

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        self._decoding = Decoding(targets)
        self._targets = []
        for name, target in targets.items():
            heads, _, dim = target.shape
            rows = [memoryview(row) for row in as_bytes(target.view(heads, -1))]
            self._targets.append(_Target(name, heads, dim, target.dtype, dim * target.dtype.itemsize, rows))
        self._fitting: dict[str, TensorSpec] = {}

    def read(self, piece: FilePiece) -> None:
        """Reads a piece of a block, to go behind the tokens before it.

        Raises:
            LoadError: it can't be read, fails its checksum, or is not what the targets take.
        """
        (_, start, stop, _), _, file, first = piece
        if isinstance(file, CodedBlock) or file.layout.coded:
            self._decode(file, start, stop, first)
            return
        tensors = file.layout.tensors
        wanted: list[tuple[StoredTensor, Sequence[Bytes]]] = []
        for target in self._targets:
            stored = tensors.get(target.name) or file.tensor(target.name)
            if stored.spec is not self._fitting.get(target.name):  # blocks alike share their descriptions
                self._check(file, stored.spec, target)
            tokens = stored.spec.shape[1]
            if not 0 <= start <= stop <= tokens:
                raise LoadError(f"{file.path}: {target.name} has no tokens {start} to {stop}")
            size = target.token_bytes
            low, high = first * size, (first + stop - start) * size
            if stop - start == tokens:
                wanted.append((stored, [row[low:high] for row in target.rows]))
                continue
            # a tensor is read whole (only then can it be checked), what is not wanted of it aside
            before, after = start * size, (tokens - stop) * size
            buffers = []
            for row in target.rows:
                aside = memoryview(bytearray(before + after))
                buffers += [aside[:before], row[low:high], aside[before:]]
            wanted.append((stored, [buffer for buffer in buffers if buffer.nbytes]))
        file.read_adjacent(wanted)

    def _decode(self, file: StoredBlock | CodedBlock, start: int, stop: int, first: int) -> None:
        """The same of a block that is coded."""
        for target in self._targets:
            spec = file.spec(target.name)
            if spec is not self._fitting.get(target.name):
                self._check(file, spec, target)
            if not 0 <= start <= stop <= spec.shape[1]:
                raise LoadError(f"{file.path}: {target.name} has no tokens {start} to {stop}")
        self._decoding.bring(file, start, stop, first)

    def _check(self, file: StoredBlock | CodedBlock, spec: TensorSpec, target: _Target) -> None:
        if len(spec.shape) != 3 or (spec.shape[0], spec.shape[2], spec.dtype) != target[1:4]:
            raise LoadError(
                f"{file.path}: {target.name} is {spec}, which does not fit {target.heads} heads of {target.dim} "
                f"{target.dtype}"
            )
        self._fitting[target.name] = spec
