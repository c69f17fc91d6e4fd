"""What a cache asks of its layers, whatever they keep: the one protocol of all kinds."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch

from ...store.blocks.block import TensorSpec
from .shared_memory import is_watched

_PLAIN = (int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, weakref.ref)


class UnknownAttributeError(Exception):
    """A layer has an attribute that nobody knows how to hand over."""


class KeptLayer:
    """A layer of a cache. As it stands here, one of which nothing is kept by token."""

    by_token = False
    """Whether it keeps something of every token, so that it can go back to any of them."""
    has_state = False
    """Whether it keeps a running state, which is right for one number of tokens only."""
    fits_batches = True
    """Whether several rows of different lengths can be put together of layers of one row each."""
    reusable = True
    """Whether what it keeps can be put back into it. False for kinds of layers that nobody knows."""
    may_be_rounded = False
    """Whether what it keeps by token are keys and values of plain attention: of these lossy codecs were measured."""
    lets_go = False
    """Whether it lets go of tokens that queries do not see any more: not before the store has them."""
    kind = ""
    """The name of its kind, as transformers' configurations have it."""
    window: int | None = None
    """Tokens that queries see, their own included; None for all."""
    first = 0
    """Position of the first token held."""
    length = 0
    """One past the position of the last token: what the layer counts as its sequence length."""
    expected = 0
    """Tokens that the layer will need to hold, as far as known: no growing before that."""
    pending: Callable[[], None] | None = None
    """Waits until what was to be loaded is in place."""

    @property
    def rows(self) -> int:
        """The batch size; 0 before the first token."""
        return 0

    def settle(self) -> None:
        """Waits for what is still on its way.

        Raises:
            LoadError: it will not come.
        """
        if self.pending is not None:
            self.pending()
            self.pending = None  # not before: what an interrupt leaves half done is not to be taken for complete

    def reset(self) -> None:
        """Lets go of everything."""
        self.pending = None
        self.length = 0

    def expect(self, tokens: int) -> None:
        """Sets how many tokens the layer will need to hold, where it has room made for them at once."""

    def end_forward(self, count: int) -> None:
        """A forward of so many tokens has ended: for layers that do not see every token."""
        self.length += count

    # reuse

    def needed_from(self, length: int, whole_from: int) -> int:
        """Position from which KV is needed to go on at `length`, and to save the block that begins at `whole_from`."""
        return length

    def missing_from(self, length: int, whole_from: int) -> int:
        """Position from which KV must be loaded to go on at `length`; `length` if nothing must be."""
        need = self.needed_from(length, whole_from)
        if self.rows and self.first <= need < self.length:
            return min(self.length, length)
        return need

    def may_crop_to(self, length: int) -> bool:
        """Whether the layer still has what it would show if it were cropped to `length`."""
        return True

    def crop_to(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        self.length = min(self.length, length)

    def forget_past(self) -> None:
        """Lets go of what was kept for going back."""

    def restore(
        self, first: int, start: int, stop: int, specs: Mapping[str, TensorSpec], device: torch.device | None
    ) -> dict[str, torch.Tensor]:
        """Makes the layer hold positions `[first, stop)` in one row, of which `[start, stop)` are about to arrive.

        Args:
            specs: by name, what there is to arrive.

        Returns:
            Where they go, by name, each `[heads, stop - start, dim]`.
        """
        self.length = stop
        return {}

    # saving

    def piece(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """The first row's KV of positions `[start, stop)`, each tensor `[heads, tokens, dim]`. Views."""
        return {}

    def holds(self, start: int, stop: int) -> bool:
        """Whether all that `piece` would give is there."""
        return True

    def keep_until_saved(self, position: int | None) -> None:
        """What comes from `position` on is not let go before the store has it; None if it will not have any."""

    # rows of a batch

    def put_together(self, rows: Sequence[Any], pads: Sequence[int], end: int) -> None:
        """Holds what layers of one row each hold, as its own rows, each behind so many columns of padding, up to
        column `end`."""
        self.length = end

    def take_row(self, batch: Any, place: int, start: int, stop: int, *, states: bool) -> None:
        """Adds what a batch's layer computed in the row `place` for columns `[start, stop)`.

        Args:
            states: whether the batch's running states are those after the last of them.
        """
        self.length += stop - start

    def keep_from(self, position: int) -> None:
        """Lets go of what comes before a position, where that can be done."""

    # handing over

    def twin(self) -> Self:
        """A layer with the same tensors, of which everything else is its own.

        Raises:
            UnknownAttributeError: the layer has attributes of a kind that may be shared without anybody seeing it.
        """
        made = object.__new__(type(self))
        made.__dict__.update({name: _same(value) for name, value in self.__dict__.items()})
        return made

    def take_over(self, other: "KeptLayer") -> None:
        """Becomes what `other`, of the same class, is; nobody may use that any more."""
        self.__dict__.clear()
        self.__dict__.update(other.__dict__)

    def is_whole(self, length: int) -> bool:
        """Whether the layer has all that is needed to go on at `length`, and nothing on its way."""
        return self.pending is None and self.reusable and self.length >= length

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that is allocated for it, spare capacity included."""
        yield from _tensors(self.__dict__)

    def lend(self) -> None:
        """The tensors are another's now: they may be read, and are copied before anything is written."""
        self.own_states()

    def share(self, tokens: int, reader: "weakref.ref[Any]") -> None:
        """The tensors were another's, who may go on reading the first `tokens` tokens while there is a `reader`, and
        as long as somebody has views of them: these are not overwritten."""

    def own_states(self, *, watched_only: bool = False) -> None:
        """Makes tensors that are overwritten, and not only written to behind their end, the layer's own.

        Args:
            watched_only: only those that somebody else has a view of.
        """
        for name, value in self.__dict__.items():
            if name not in self._behind_their_end:
                self.__dict__[name] = _own(value, watched_only)

    _behind_their_end: frozenset[str] = frozenset({"_buffers", "_fresh"})
    """Attributes whose tensors are written to behind their end only, or never."""


def _same(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, *_PLAIN)):
        return value
    if isinstance(value, dict):
        return {key: _same(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_same(item) for item in value)
    if hasattr(value, "twin"):
        return value.twin()
    raise UnknownAttributeError(f"a layer has a {type(value).__name__}")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif hasattr(value, "tensors"):
        yield from value.tensors()


def _own(value: Any, watched_only: bool) -> Any:
    if isinstance(value, torch.Tensor):
        with torch.inference_mode(False):
            return value.clone() if not watched_only or is_watched(value) else value
    if isinstance(value, dict):
        return {key: _own(item, watched_only) for key, item in value.items()}
    if isinstance(value, list):
        return [_own(item, watched_only) for item in value]
    return value.owned(watched_only) if hasattr(value, "owned") else value
