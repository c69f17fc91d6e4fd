"""The two caches that models with an encoder see: one of the decoder's own tokens, one of the encoder's output."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from .cache import AttentionStoreCache
from .layers.by_token import FullLayer


class SelfAttentionSide(Cache):
    """The decoder's own tokens in a `SequenceToSequenceCache`: a view of its layers that holds nothing itself."""

    def __init__(self, owner: AttentionStoreCache) -> None:
        super().__init__(layers=owner.layers)  # type: ignore[arg-type]
        self._owner = weakref.ref(owner)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the KV of new tokens; see `AttentionStoreCache.update`."""
        owner = self._owner()
        assert owner is not None, "a forward with the cache keeps it alive"
        return owner.update(key_states, value_states, layer_idx, *args, **kwargs)


class CrossAttentionSide(Cache):
    """Keys and values of the encoder's output, each `[batch, heads, positions, dim]`, in all layers or none."""

    layers: list[FullLayer]  # type: ignore[assignment]

    def __init__(self, layers: Sequence[FullLayer] = (), **_: Any) -> None:
        # some models make an empty one of the same class, with settings for layers that are no concern of ours
        super().__init__(layers=list(layers))

    @property
    def positions(self) -> int:
        """Positions of the encoder's output that every layer holds; 0 where any of them lacks them."""
        lengths = {layer.length for layer in self.layers}
        return lengths.pop() if len(lengths) == 1 else 0

    @property
    def rows(self) -> int:
        """The batch size; 0 if nothing is held."""
        return self.layers[0].rows if self.layers else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets what a layer holds of the encoder's output, each `[batch, heads, positions, dim]`."""
        layer = self.layers[layer_idx]
        layer.reset()  # a forward that failed half-way may have left something
        return layer.update(key_states, value_states)
