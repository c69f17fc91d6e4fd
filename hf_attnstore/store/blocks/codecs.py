"""Codecs: how the tensors of a block are written.

A codec is part of the names of chains (`chain_root`): blocks of two codecs live in one store and never meet. A file
says by which it was written, and which of its tensors are coded.

What a lossy codec makes of a block is the block from then on, in memory as on disk (`as_kept`): what is restored does
not depend on where it comes from. What a lossless one makes is for files; memory keeps what is fastest. A tier may
have a lossless one of its own for what has none (`written_by`): names are of what comes back, not of how it is written.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from ...errors import AttentionStoreError, LoadError
from .block import Block, BlockMeta, TensorSpec, specs_of
from .keys import APART, RAW

if TYPE_CHECKING:
    import torch


class Codec(Protocol):
    """Makes a tensor's parts, which are written in its place, and the tensor of its parts."""

    name: ClassVar[str]
    lossy: ClassVar[bool]
    """Whether `decode` gives something else than `encode` was given. Such a codec gets keys and values of plain
    attention only."""

    stacks: ClassVar[bool]
    """Whether `decode` takes parts and `out` with any number of equal dimensions before their own, too."""

    def encode(self, name: str, tensor: torch.Tensor, meta: BlockMeta) -> Mapping[str, torch.Tensor] | None:
        """Parts by name, without dots, of whatever dtypes and shapes, each contiguous; None where the tensor, `[heads,
        tokens, dim]`, is written as it is. The file has `<tensor>.<part>`, one after the other. Runs in any thread.

        Args:
            name: such as `layers.0.keys`.
        """

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Writes the tensor that `encode` was given, or what comes close to it, into `out`, of its dtype and shape, a
        row of which is contiguous. Always the same for the same parts. Runs in any thread, several at a time.

        Raises:
            LoadError: these are no parts that `encode` makes.
        """


class Raw:
    """Writes tensors as they are."""

    name: ClassVar[str] = RAW
    lossy: ClassVar[bool] = False
    stacks: ClassVar[bool] = False

    def encode(self, name: str, tensor: torch.Tensor, meta: BlockMeta) -> None:
        return None

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        raise LoadError(f"tensors of the codec {self.name!r} have no parts")


_BUILT_IN = {"fp16": "rounding", "int8": "rounding", "int4": "rounding", "int8z": "entropy", "lossless": "entropy"}
"""Modules by the codecs that they register, imported when they are first named."""
_codecs: dict[str, Codec] = {}


def register(codec: Codec) -> None:
    """Makes a codec known by its name, for stores that are to write by it, and for reading what was."""
    _codecs[codec.name] = codec


def codec_named(name: str) -> Codec:
    """A codec that is built in, or was registered.

    Raises:
        LoadError: there is none of that name here. What it wrote is as good as ever for who has it.
    """
    name = name.removesuffix(APART)
    if name not in _codecs and name in _BUILT_IN:
        import_module(f".{_BUILT_IN[name]}", __package__)
    try:
        return _codecs[name]
    except KeyError:
        raise LoadError(f"the codec {name!r} is not known here, only {known_codecs()}", transient=True) from None


def known_codecs() -> list[str]:
    """The names of those that are built in or were registered."""
    return sorted({*_codecs, *_BUILT_IN})


def chosen_codec(name: str) -> str:
    """The name of the codec that a store is to write by.

    Raises:
        AttentionStoreError: there is none of that name, or it needs a package that is not there.
    """
    try:
        return codec_named(name).name
    except LoadError as error:
        raise AttentionStoreError(f"{error}") from None


def tier_codec(name: str) -> Codec:
    """The codec by which a tier writes what has no other; RAW without a name.

    Raises:
        AttentionStoreError: there is none of that name; or what it gives back depends on whether it was in that tier.
    """
    codec = codec_named(chosen_codec(name or RAW))
    if codec.lossy:
        raise AttentionStoreError(
            f"a tier's own codec is without loss, {codec.name!r} is not: an answer would depend on where its KV "
            f"happens to be. `codec={codec.name!r}` is for all tiers."
        )
    return codec


class CodedTensor(NamedTuple):
    """A tensor in host memory as a codec wrote it."""

    spec: TensorSpec
    """What it is decoded to."""
    parts: Mapping[str, torch.Tensor]


@dataclass
class CodedBlock(Block):
    """A block in host memory some tensors of which are coded: `tensors` has their parts, by `<tensor>.<part>`."""

    coded: Mapping[str, CodedTensor] = field(default_factory=dict)
    by: str = RAW
    """The codec that coded them: its chain's, or a tier's own."""
    batches: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False, compare=False)
    """For who decodes it: what it decodes together, by the names of all it wants."""

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        owners = {name: name.rpartition(".")[0] for name in self.tensors}
        found = specs_of(self.tensors)
        names = [owner if (owner := owners[name]) in self.coded else name for name in found]
        return {name: self.coded[name].spec if name in self.coded else found[name] for name in names}

    def spec(self, name: str) -> TensorSpec:
        """One of its tensors.

        Raises:
            LoadError: there is none of that name.
        """
        try:
            return self._specs[name]
        except KeyError:
            raise LoadError(f"{self.path}: there is no tensor {name}") from None

    @property
    def is_whole(self) -> bool:
        return all(spec.shape[1] == self.meta.token_count for spec in self._specs.values())

    @property
    def path(self) -> str:
        """What to call it in errors."""
        return f"block {self.meta.key.hex()}"

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Writes whole tensors, by name, into targets of their dtypes and shapes.

        Raises:
            LoadError: the codec is not known here.
        """
        from .tensors import copy_bytes

        codec = codec_named(self.by)
        for name, target in targets.items():
            if name in self.coded:
                codec.decode(self.coded[name].parts, target)
            else:
                copy_bytes(self.tensors[name], target)

    def fetch(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, torch.Tensor]:
        """Whole tensors in host memory. Raises LoadError: see `read_into`."""
        from .tensors import host_memory

        found = host_memory([self.spec(name) for name in names], pinned=pinned)
        self.read_into(found)
        return found


