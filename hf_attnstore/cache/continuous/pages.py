"""transformers' paged cache, as far as the store has to know it: where the KV of a request's tokens lies.

All that is known of its layout is here. A full-attention layer has two views of one tensor, keys and values, each
`[rows, kv_heads, head_dim]`, in which a page of a request's tokens lies together.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ...errors import UnsupportedModelError

Runs = list[tuple[slice, slice]]
"""Tokens of a range, and the rows in which they lie, one after the other."""


class Pages:
    """The pages of one `PagedAttentionCache`.

    Args:
        may_be_rounded: of each layer that the model keeps something of, whether a codec may round it.

    Raises:
        UnsupportedModelError: there are layers whose pages the store can't fill.
    """

    def __init__(self, cache: Any, may_be_rounded: list[bool]) -> None:
        self._cache, self.may_be_rounded = cache, may_be_rounded
        layers = len(may_be_rounded)
        kinds = list(cache.cache_allocators)
        if kinds != ["full_attention"]:
            raise UnsupportedModelError(f"layers of kind {', '.join(kinds)} are not only those of full attention")
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for allocator in cache.cache_allocators.values():
            self._views |= allocator._kv_token_views
        if sorted(self._views) != list(range(layers)):
            raise UnsupportedModelError(
                f"{len(self._views)} layers have pages, and the model keeps something of {layers}"
            )

    @property
    def layers(self) -> int:
        return len(self._views)

    def holds(self, request_id: str) -> bool:
        """Whether a request has pages: who had to give way for others has none, and is told of it afterwards."""
        return all(request_id in allocator.block_table for allocator in self._cache.cache_allocators.values())

    def make_room(self, request: Any, tokens: int) -> bool:
        """Gives a request pages for so many more tokens; False if there are none."""
        return bool(self._cache.can_store_request_tokens(request, tokens))

    def runs(self, request_id: str, start: int, stop: int) -> Runs:
        """Where the tokens `[start, stop)` of a request lie."""
        rows: list[list[int]] = [[]]
        self._cache.extend_read_and_write_indices(request_id, start, stop - start, None, rows)
        found = np.array(rows[0])
        ends = [0, *(np.flatnonzero(np.diff(found) != 1) + 1).tolist(), len(found)]
        return [(slice(a, b), slice(int(found[a]), int(found[a]) + b - a)) for a, b in pairwise(ends)]

    def staging(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        """Host memory for the KV of so many tokens of a layer, as blocks have it: `[kv_heads, tokens, head_dim]`."""
        return {
            name: torch.empty((view.shape[1], tokens, view.shape[2]), dtype=view.dtype)
            for name, view in zip(("keys", "values"), self._views[layer], strict=True)
        }

    def fill(self, layer: int, runs: Runs, tensors: dict[str, torch.Tensor]) -> None:
        """Puts the KV of a layer, as `staging` has it, in its place."""
        for name, view in zip(("keys", "values"), self._views[layer], strict=True):
            by_token = tensors[name].transpose(0, 1)
            for tokens, rows in runs:
                view[rows].copy_(by_token[tokens])

    def take(self, layer: int, runs: Runs) -> dict[str, torch.Tensor]:
        """The KV of a layer, as `staging` has it; a view where the tokens lie together."""
        taken = {}
        for name, view in zip(("keys", "values"), self._views[layer], strict=True):
            if view.is_cuda:  # a batch may still be on its way through
                torch.cuda.synchronize(view.device)
            parts = [view[rows] for _, rows in runs]
            taken[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)
        return taken

    def stop_sharing(self) -> None:
        """From now on no request gets pages that another one computed, and what was kept for that is let go of."""
        self._cache.evict_cached_blocks()
        self._cache.use_prefix_sharing = self._cache.allow_block_sharing = False
