"""Codecs: how the tensors of a block are written.

A codec is part of the names of chains (`chain_root`): blocks of two codecs live in one store and never meet. A file
says by which it was written, and which of its tensors are coded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

from ...errors import LoadError
from .block import BlockMeta
from .keys import RAW

if TYPE_CHECKING:
    import torch


class Codec(Protocol):
    """Makes a tensor's parts, which are written in its place, and the tensor of its parts."""

    name: ClassVar[str]

    def encode(self, tensor: torch.Tensor, meta: BlockMeta) -> Mapping[str, torch.Tensor] | None:
        """Parts by name, of whatever dtypes and shapes, each contiguous; None where the tensor, `[heads, tokens, dim]`
        but in checkpoints, is written as it is. The file has `<tensor>.<part>`, one after the other."""

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Writes the tensor that `encode` was given, or what comes close to it, into `out`, of its dtype and shape, a
        row of which is contiguous. Runs in any thread, several at a time.

        Raises:
            LoadError: these are no parts that `encode` makes.
        """


class Raw:
    """Writes tensors as they are."""

    name: ClassVar[str] = RAW

    def encode(self, tensor: torch.Tensor, meta: BlockMeta) -> None:
        return None

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        raise LoadError(f"tensors of the codec {self.name!r} have no parts")


_codecs: dict[str, Codec] = {}


def register(codec: Codec) -> None:
    """Makes a codec known by its name, for stores that are to write by it, and for reading what was."""
    _codecs[codec.name] = codec


def codec_named(name: str) -> Codec:
    """A codec that was registered.

    Raises:
        LoadError: there is none of that name here. What it wrote is as good as ever for who has it.
    """
    try:
        return _codecs[name]
    except KeyError:
        raise LoadError(f"the codec {name!r} is not known here, only {sorted(_codecs)}", transient=True) from None


register(Raw())
