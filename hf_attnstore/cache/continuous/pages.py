"""transformers' paged cache, as far as the store has to know it: where the KV of a request's tokens lies, and which
pages several requests may have.

All that is known of its layout is here. The pages of all layers of one kind of attention lie in one tensor
`[pages, 2 * layers, page_size, kv_heads, head_dim]`, a layer's keys before its values. Where attention slides, a
request's pages are a ring of as many slots as the window has tokens.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash

from ...errors import LoadError, UnsupportedModelError
from ...store.blocks.block import Block
from ..transfer.names import tensor_name

_SLIDING = "sliding_attention"


class _Run(NamedTuple):
    """Tokens of a request that lie one after the other in a page."""

    page: int
    offset: int
    first: int
    """Position of the first of them."""
    tokens: int


class _Part(NamedTuple):
    """Layers one after the other, whose pages lie so too."""

    names: tuple[str, ...]
    """Of their tensors in blocks."""
    in_block: slice
    in_page: slice


class _Group:
    """The pages of all layers of one kind of attention."""

    def __init__(self, allocator: Any) -> None:
        self.allocator = allocator
        self.layers: list[int] = list(allocator.layer_indices)
        self.page_size: int = allocator.tokens_per_page
        self.window: int | None = getattr(allocator, "sliding_window", None)
        heads, dim = allocator.cache_tensor.shape[-2:]
        self.pages: torch.Tensor = allocator.cache_tensor.view(-1, 2 * len(self.layers), self.page_size, heads, dim)
        self.parts = [_part(list(run)) for _, run in groupby(enumerate(self.layers), lambda at: at[1] - at[0])]

    def kept_from(self, stop: int) -> int:
        """Position of the first token whose KV is there still when that of `stop` tokens was written."""
        return max(stop - self.window, 0) if self.window is not None else 0

    def runs(self, request_id: str, start: int, stop: int) -> Iterator[_Run]:
        """Where the tokens `[start, stop)` of a request lie."""
        table = self.allocator.block_table[request_id]
        slots = self.window or stop
        while start < stop:
            slot = start % slots
            number, offset = divmod(slot, self.page_size)
            count = min(stop - start, self.page_size - offset, slots - slot)
            yield _Run(table[number], offset, start, count)
            start += count


def _part(run: list[tuple[int, int]]) -> _Part:
    (place, layer), count = run[0], len(run)
    names = tuple(tensor_name(layer + n, name) for n in range(count) for name in ("keys", "values"))
    return _Part(names, slice(2 * layer, 2 * (layer + count)), slice(2 * place, 2 * (place + count)))


class Pages:
    """The pages of one `PagedAttentionCache`, whose requests share none but by `share` from now on.

    Args:
        block_size: tokens of the store's blocks.
        layers: how many layers the model keeps something of.

    Raises:
        UnsupportedModelError: there are layers whose pages the store can't fill.
    """

    def __init__(self, cache: Any, layers: int, block_size: int) -> None:
        self._cache, self._block_size = cache, block_size
        kinds = set(cache.cache_allocators) - {"full_attention", _SLIDING}
        if kinds:
            raise UnsupportedModelError(f"nothing is known of layers of kind {', '.join(sorted(kinds))}")
        self._groups = [_Group(allocator) for allocator in cache.cache_allocators.values()]
        if sorted(layer for group in self._groups for layer in group.layers) != list(range(layers)):
            raise UnsupportedModelError(f"the model keeps something of {layers} layers, and not all of them have pages")
        self._layers = layers
        self._window = min((group.window for group in self._groups if group.window is not None), default=None)
        if self._window is not None and self._window < block_size:
            raise UnsupportedModelError(
                f"its attention slides over {self._window} tokens, which is less than a block of the store: "
                f"AttentionStore(block_size={self._window}) has smaller ones"
            )
        self._shares = bool(cache.use_prefix_sharing) and len(self._groups) == 1
        cache.use_prefix_sharing = False  # its hashes know neither of users nor of models

    # room

    def holds(self, request_id: str) -> bool:
        """Whether a request has pages: who had to give way for others has none, and is told of it afterwards."""
        return all(request_id in group.allocator.block_table for group in self._groups)

    def has(self, start: int, held: int) -> bool:
        """Whether a request that holds `held` tokens has all layers' KV from position `start` on."""
        return all(start >= group.kept_from(held) for group in self._groups)

    def has_room(self, request: Any, tokens: int) -> bool:
        """Whether there are pages for so many more tokens of a request, without those that are kept for nobody."""
        if self._cache.can_store_request_tokens(request, tokens, dry_run=True):
            return True
        if not self._cache.evict_cached_blocks():
            return False
        self._cache.pool.try_to_free_sectors()
        return bool(self._cache.can_store_request_tokens(request, tokens, dry_run=True))

    def make_room(self, request: Any, tokens: int) -> bool:
        """Gives a request pages for so many more tokens; False if there are none."""
        return self.has_room(request, tokens) and bool(self._cache.can_store_request_tokens(request, tokens))

    def most_at_once(self, held: int) -> int | None:
        """How many tokens of a request that holds `held` may be fed in one batch, if its blocks are to be taken out:
        no more than leave a ring what of the block that is not complete lies in it. None for any number."""
        return self._window - held % self._block_size if self._window is not None else None

    # KV

    def fill(self, request_id: str, block: Block, start: int, stop: int, first: int, held: int) -> int:
        """Puts tokens `[start, stop)` of a block, the first of them at position `first`, into a request's pages.

        Args:
            held: tokens that the request will hold: of older ones than a window has, nothing is put in place.

        Returns:
            The bytes.

        Raises:
            LoadError: the block is not one of this model's.
        """
        nbytes = 0
        for group in self._groups:
            for run in group.runs(request_id, max(first, group.kept_from(held)), first + stop - start):
                cut = slice(start + run.first - first, start + run.first - first + run.tokens)
                page = group.pages[run.page, :, run.offset : run.offset + run.tokens]
                for part in group.parts:
                    nbytes += _put(block, part.names, cut, page[part.in_page])
        return nbytes

    def room(self, tokens: int) -> tuple[int, ...]:
        """The shape of what `take` fills for so many tokens."""
        _, _, _, heads, dim = self._groups[0].pages.shape
        return 2 * self._layers, heads, tokens, dim

    def take(self, request_id: str, start: int, stop: int, target: torch.Tensor) -> None:
        """Copies the KV of a request's tokens `[start, stop)` into a target `[2 * layers, heads, tokens, dim]`."""
        for group in self._groups:
            for run in group.runs(request_id, start, stop):
                page = group.pages[run.page, :, run.offset : run.offset + run.tokens].transpose(1, 2)
                cut = slice(run.first - start, run.first - start + run.tokens)
                for part in group.parts:
                    target[part.in_block, :, cut].copy_(page[part.in_page])

    @property
    def device(self) -> torch.device:
        return self._groups[0].pages.device

    @property
    def dtype(self) -> torch.dtype:
        return self._groups[0].pages.dtype

    def settle(self) -> None:
        """Waits for batches that may still be on their way through."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # pages of several requests

    def share(self, request_id: str, ids: list[int], most: int, salt: int) -> int:
        """Gives a request that has no pages yet those that hold the beginning of its ids already, and were computed
        under the same salt.

        Args:
            most: tokens that it may have then.

        Returns:
            The tokens that they hold.
        """
        if not self._shares:
            return 0
        group = self._groups[0]
        size, ledger = group.page_size, group.allocator.ledger
        found: list[int] = []
        parent = salt
        for start in range(0, most - size + 1, size):
            parent = compute_block_hash(parent, ids[start : start + size])
            page = ledger.hash_to_block.get(parent)
            if page is None:
                break
            found.append(page)
        if found:
            group.allocator.acquire_prefix_blocks(request_id, len(found) * size, found)
        return len(found) * size

    def offer(self, request_id: str, ids: list[int], salt: int) -> None:
        """Offers the pages that hold a request's first tokens, `ids`, to others of the same salt. What others offer
        already it has from now on together with them."""
        if not self._shares:
            return
        group = self._groups[0]
        size, ledger, table = group.page_size, group.allocator.ledger, group.allocator.block_table[request_id]
        parent = salt
        for number in range(len(ids) // size):
            page = table[number]
            digest = ledger.block_to_hash.get(page)
            if digest is None:
                digest = compute_block_hash(parent, ids[number * size : (number + 1) * size])
                other = ledger.register_new_hash(page, digest)
                if other is not None:
                    ledger.acquire(other)
                    table[number] = other
                    if ledger.release(page):
                        group.allocator.pool.free_blocks(group.allocator.index, [page])
            parent = digest

    @property
    def page_size(self) -> int:
        return self._groups[0].page_size


def _put(block: Block, names: tuple[str, ...], cut: slice, target: torch.Tensor) -> int:
    """Copies tokens of a block's tensors into a target `[tensors, tokens, heads, dim]`; returns the bytes."""
    whole = block.together(names)
    if whole is None:
        if len(names) > 1:
            return sum(_put(block, (name,), cut, target[n : n + 1]) for n, name in enumerate(names))
        raise LoadError(f"block {block.meta.key.hex()} has no {names[0]} as pages need it")
    tensors, _, heads, dim = target.shape
    if whole.dtype != target.dtype or whole.shape[::2] != (tensors * heads, dim):
        raise LoadError(f"block {block.meta.key.hex()} has {tuple(whole.shape)} {whole.dtype}: not what pages have")
    source = whole.view(tensors, heads, -1, dim)[:, :, cut]
    target.copy_(source.transpose(1, 2))
    return source.nbytes
