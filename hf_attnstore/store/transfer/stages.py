"""What a load brings, stage by stage, and where it comes from."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import NamedTuple

import torch

from ...errors import LoadError
from ..blocks.block import Block
from ..blocks.codecs import CodedBlock
from ..blocks.keys import Key
from ..blocks.stored import StoredBlock
from ..blocks.tier import Source


class Piece(NamedTuple):
    """Tokens `[start, stop)` of a block."""

    key: Key
    start: int
    stop: int
    shift: int = 0
    """How far its keys are to be moved, for the stage's `arrived`."""

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class Stage:
    """What arrives together: the same pieces of several tensors.

    A target is `[heads, tokens, dim]`, of the stored dtype, with the tokens of all pieces one after the other;
    within a head it is contiguous. All targets of a stage lie on one device.
    """

    pieces: Sequence[Piece] = ()
    targets: Mapping[str, torch.Tensor] = field(default_factory=dict)
    arrived: Callable[[int, Mapping[str, torch.Tensor]], None] | None = None
    """Called with a shift and the part of every target that is to be moved by it, `[heads, tokens, dim]`, once that
    is there, to move it in place; on the stream that brought it."""
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Contiguous targets that take tensors of `checkpoint` as they are, of whatever shape."""
    checkpoint: Key = b""
    joint: "Joint | None" = None
    """What it and those after it have in common, in the first of them."""

    @property
    def in_host_memory(self) -> bool:
        """Whether the targets lie there, or there are none."""
        target = next(iter(self.targets.values() or self.whole.values()), None)
        return target is None or target.device.type == "cpu"

    def all_targets(self) -> Iterator[torch.Tensor]:
        return chain(self.targets.values(), self.whole.values())

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.all_targets())

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all targets."""
        return sum(target.nbytes // max(target.shape[1], 1) for target in self.targets.values())

    def needs(self) -> list[Key]:
        """The blocks that it needs."""
        return [piece.key for piece in self.pieces] + ([self.checkpoint] if self.whole else [])

    @property
    def arrivals(self) -> int:
        """How many blocks it needs."""
        return len(self.pieces) + bool(self.whole)

    def parts(self) -> list[dict[str, torch.Tensor]]:
        """The targets, cut into pieces."""
        return self._cut([piece.tokens for piece in self.pieces])

    def join(self, runs: Sequence["Run"]) -> None:
        """Puts the pieces in place that blocks in memory have."""
        for name, target in self.targets.items():
            for run in runs:
                run.join([block.tensors[name] for block, _ in run.parts], target)

    def finish(self) -> None:
        """Moves what is to be moved, all pieces being there: neighbours that go equally far in one go."""
        if self.arrived is not None:
            runs = [(shift, sum(p.tokens for p in run)) for shift, run in groupby(self.pieces, lambda p: p.shift)]
            for (shift, _), part in zip(runs, self._cut([tokens for _, tokens in runs]), strict=True):
                if shift:
                    self.arrived(shift, part)

    def _cut(self, sizes: list[int]) -> list[dict[str, torch.Tensor]]:
        cut = {name: target.split(sizes, dim=1) for name, target in self.targets.items()}
        return [{name: parts[number] for name, parts in cut.items()} for number in range(len(sizes))]


@dataclass(slots=True)
class Joint:
    """Stages one after the other, of the same pieces and without a checkpoint, whose targets lie together in host
    memory. They are put in place in one go: to copy or read in small parts takes half as long again."""

    names: tuple[str, ...]
    """Those of all targets, in the order in which they lie."""
    target: torch.Tensor
    """All of them, `[all their heads, tokens, dim]`."""
    stages: int

    def join(self, runs: Sequence["Run"]) -> bool:
        """Puts the pieces in place that blocks in memory have. False where these do not lie together: then nothing was
        done."""
        found: list[list[torch.Tensor]] = []
        for run in runs:
            wholes = [block.together(self.names) for block, _ in run.parts]
            found.append([whole for whole in wholes if whole is not None and self._fits(whole)])
            if len(found[-1]) < len(wholes):
                return False
        for run, tensors in zip(runs, found, strict=True):
            run.join(tensors, self.target)
        return True

    def _fits(self, whole: torch.Tensor) -> bool:
        target = self.target
        return whole.dtype == target.dtype and whole.shape[::2] == target.shape[::2]


@dataclass(slots=True)
class Run:
    """Pieces one after the other whose blocks are all in memory."""

    first: int
    """Tokens of the stage before it."""
    tokens: int = 0
    parts: list[tuple[Block, slice | None]] = field(default_factory=list)
    """Blocks, and what is wanted of them: most are wanted whole, and to slice for nothing takes its time."""

    def join(self, tensors: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        """Puts what is wanted of the blocks' tensors, each `[heads, tokens, dim]`, into its place in a target."""
        cuts = [tensor if cut is None else tensor[:, cut] for tensor, (_, cut) in zip(tensors, self.parts, strict=True)]
        torch.cat(cuts, dim=1, out=target[:, self.first : self.first + self.tokens])


class FilePiece(NamedTuple):
    """A piece whose block is on disk, or in memory and coded."""

    piece: Piece
    tier: str
    file: StoredBlock | CodedBlock
    first: int
    """Tokens of the stage before it."""


class Ways:
    """How the pieces of a stage get to host memory; found once for all stages that have the same pieces."""

    def __init__(self, pieces: Sequence[Piece], sources: Mapping[Key, tuple[str, Source]]) -> None:
        """Waits for blocks that are still arriving from an accelerator.

        Raises:
            LoadError: a block in memory is not what its name says.
        """
        self.runs: list[Run] = []
        self.files: list[FilePiece] = []
        self.tokens_from: Counter[str] = Counter()
        """Tokens by tier."""
        first = 0
        for piece in pieces:
            tier, source = sources[piece.key]
            self.tokens_from[tier] += piece.tokens
            if isinstance(source, (StoredBlock, CodedBlock)):
                self.files.append(FilePiece(piece, tier, source, first))
            else:
                source.wait_ready()
                count = source.meta.token_count
                # of a block that is too short or too long, the next ones would be put in the wrong places
                if piece.stop > count or not source.is_whole:
                    raise LoadError(f"block {piece.key.hex()} has other tokens than it should have")
                if not self.runs or self.runs[-1].first + self.runs[-1].tokens != first:
                    self.runs.append(Run(first))
                run = self.runs[-1]
                run.tokens += piece.tokens
                run.parts.append((source, None if piece.tokens == count else slice(piece.start, piece.stop)))
            first += piece.tokens
