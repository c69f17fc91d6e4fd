"""Decoding coded blocks into place in host memory, several layers in one go.

A codec's arithmetic on a layer's part of a block takes less time than asking for it. Layers that are put in place
together have parts of equal shapes, evenly spaced in memory: seen as one tensor with a dimension more, they are decoded
together.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..blocks.block import TensorSpec
from ..blocks.codecs import Codec, CodedBlock, CodedTensor, codec_named
from ..blocks.stored import Reading, StoredBlock
from ..blocks.tensors import copy_bytes
from ..blocks.tier import Source


@dataclass
class _Batch:
    """Tensors that are decoded together."""

    names: tuple[str, ...]
    spec: TensorSpec
    """Of each."""
    parts: Mapping[str, torch.Tensor]
    """With a dimension more where there are several."""


def decodes_alone(source: Source) -> bool:
    """Whether one thread brings what there is of a block, without torch's team of threads: then several can bring
    others.

    Raises:
        LoadError: the codec is not known here.
    """
    if not isinstance(source, (CodedBlock, StoredBlock)) or not source.coded:
        return True
    by = source.by if isinstance(source, CodedBlock) else source.layout.by
    return getattr(codec_named(by), "alone", False)


class Decoding:
    """The targets of a stage, `[heads, tokens, dim]` each, to be decoded into. Several threads may bring blocks."""

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        self._targets = targets
        self._names = tuple(targets)
        self._together: dict[tuple[str, ...], torch.Tensor | None] = {}
        """Targets as one, by their names; None where they are not evenly spaced."""

    def bring(self, file: StoredBlock | CodedBlock, start: int, stop: int, first: int) -> None:
        """Puts tokens `[start, stop)` of a coded block, which were checked, in place behind `first` tokens of others.

        Raises:
            LoadError: they can't be read or decoded.
        """
        if isinstance(file, CodedBlock):
            codec, batches = codec_named(file.by), file.batches
            kept: Mapping[str, torch.Tensor] = file.tensors
            if self._names not in batches:
                batches[self._names] = _batches(codec, self._targets, file.coded)
            found: list[_Batch] = batches[self._names]
        else:
            codec = codec_named(file.layout.by)
            reading, found = _prepared(file, codec, self._names)
            kept = reading.tensors
            file.read_adjacent(list(reading.wanted))
        for batch in found:
            self._decode(codec, batch, start, stop, first)
        for name in self._targets.keys() - file.coded.keys():
            copy_bytes(kept[name][:, start:stop], self._place(name, start, stop, first))

    def _place(self, name: str, start: int, stop: int, first: int) -> torch.Tensor:
        return self._targets[name][:, first : first + stop - start]

    def _decode(self, codec: Codec, batch: _Batch, start: int, stop: int, first: int) -> None:
        whole, several = stop - start == batch.spec.shape[1], len(batch.names) > 1
        target = self._target(batch.names) if whole else None
        if target is not None:
            codec.decode(batch.parts, target.narrow(-2, first, stop - start))
            return
        shape = (len(batch.names), *batch.spec.shape) if several else batch.spec.shape
        aside = torch.empty(shape, dtype=batch.spec.dtype)
        codec.decode(batch.parts, aside)
        for name, found in zip(batch.names, aside if several else [aside], strict=True):
            copy_bytes(found[:, start:stop], self._place(name, start, stop, first))

    def _target(self, names: tuple[str, ...]) -> torch.Tensor | None:
        if names not in self._together:
            targets = [self._targets[name] for name in names]
            self._together[names] = stacked(targets) if len(names) > 1 else targets[0]
        return self._together[names]


_own = threading.local()
_MOST = 64
"""Pieces of memory that a thread keeps to read into, each for what of one kind of block is put in place together."""


def _prepared(file: StoredBlock, codec: Codec, names: tuple[str, ...]) -> tuple[Reading, list[_Batch]]:
    """Where tensors of a file are read to, and what is decoded together then. For the next file and the next turn, too:
    blocks alike share the description of their tensors, and to prepare takes as long as to decode."""
    known: dict[tuple[int, tuple[str, ...]], tuple[object, Reading, list[_Batch]]]
    known = _own.__dict__.setdefault("known", {})
    place = id(file.layout.coded), names
    if place not in known:
        if len(known) == _MOST:
            known.clear()
        reading = file.reading(names)
        known[place] = file.layout.coded, reading, _batches(codec, names, reading.coded)
    return known[place][1:]


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors of equal shapes that are evenly spaced in the same memory as one, with a dimension before theirs. A view;
    None where they are not."""
    one = tensors[0]
    places = [tensor.data_ptr() for tensor in tensors]
    step = places[1] - places[0]
    storage = one.untyped_storage().data_ptr()
    if step <= 0 or step % one.itemsize or places != list(range(places[0], places[0] + step * len(places), step)):
        return None
    for tensor in tensors:
        alike = tensor.dtype == one.dtype and tensor.shape == one.shape and tensor.stride() == one.stride()
        if not alike or tensor.untyped_storage().data_ptr() != storage:
            return None
    return one.as_strided((len(tensors), *one.shape), (step // one.itemsize, *one.stride()))


def _batches(codec: Codec, names: Iterable[str], coded: Mapping[str, CodedTensor]) -> list[_Batch]:
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        if name in coded:
            spec, parts = coded[name]
            kind = name.rpartition(".")[2], spec.dtype, spec.shape, tuple(parts)
            groups.setdefault(kind if codec.stacks else (name,), []).append(name)
    found: list[_Batch] = []
    for group in groups.values():
        of_each = [coded[name].parts for name in group]
        together = {
            part: stacked([parts[part] for parts in of_each]) if len(group) > 1 else None for part in of_each[0]
        }
        whole = {part: tensor for part, tensor in together.items() if tensor is not None}
        if len(whole) == len(together):
            found.append(_Batch(tuple(group), coded[group[0]].spec, whole))
        else:
            found += [_Batch((name,), coded[name].spec, coded[name].parts) for name in group]
    return found
