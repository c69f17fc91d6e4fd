"""Positional geometry: how stored keys and values depend on position, and how to move them to another one.

Rotary embeddings turn pairs of channels by an angle proportional to the position, so what was made for one position
can be turned on to any other (Su et al. 2021, "RoFormer", eq. 34). `probing` finds out which channels of which
tensors a model turns, and how fast.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

_MAX_TABLES = 64


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one cached tensor of one layer turns with position."""

    frequencies: torch.Tensor
    """`[pairs]`, float64, on the CPU: radians per token of each pair of channels."""
    offset: int
    """First channel that turns."""
    interleaved: bool
    """Whether pair i is channels (offset + 2i, offset + 2i + 1); else it is (offset + i, offset + pairs + i)."""
    _tables: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        """Number of channels that turn."""
        return 2 * len(self.frequencies)

    def same(self, other: "Rotation | None") -> bool:
        """Whether both turn alike."""
        return (
            other is not None
            and (self.offset, self.interleaved, self.width) == (other.offset, other.interleaved, other.width)
            and torch.allclose(self.frequencies, other.frequencies, rtol=1e-4, atol=0)
        )

    def tables(self, shift: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine `[pairs]` (float32) of the turn by `shift` positions; the angles are float64."""
        wanted = (shift, torch.device(device))
        found = self._tables.get(wanted)
        if found is None:
            with torch.inference_mode(False):
                angles = self.frequencies * shift
                found = angles.cos().float().to(device), angles.sin().float().to(device)
            if found[0].is_cuda:  # the next to use them may be on another stream
                torch.cuda.current_stream(found[0].device).synchronize()
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            self._tables[wanted] = found
        if found[0].is_cuda:
            for table in found:  # not to be used again for something else before this stream is done with it
                table.record_stream(torch.cuda.current_stream(table.device))
        return found

    @torch.no_grad()
    def rotate_(self, states: torch.Tensor, shift: int) -> None:
        """Moves `states`, `[..., tokens, dim]` of any float dtype, by `shift` positions, in place.

        Computes in float32 (float64 stays float64) and rounds once.
        """
        if shift == 0 or not len(self.frequencies):
            return
        part = states[..., self.offset : self.offset + self.width]
        if states.dtype == torch.float64:
            angles = (self.frequencies * shift).to(states.device)
            cos, sin = angles.cos(), angles.sin()
            work = part
        else:
            cos, sin = self.tables(shift, states.device)
            work = part.float()
        if self.interleaved:
            if not _pairs_are_complex(work):
                work = work.clone(memory_format=torch.contiguous_format)
            torch.view_as_complex(work.unflatten(-1, (-1, 2))).mul_(torch.complex(cos, sin))
        else:
            first, second = work.chunk(2, dim=-1)
            turned = first * sin
            first.mul_(cos).addcmul_(second, sin, value=-1)
            second.mul_(cos).add_(turned)
        if work is not part:
            part.copy_(work)

    def __str__(self) -> str:
        style = "interleaved" if self.interleaved else "half-split"
        turning = self.frequencies[self.frequencies != 0].abs()
        if not len(turning):
            return "no rotation"
        shortest, longest = (2 * math.pi / float(f) for f in (turning.max(), turning.min()))
        last = self.offset + self.width
        return f"RoPE, {style}, channels {self.offset}–{last}, periods {shortest:,.3g} … {longest:,.0f} tokens"

    def to_json(self) -> dict[str, Any]:
        """JSON values, for `from_json`."""
        return {
            "frequencies": self.frequencies.tolist(),
            "offset": self.offset,
            "interleaved": self.interleaved,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Rotation":
        frequencies = torch.tensor(saved["frequencies"], dtype=torch.float64)
        return cls(frequencies, int(saved["offset"]), bool(saved["interleaved"]))


@dataclass(frozen=True, eq=False)
class LayerGeometry:
    """How a layer's cached tensors turn; None for one that does not depend on position."""

    keys: Rotation | None
    values: Rotation | None

    def same(self, other: "LayerGeometry") -> bool:
        """Whether both turn alike."""
        pairs = ((self.keys, other.keys), (self.values, other.values))
        return all(b is None if a is None else a.same(b) for a, b in pairs)

    def __str__(self) -> str:
        parts = [f"{name} {r}" for name, r in (("keys", self.keys), ("values", self.values)) if r is not None]
        return "; ".join(parts) or "no positions"


@dataclass(frozen=True, eq=False)
class Geometry:
    """The verdict on a model."""

    layers: tuple[LayerGeometry, ...]
    refused: str = ""
    """Why stored keys can't be moved; empty if they can."""

    @property
    def movable(self) -> bool:
        """Whether stored keys can be moved to other positions."""
        return not self.refused

    def describe(self) -> str:
        """A few lines for a person; layers that are alike are put together."""
        if self.refused:
            return f"not movable: {self.refused}"
        kinds: list[tuple[LayerGeometry, list[int]]] = []
        for number, layer in enumerate(self.layers):
            known = next((numbers for kind, numbers in kinds if kind.same(layer)), None)
            if known is None:
                kinds.append((layer, [number]))
            else:
                known.append(number)
        return "\n".join(f"{_ranges(numbers)}: {kind}" for kind, numbers in kinds)

    def to_json(self) -> dict[str, Any]:
        """JSON values, for `from_json`."""
        layers = [
            {name: r and r.to_json() for name, r in (("keys", layer.keys), ("values", layer.values))}
            for layer in self.layers
        ]
        return {"layers": layers, "refused": self.refused}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Geometry":
        layers = [
            LayerGeometry(*(layer[name] and Rotation.from_json(layer[name]) for name in ("keys", "values")))
            for layer in saved["layers"]
        ]
        return cls(tuple(layers), str(saved["refused"]))


def _pairs_are_complex(states: torch.Tensor) -> bool:
    """Whether neighbouring channels can be seen as complex numbers where they lie."""
    *strides, last = states.stride()
    return last == 1 and states.storage_offset() % 2 == 0 and all(stride % 2 == 0 for stride in strides)


def _ranges(numbers: list[int]) -> str:
    """Layer numbers in words: "layers 0–3, 5"."""
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"
