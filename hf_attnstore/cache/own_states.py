"""The cache of models that keep a running state under a name of their own: RWKV's `state`, xLSTM's `rnn_state`.

The cache is what the model takes for its state: it looks the tensors up there, and writes to them in place.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .cache import AttentionStoreCache
from .layers.states import OwnState
from .model.structure import own_state


class OwnStateCache(
    AttentionStoreCache,
    serves=lambda model, session: bool(own_state(model)) and (session is None or isinstance(session, str)),
):
    """What `AttentionStoreCache(model)` makes for such a model."""

    layers: list[OwnState]  # type: ignore[assignment]
    seqlen_offset = 0
    """xLSTM counts here what it was fed."""

    def _acquire(self) -> None:
        _settle_weights(self.model)
        super()._acquire()

    def _begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        replaced = super()._begin_forward(named)
        rows = self._turn.forward.rows if self._turn.forward is not None else 0
        if rows and not self.layers[0].rows:
            for layer, tensors in zip(self.layers, _fresh(self.model, rows), strict=True):
                layer.begin(tensors)
        return replaced

    def __getitem__(self, index: Any) -> Any:
        """RWKV's five tensors, as a list has them."""
        return list(self.layers[0].states.values())[index]

    @property
    def rnn_state(self) -> dict[int, tuple[torch.Tensor, ...]]:
        """xLSTM's tensors by layer."""
        return {number: tuple(layer.states.values()) for number, layer in enumerate(self.layers)}


def _settle_weights(model: nn.Module) -> None:
    """RWKV divides weights when it first computes: before that it would pass for another model."""
    for module in model.modules():
        rescaled: Any = getattr(module, "layers_are_rescaled", None)
        if rescaled is not None and rescaled == module.training:
            module._rescale_layers()  # type: ignore[operator]


def _fresh(model: nn.Module, rows: int) -> list[list[torch.Tensor]]:
    """By layer, the tensors that a model begins with."""
    config: Any = model.config
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight: torch.Tensor = embeddings.weight
    if own_state(model) == "rwkv":
        shape = (rows, config.hidden_size, config.num_hidden_layers)
        kinds = [weight.dtype] * 2 + [torch.float32] * 3
        made = [torch.zeros(shape, dtype=dtype, device=weight.device) for dtype in kinds]
        made[4] -= 1e30
        return [made]
    cls = sys.modules[type(model).__module__].xLSTMCache
    states: dict[int, tuple[torch.Tensor, ...]] = cls(config, rows, dtype=weight.dtype, device=weight.device).rnn_state
    return [list(states[number]) for number in sorted(states)]
