"""Layers that keep further tensors by token beside keys and values: those of an indexer that chooses what to attend."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...errors import CacheUseError
from ...store.blocks.block import TensorSpec
from .buffers import grown, none_of
from .by_token import FullLayer
from .shared_memory import is_watched


class Track:
    """One tensor by token, `[batch, heads, tokens, dim]`, grown in place."""

    def __init__(self, buffer: torch.Tensor | None = None, length: int = 0) -> None:
        self.length = length
        self._buffer = buffer

    def append(self, states: torch.Tensor) -> None:
        """Adds the states of new tokens."""
        count = states.shape[-2]
        self._buffer = grown(self._buffer, self.length, count, states)
        self._buffer[..., self.length : self.length + count, :].copy_(states)
        self.length += count

    @property
    def buffer(self) -> torch.Tensor | None:
        """Where the states are, with spare capacity; None before the first."""
        return self._buffer

    def twin(self) -> "Track":
        """A track with the same buffer."""
        return Track(self._buffer, self.length)

    def tensors(self) -> Iterator[torch.Tensor]:
        """The buffer, if there is one."""
        if self._buffer is not None:
            yield self._buffer

    def owned(self, watched_only: bool) -> "Track":
        """A track with a buffer of its own, unless nobody else has a view of it and that is enough."""
        if self._buffer is None or (watched_only and not is_watched(self._buffer)):
            return self
        with torch.inference_mode(False):
            return Track(self._buffer.clone(), self.length)

    @property
    def states(self) -> torch.Tensor:
        """All states held. A view."""
        assert self._buffer is not None
        return self._buffer[..., : self.length, :]

    def make_room(self, start: int, stop: int, spec: TensorSpec, device: torch.device | None) -> None:
        """Holds `[0, stop)` in one row, of which `[start, stop)` are about to arrive."""
        like = none_of(spec.shape[0], spec.shape[-1], spec.dtype, device or torch.device("cpu"))
        self._buffer = grown(self._buffer if start else None, start, stop - start, like)
        self.length = stop

    def select(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._buffer is not None:
            self._buffer = choose(self._buffer)


class TrackLayer(FullLayer):
    """Full attention with tracks beside keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self._tracks: dict[str, Track] = {}

    def _add(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Adds the states `[batch, heads, tokens, dim]` of new tokens to a track; returns all of it."""
        self.settle()
        track = self._tracks.setdefault(name, Track())
        track.append(states)
        return track.states

    def _all(self, name: str) -> torch.Tensor | None:
        self.settle()
        return self._tracks[name].states if name in self._tracks else None

    def end_forward(self, count: int) -> None:
        for name, track in self._tracks.items():
            if track.length != self.length:
                raise CacheUseError(f"a layer has {track.length} {name} for {self.length} tokens: it can't be kept")

    def piece(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        tracks = {name: track.states[0, ..., start:stop, :] for name, track in self._tracks.items()}
        return {**super().piece(start, stop), **tracks}

    def holds(self, start: int, stop: int) -> bool:
        return super().holds(start, stop) and all(stop <= track.length for track in self._tracks.values())

    def restore(
        self, first: int, start: int, stop: int, specs: Mapping[str, TensorSpec], device: torch.device | None
    ) -> dict[str, torch.Tensor]:
        own = {name: spec for name, spec in specs.items() if name in ("keys", "values")}
        if start == first:
            self._tracks = {}
        for name in specs.keys() - own.keys():
            self._tracks.setdefault(name, Track()).make_room(start, stop, specs[name], device)
        super().restore(first, start, stop, own, device)
        return self.piece(start, stop)

    def put_together(self, rows: Sequence[Any], pads: Sequence[int], end: int) -> None:
        super().put_together(rows, pads, end)
        # what the rows had of tracks is in buffers now
        tracks = {name: buffer for name, buffer in self._buffers.items() if name not in ("keys", "values")}
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name not in tracks}
        self._tracks = {name: Track(buffer, end) for name, buffer in tracks.items()}

    def columns(self, place: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        tracks = {name: track.states[place : place + 1, ..., start:stop, :] for name, track in self._tracks.items()}
        return {**super().columns(place, start, stop), **tracks}

    def _absorb(self, states: Mapping[str, torch.Tensor]) -> None:
        super()._absorb(states)
        for name in states.keys() - {"keys", "values"}:
            self._add(name, states[name])

    def keep_from(self, position: int) -> None:
        """Tracks are kept whole."""

    def crop_to(self, length: int) -> None:
        super().crop_to(length)
        for track in self._tracks.values():
            track.length = min(track.length, length)

    def reset(self) -> None:
        super().reset()
        self._tracks = {}

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._select_rows(select)
        with torch.inference_mode(False):
            for track in self._tracks.values():
                track.select(select)


class IndexedLayer(TrackLayer):
    """`indexed_attention`: keys of an indexer, and in some models the positions that they were made for."""

    @property
    def is_indexer_initialized(self) -> bool:
        """Whether there are indexer keys."""
        return "indexer_keys" in self._tracks

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        """`[batch, tokens, dim]`. A view."""
        states = self._all("indexer_keys")
        return states[:, 0] if states is not None else None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Adds the indexer's keys of new tokens, `[batch, tokens, dim]`; returns all of them."""
        return self._add("indexer_keys", indexer_key_states[:, None])[:, 0]

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        """`[kinds of positions, batch, tokens]`. A copy; set it to what was there with more at the end."""
        states = self._all("indexer_position_ids")
        return states[..., 0].transpose(0, 1) if states is not None else None

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: torch.Tensor) -> None:
        track = self._tracks.get("indexer_position_ids")
        new = positions[..., track.length if track is not None else 0 :]
        self._add("indexer_position_ids", new.transpose(0, 1)[..., None])


class SparseIndexLayer(TrackLayer):
    """`minimax_m3_sparse`: index keys that choose which blocks to attend."""

    @property
    def idx_keys(self) -> torch.Tensor | None:
        """`[batch, heads, tokens, dim]`. A view."""
        return self._all("idx_keys")

    def update_index(self, idx_k: torch.Tensor, *_: Any) -> torch.Tensor:
        """Adds the index keys of new tokens, `[batch, heads, tokens, dim]`; returns all of them."""
        return self._add("idx_keys", idx_k)
