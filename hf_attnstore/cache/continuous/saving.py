"""What is kept of one request of continuous batching, block by block as its pages fill."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ...session.chain import TokenChain
from ...store.blocks.keys import Key
from ...store.records.manifest import Manifest, SpanRow
from ...store.store import AttentionStore
from ..layers.buffers import empty
from ..transfer.save import BlockSaver, Piecewise
from ..transfer.streams import copy_to_host
from .pages import Pages
from .told import Kept


class ComputedBy(NamedTuple):
    """What computes the KV of a request."""

    fingerprint: str
    changes: int
    """How often the model had changed."""


class _Layer:
    """A layer of one request, whose pages are all looked after together."""

    lets_go = False

    def __init__(self, may_be_rounded: bool) -> None:
        self.may_be_rounded = may_be_rounded

    def holds(self, start: int, stop: int) -> bool:
        return True

    def piece(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def tensors(self) -> Iterable[torch.Tensor]:
        return ()

    def keep_until_saved(self, position: int | None) -> None:
        pass


class _PagesSaver(BlockSaver):
    """Takes blocks out of pages, all layers at once."""

    def __init__(self, pages: Pages, request_id: str, layers: list[_Layer], chain: TokenChain, store: AttentionStore,
                 fingerprint: str) -> None:  # fmt: skip
        super().__init__(layers, chain, store, fingerprint)
        self._pages, self._request_id = pages, request_id
        self.held = 0
        """Tokens that the request holds."""

    def _copy_all(self, block: int, *, wait: bool) -> bool:
        start, stop = self._chain.bounds(block)
        if self._stalled or not self._pages.has(start, self.held):
            return False
        shape, dtype = self._pages.room(stop - start), self._pages.dtype
        size = torch.Size(shape).numel() * dtype.itemsize
        if not self._store.reserve(size, wait=wait):
            self._stalled = not wait
            return False
        piecewise = self._open[block] = Piecewise(len(self._layers), size)
        self._pages.settle()
        # what is looked through behind the turns need not be looked through here
        whole = empty(shape, dtype, self._pages.device)
        self._pages.take(self._request_id, start, stop, whole)
        if whole.is_cuda:
            whole = copy_to_host(whole, piecewise.arriving, torch.empty_like)
        parts = whole.unbind(0)
        for number in range(len(self._layers)):
            piecewise.add(number, {"keys": parts[2 * number], "values": parts[2 * number + 1]})
        return True

    def _check(self, made: object) -> None:
        """Is done behind the turns."""


class Saving:
    """What is kept of one request.

    Args:
        may_be_rounded: of each layer, whether a codec may round it.
    """

    def __init__(
        self,
        pages: Pages,
        request_id: str,
        store: AttentionStore,
        root: Key,
        computed_by: ComputedBy,
        may_be_rounded: list[bool],
    ) -> None:
        self.computed_by, self._store, self._pages, self._request_id = computed_by, store, pages, request_id
        self._root, self._may_be_rounded = root, may_be_rounded
        self.salt = salt_of(root)
        self._chain = TokenChain(root, store.block_size, secret=store.secret)
        layers = [_Layer(may) for may in may_be_rounded]
        self._saver = _PagesSaver(pages, request_id, layers, self._chain, store, computed_by.fingerprint)
        self._saver.begin_turn(0, None)
        self._offered = 0
        self.went_on_from: Key | None = None

    def fork(self, request_id: str) -> "Saving":
        """What is kept of a request that goes on from the same pages: what this one has handed over is in the store."""
        return Saving(self._pages, request_id, self._store, self._root, self.computed_by, self._may_be_rounded)

    def is_due(self, held: int) -> bool:
        """Whether a request that holds so many tokens has a block or a page that is complete since it was last asked
        for."""
        size, page = self._store.block_size, self._pages.page_size
        return held // size > len(self._chain) // size or held // page > self._offered // page

    def hand_over(self, ids: list[int], limit: int | None, *, whole: bool) -> Kept | None:
        """Hands over the KV of a request's tokens: all of it, or that of complete blocks.

        Args:
            ids: those whose KV it holds.
            limit: tokens that are kept at most.

        Returns:
            What was handed over, if that is all of it.
        """
        self._pages.offer(self._request_id, ids, self.salt)
        self._offered = self._saver.held = len(ids)
        chain = self._chain
        chain.append(ids[len(chain) : limit])
        if not whole:
            self._saver.begin_forward(chain.full_blocks())
            self._saver.end_forward()
            return None
        saved = self._saver.finish(len(chain))
        numbers = range(-(-saved // chain.block_size))
        rows = [SpanRow(chain.key(n), 0, min(saved, chain.bounds(n)[1]) - chain.bounds(n)[0]) for n in numbers]
        short = saved % chain.block_size > 0
        self._store.used([row.block for row in rows], saved, short=short, went_on_from=self.went_on_from)
        return Kept(self.computed_by.fingerprint, Manifest(tuple(rows), length=len(ids)))

    def release(self) -> None:
        """Nothing more is kept."""
        self._saver.release()


def salt_of(root: Key) -> int:
    """What pages are shared under: the namespace and the model."""
    return int.from_bytes(root[:8], "little")
