"""Decoding coded blocks into place in host memory, several layers in one go.

A codec's arithmetic on a layer's part of a block takes less time than asking for it. Layers that are put in place
together have parts of equal shapes, evenly spaced in memory: seen as one tensor with a dimension more, they are decoded
together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..blocks.block import TensorSpec
from ..blocks.codecs import Codec, CodedBlock, CodedTensor, codec_named
from ..blocks.stored import Reading, StoredBlock
from ..blocks.tensors import copy_bytes


@dataclass
class _Batch:
    """Tensors that are decoded together."""

    names: list[str]
    spec: TensorSpec
    """Of each."""
    parts: Mapping[str, torch.Tensor]
    """With a dimension more where there are several."""


class Decoding:
    """The targets of a stage, `[heads, tokens, dim]` each, to be decoded into. Used by one thread at a time."""

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        self._targets = targets
        self._alike: tuple[object, Reading, list[_Batch]] | None = None
        """What was made for the last file: blocks alike share the description of their tensors."""

    def bring(self, file: StoredBlock | CodedBlock, start: int, stop: int, first: int) -> None:
        """Puts tokens `[start, stop)` of a coded block, which were checked, in place behind `first` tokens of others.

        Raises:
            LoadError: they can't be read or decoded.
        """
        if isinstance(file, CodedBlock):
            codec, batches = codec_named(file.meta.codec), file.batches
            kept: Mapping[str, torch.Tensor] = file.tensors
            if batches.get(tuple(self._targets)) is None:
                batches[tuple(self._targets)] = _batches(codec, self._targets, file.coded)
            found: list[_Batch] = batches[tuple(self._targets)]
        else:
            codec = codec_named(file.layout.meta.codec)
            if self._alike is None or self._alike[0] is not file.layout.coded:
                reading = file.reading(self._targets)
                self._alike = file.layout.coded, reading, _batches(codec, self._targets, reading.coded)
            _, reading, found = self._alike
            kept = reading.tensors
            file.read_adjacent(list(reading.wanted))
        for batch in found:
            self._decode(codec, batch, start, stop, first)
        for name in self._targets.keys() - file.coded.keys():
            copy_bytes(kept[name][:, start:stop], self._place(name, start, stop, first))

    def _place(self, name: str, start: int, stop: int, first: int) -> torch.Tensor:
        return self._targets[name][:, first : first + stop - start]

    def _decode(self, codec: Codec, batch: _Batch, start: int, stop: int, first: int) -> None:
        places = [self._place(name, start, stop, first) for name in batch.names]
        whole = stop - start == batch.spec.shape[1]
        several = len(places) > 1
        target = (stacked(places) if several else places[0]) if whole else None
        if target is not None:
            codec.decode(batch.parts, target)
            return
        shape = (len(places), *batch.spec.shape) if several else batch.spec.shape
        aside = torch.empty(shape, dtype=batch.spec.dtype)
        codec.decode(batch.parts, aside)
        for place, found in zip(places, aside if several else [aside], strict=True):
            copy_bytes(found[:, start:stop], place)


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
            found.append(_Batch(group, coded[group[0]].spec, whole))
        else:
            found += [_Batch([name], coded[name].spec, coded[name].parts) for name in group]
    return found
