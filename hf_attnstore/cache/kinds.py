"""Which class serves which kind of transformers layer. A new kind is added here, in one line and a class."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import DynamicCache

from ..errors import UnsupportedModelError
from .indexed import IndexedLayer, SparseIndexLayer
from .layers import FullLayer, KeptLayer, SlidingLayer
from .states import HybridLayer, HybridSlidingLayer, SharedLayer, StateLayer, snapshot_of

logger = logging.getLogger("hf_attnstore")

Maker = Callable[[Any], KeptLayer]
"""Makes the layer that stands in for one that `DynamicCache` has just made."""


def _states(layer: Any) -> dict[str, int]:
    """How many states a layer with a running state has; older transformers (5.17) know of one only."""
    return {"number_of_states": layer.number_of_states} if hasattr(layer, "number_of_states") else {}


_MAKERS: dict[str, Maker] = {
    "DynamicLayer": lambda layer: FullLayer(),
    "DynamicSlidingWindowLayer": lambda layer: SlidingLayer(int(layer.sliding_window)),
    "DynamicIndexedLayer": lambda layer: IndexedLayer(),
    "LinearAttentionLayer": lambda layer: StateLayer(**_states(layer)),
    "LinearAttentionAndFullAttentionLayer": lambda layer: HybridLayer(**_states(layer)),
    "LinearAttentionAndSlidingWindowAttentionLayer": lambda layer: HybridSlidingLayer(
        int(layer.sliding_window), **_states(layer)
    ),
    "DummyLayer": lambda layer: SharedLayer(),
    "MiniMaxM3VLSparseCacheLayer": lambda layer: SparseIndexLayer(),
    "DeepseekV4HCACache": lambda layer: snapshot_of(layer, reusable=True),
    "DeepseekV4CSACache": lambda layer: snapshot_of(layer, reusable=True),
}
"""By the name of the class that transformers uses."""

_warned: set[str] = set()


def register_kind(name: str, maker: Maker) -> None:
    """Serves a kind of layer that this package does not know.

    Args:
        name: of the class that transformers, or a model's own file, caches such layers with.
        maker: given an object of that class as `DynamicCache` has just made it, makes a `KeptLayer`;
            `states.snapshot_of(layer, reusable=True)` does for a class whose attributes are all of its state.
    """
    _MAKERS[name] = maker


def make_layers(config: Any) -> list[KeptLayer]:
    """The layers of a cache for a model, in order.

    Raises:
        UnsupportedModelError: the model is an encoder-decoder, or does not say which layers it has.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder model, which this version can't keep; use it without the store"
        )
    text = config.get_text_config(decoder=True)
    templates = DynamicCache(config=text).layers
    if not templates:
        raise UnsupportedModelError(f"{config.model_type} does not say which layers it has")
    names = getattr(text, "layer_types", None) or []
    layers = []
    for number, template in enumerate(templates):
        maker = _MAKERS.get(type(template).__name__)
        layer = maker(template) if maker is not None else snapshot_of(template, reusable=False)
        layer.kind = names[number] if number < len(names) else _NAMES.get(type(template).__name__, "")
        layer.kind = layer.kind or type(template).__name__
        if isinstance(layer, SharedLayer):
            layer.kind = "shared"
        if not layer.reusable:
            _warn(config.model_type, number, layer.kind, type(template).__name__)
        layers.append(layer)
    return layers


_NAMES = {"DynamicLayer": "full_attention", "DynamicSlidingWindowLayer": "sliding_attention"}


def _warn(model: str, number: int, kind: str, cls: str) -> None:
    if cls in _warned:
        return
    _warned.add(cls)
    logger.warning(
        "layer %d of %s is of kind %r (%s), which nothing is known of: with such models nothing is reused and nothing "
        "kept; `hf_attnstore.cache.kinds.register_kind` can teach it",
        number, model, kind, cls,
    )  # fmt: skip


def granularity(layers: list[KeptLayer]) -> str:
    """What can be reused of a text: up to any `token`, up to a `checkpoint`, or nothing (`none`)."""
    if not all(layer.reusable for layer in layers):
        return "none"
    return "checkpoint" if any(layer.has_state for layer in layers) else "token"