def encoded(block: Block) -> Block:
    """A block as its codec writes it; itself where that leaves all of it as it is.

    Raises:
        LoadError: the codec is not known here.
    """
    if not block.codable or isinstance(block, CodedBlock):
        return block
    return _coded(block, codec_named(block.meta.codec), block.codable)


def written_by(block: Block, codec: Codec) -> Block:
    """A block as a tier with a lossless codec of its own writes it: itself where another has coded it, or leaves all of
    it as it is."""
    if codec.name == RAW or isinstance(block, CodedBlock) or block.meta.state is not None:
        return block
    block.wait_ready()
    return _coded(block, codec, block.tensors.keys())


def _coded(block: Block, codec: Codec, codable: Container[str]) -> Block:
    from .tensors import copy_bytes, host_memory

    tensors: dict[str, torch.Tensor] = {}
    coded: dict[str, CodedTensor] = {}
    for name, spec in block.specs().items():
        whole = block.tensors[name]
        parts = codec.encode(name, whole, block.meta) if name in codable else None
        if parts is None:
            tensors[name] = whole
        else:
            coded[name] = CodedTensor(spec, parts)
            tensors |= {f"{name}.{part}": made for part, made in parts.items()}
    if not coded:
        return block
    # in one piece of memory: what is left as it is must not keep all of the block's, and evenly spaced parts of layers
    # are decoded together
    room = host_memory(
        [TensorSpec(name, part.dtype, tuple(part.shape)) for name, part in tensors.items()], pinned=False
    )
    for name, part in tensors.items():
        copy_bytes(part.view(-1), room[name].view(-1))
    wholes = {n: CodedTensor(spec, {part: room[f"{n}.{part}"] for part in parts}) for n, (spec, parts) in coded.items()}
    return CodedBlock(block.meta, room, coded=wholes, by=codec.name)


def as_kept(block: Block) -> Block:
    """A block as memory keeps it."""
    return block if as_kept_already(block) else as_written(block)


def as_written(block: Block) -> Block:
    """A block as files keep it."""
    block.wait_ready()
    return encoded(block)


def as_kept_already(block: Block) -> bool:
    """Whether memory keeps a block as it is."""
    return not block.codable or isinstance(block, CodedBlock) or not codec_named(block.meta.codec).lossy


register(Raw())
