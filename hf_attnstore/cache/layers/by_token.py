"""Cache layers that keep something of every token, in tensors grown in place.

A layer holds the KV of positions `[first, length)` in buffers `[batch, heads, capacity, dim]`. New tokens are
written behind the old ones; only when the capacity is used up are the old ones copied, to buffers that are
larger by a constant factor. Layers that keep a running state instead are in `states.py`; `kinds.py` says which class
serves which kind of transformers layer.
"""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ...errors import CacheUseError
from ...store.blocks.block import TensorSpec
from .buffers import GROWTH, none_of, with_capacity
from .kept import KeptLayer
from .shared_memory import is_watched

_CPU = torch.device("cpu")
_NOT_REPLACED = (
    "the keys and values of an AttentionStoreCache can't be replaced, as kvpress and others that shorten caches do: "
    "what they remove would be missing in later turns. Give such a call a cache of its own "
    "(past_key_values=DynamicCache(config=model.config)), or take the store off the model before (detach(model))"
)


class StoreLayer(KeptLayer, CacheLayerMixin):
    """What the kinds that keep something of every token share: the buffers."""

    by_token = True
    is_compileable = False
    is_croppable = True
    is_sliding = False
    _writable_from = 0
    """Position from which the buffers may be written to: what comes before may be read by others."""
    _readers: tuple[tuple[int, weakref.ref[Any]], ...] = ()
    """Who reads the buffers, and up to which position; views of them are found by themselves."""

    def __init__(self) -> None:
        # not CacheLayerMixin's: it assigns keys and values, which are views here
        self._buffers: dict[str, torch.Tensor] = {}

    # tensors

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return bool(self._buffers)

    @property
    def keys(self) -> torch.Tensor | None:
        """`[batch, heads, tokens, dim]`: the tokens that the next forward will see. A view."""
        return self._visible("keys")

    @keys.setter  # type: ignore[override]
    def keys(self, value: torch.Tensor) -> None:
        raise CacheUseError(_NOT_REPLACED)

    @property
    def values(self) -> torch.Tensor | None:
        """`[batch, heads, tokens, dim]`: see `keys`."""
        return self._visible("values")

    @values.setter  # type: ignore[override]
    def values(self, value: torch.Tensor) -> None:
        raise CacheUseError(_NOT_REPLACED)

    @property
    def dtype(self) -> torch.dtype:
        return self._buffers["keys"].dtype

    @property
    def device(self) -> torch.device:
        return self._buffers["keys"].device

    @property
    def rows(self) -> int:
        return self._buffers["keys"].shape[0] if self._buffers else 0

    def _visible(self, name: str) -> torch.Tensor | None:
        if name not in self._buffers:
            return None
        self.settle()
        return self._view(name, self._visible_from())

    def _visible_from(self) -> int:
        return self.first

    def _view(self, name: str, low: int) -> torch.Tensor:
        return self._buffers[name][..., low - self.first : self.length - self.first, :]

    def end_forward(self, count: int) -> None:
        pass

    def piece(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        rows = {name: b[0, ..., start - self.first : stop - self.first, :] for name, b in self._buffers.items()}
        return {name: row.unsqueeze(0) if row.ndim == 2 else row for name, row in rows.items()}

    def holds(self, start: int, stop: int) -> bool:
        return bool(self._buffers) and self.first <= start and stop <= self.length

    # growing

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        states = {"keys": key_states, "values": value_states}
        self._buffers = self._allocate(max(key_states.shape[-2], self.expected), states)

    def _allocate(self, capacity: int, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: with_capacity(tensor, capacity) for name, tensor in like.items()}

    def _make_room(self, tokens: int, like: Mapping[str, torch.Tensor]) -> None:
        """Capacity for `tokens` more, letting go of what is not needed any more."""
        if not self._buffers:
            self._buffers = self._allocate(max(tokens, self.expected - self.first), like)
            self._own_alone()
            return
        one, keys = like["keys"], self._buffers["keys"]
        if one.ndim != keys.ndim:  # restored with a heads dimension that the model does not have
            self._buffers = {name: buffer.squeeze(1) for name, buffer in self._buffers.items()}
        if one.device != keys.device:
            self._buffers = {name: buffer.to(one.device) for name, buffer in self._buffers.items()}
        capacity = self._buffers["keys"].shape[-2]
        if self.length - self.first + tokens <= capacity and self._may_write():
            return
        keep = self._keep_from()
        held = self.length - keep
        old = self._buffers
        wanted = max(held + tokens, min(self.expected - keep, 2 * capacity), int(held * GROWTH))
        grown = self._allocate(wanted, old)
        for name, target in grown.items():
            target[..., :held, :].copy_(old[name][..., keep - self.first : self.length - self.first, :])
        self._buffers, self.first = grown, keep
        self._own_alone()

    # buffers that others may read

    def share(self, tokens: int, reader: weakref.ref[Any]) -> None:
        self._readers = (*self._readers, (tokens, reader))
        self._writable_from = max(self._writable_from, tokens)

    def lend(self) -> None:
        super().lend()
        self._writable_from = sys.maxsize
        self._readers = ()

    def _own_alone(self) -> None:
        self._writable_from, self._readers = 0, ()

    def _may_write(self) -> bool:
        """Whether the buffers may be written to behind what is held."""
        if self.length >= self._writable_from:
            return True
        if self._writable_from == sys.maxsize or any(is_watched(buffer) for buffer in self._buffers.values()):
            return False
        self._readers = tuple((tokens, reader) for tokens, reader in self._readers if reader() is not None)
        self._writable_from = max((tokens for tokens, _ in self._readers), default=0)
        return self.length >= self._writable_from

    def needed_from(self, length: int, whole_from: int) -> int:
        return min(self._window_from(length), whole_from)

    def _window_from(self, length: int) -> int:
        """Position of the first token that queries see which come after `length` tokens."""
        return 0

    def _keep_from(self) -> int:
        """Position of the first token that is still needed."""
        return self.first

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        states = {"keys": key_states, "values": value_states}
        count = key_states.shape[-2]
        self._make_room(count, states)
        slot = self.length - self.first
        for name, state in states.items():
            self._buffers[name][..., slot : slot + count, :].copy_(state)
        self.length += count

    def restore(
        self, first: int, start: int, stop: int, specs: Mapping[str, TensorSpec], device: torch.device | None
    ) -> dict[str, torch.Tensor]:
        if start == first:
            like = {name: none_of(s.shape[0], s.shape[-1], s.dtype, device or _CPU) for name, s in specs.items()}
            self._buffers, self.first, self.length = {}, first, first
            self.expected = max(self.expected, stop)
            self._make_room(stop - first, like)
        else:
            self.length = start
            self._make_room(stop - start, self._buffers)
        self.length = stop
        return self.piece(start, stop)

    def restore_into(self, buffers: dict[str, torch.Tensor], stop: int) -> None:
        """As `restore` of all positions up to `stop`, in buffers `[1, heads, capacity, dim]` that are there already."""
        self._buffers, self.first, self.length = buffers, 0, stop
        self.expected = max(self.expected, stop)
        self._own_alone()

    # rows of a batch

    def put_together(self, rows: Sequence[Any], pads: Sequence[int], end: int) -> None:
        low = self._window_from(end)
        self.reset()
        for number, (row, pad) in enumerate(zip(rows, pads, strict=True)):
            row.settle()
            first = max(low, pad)
            if pad < end and not row.holds(first - pad, end - pad):
                raise AssertionError(f"row {number} does not hold tokens {first - pad} to {end - pad}")
            for name, states in row.columns(0, first - pad, end - pad).items() if pad < end else ():
                self._slot(name, len(rows), low, end, states)[number : number + 1, ..., first - low :, :].copy_(states)
        self.first, self.length = low, end

    def _slot(self, name: str, rows: int, low: int, end: int, like: torch.Tensor) -> torch.Tensor:
        """The part of a new buffer for columns `[low, end)`, `[rows, heads, columns, dim]`; zeros where nothing was
        put yet: what is masked must be finite."""
        if name not in self._buffers:
            one = like[:1, ..., :0, :].expand(rows, *like.shape[1:-2], 0, like.shape[-1])
            self._buffers[name] = with_capacity(one, max(self.expected, end) - low)
            self._buffers[name][..., : end - low, :].zero_()
        return self._buffers[name][..., : end - low, :]

    def columns(self, place: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        """What one row holds of positions `[start, stop)`, each tensor `[1, heads, tokens, dim]`. Views."""
        low, high = start - self.first, stop - self.first
        return {name: buffer[place : place + 1, ..., low:high, :] for name, buffer in self._buffers.items()}

    def take_row(self, batch: Any, place: int, start: int, stop: int, *, states: bool) -> None:
        self._absorb(batch.columns(place, start, stop))

    def _absorb(self, states: Mapping[str, torch.Tensor]) -> None:
        """Adds what was computed elsewhere for new tokens, as from `columns`."""
        self.settle()
        self._append(states["keys"], states["values"])

    def keep_from(self, position: int) -> None:
        if self.first < position < self.length:
            kept = {name: buffer[..., position - self.first :, :].clone() for name, buffer in self._buffers.items()}
            self._buffers, self.first = kept, position

    # the contract of a transformers layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the KV of new tokens, each `[batch, heads, tokens, dim]`; returns all that the queries may see."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens; 0 removes none."""
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        self.settle()
        self.crop_to(max(0, self.length + tokens_to_remove))

    def crop_to(self, length: int) -> None:
        self.length = min(self.length, length)
        if self.length == 0:
            self.reset()

    def reset(self) -> None:
        self.pending = None
        self._buffers = {}
        self.first = self.length = 0
        self._own_alone()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select_rows(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select_rows(lambda buffer: buffer[indices, ...])

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.get_seq_length() == 0:
            return
        self.settle()
        with torch.inference_mode(False):
            self._buffers = {name: select(buffer) for name, buffer in self._buffers.items()}
        self._own_alone()


class FullLayer(StoreLayer):
    """Full attention: every token stays."""

    def expect(self, tokens: int) -> None:
        self.expected = tokens

    def is_whole(self, length: int) -> bool:
        return super().is_whole(length) and self.first == 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pending is not None:
            self.settle()
        self._append(key_states, value_states)
        return self._view("keys", self.first), self._view("values", self.first)


class SlidingLayer(StoreLayer):
    """Sliding window: queries see the last `window - 1` tokens before them.

    Tokens that fall out of the window are kept until the store has them (`saved_to`), and until `crop` while the
    past is being recorded.
    """

    is_sliding = True
    lets_go = True

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.sliding_window = window  # the name under which transformers looks for it
        self.record_past = False
        self.saved_to: int | None = None
        """Position up to which the store has the KV; None if it will not have any."""
        self._recorded_from = 0

    def _window_from(self, length: int) -> int:
        return max(length - (self.window or 0) + 1, 0)

    def _visible_from(self) -> int:
        return max(self._recorded_from if self.record_past else self._window_from(self.length), self.first)

    def _keep_from(self) -> int:
        keep = self._window_from(self.length)
        if self.record_past:
            keep = min(keep, self._recorded_from)
        if self.saved_to is not None:
            keep = min(keep, self.saved_to)
        return max(keep, self.first)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.settle()
        low = self._window_from(self.length)
        self._append(key_states, value_states)
        return self._view("keys", low), self._view("values", low)

    def get_max_length(self) -> int:
        return self.window or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = self._window_from(self.length)
        return self.length - offset + query_length, offset

    def keep_until_saved(self, position: int | None) -> None:
        self.saved_to = position

    def is_whole(self, length: int) -> bool:
        return super().is_whole(length) and self.may_crop_to(length)

    def forget_past(self) -> None:
        self.record_past = False

    def activate_past_recording(self) -> None:
        """From now on every token stays until the next `crop`, so that it can go back."""
        self.record_past = True
        self._recorded_from = max(self._window_from(self.length), self.first)

    def may_crop_to(self, length: int) -> bool:
        return length == 0 or (
            self.first <= self._window_from(length) and length <= self.length and self.is_initialized
        )

    def crop_to(self, length: int) -> None:
        super().crop_to(length)
        self._recorded_from = max(self._window_from(self.length), self.first)
