"""Which class serves which kind of transformers layer. A new kind is added here, in one line and a class."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache

from ...errors import UnsupportedModelError
from ..model.structure import decoder_config, decoder_layers, decoder_of, is_encoder_decoder, own_state
from .by_token import FullLayer, SlidingLayer
from .indexed import IndexedLayer, SparseIndexLayer
from .kept import KeptLayer
from .states import HybridLayer, HybridSlidingLayer, OwnState, SharedLayer, StateLayer, snapshot_of

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


def is_state(layer: Any) -> bool:
    """Whether a layer, as `DynamicCache` makes it, keeps a running state."""
    maker = _MAKERS.get(type(layer).__name__)
    return maker is not None and maker(layer).has_state


_warned: set[str] = set()


def register_kind(name: str, maker: Maker) -> None:
    """Serves a kind of layer that this package does not know.

    Args:
        name: of the class that transformers, or a model's own file, caches such layers with.
        maker: given an object of that class as `DynamicCache` has just made it, makes a `KeptLayer`;
            `states.snapshot_of(layer, reusable=True)` does for a class whose attributes are all of its state.
    """
    _MAKERS[name] = maker


def make_layers(model: nn.Module) -> list[KeptLayer]:
    """The layers of a cache for a model, in order; for an encoder-decoder, of its decoder.

    Raises:
        UnsupportedModelError: the model does not say which layers it has.
    """
    own = own_state(model)
    if own:  # RWKV's has all of its layers in five tensors
        return [_own_layer(own) for _ in range(1 if own == "rwkv" else model.config.num_hidden_layers)]  # type: ignore
    layers = []
    text = decoder_config(model).get_text_config(decoder=True)
    plain = not getattr(text, "kv_lora_rank", None) and not is_encoder_decoder(model)
    for number, (template, kind) in enumerate(_templates(model)):
        maker = _MAKERS.get(type(template).__name__)
        layer = maker(template) if maker is not None else snapshot_of(template, reusable=False)
        layer.kind = "shared" if isinstance(layer, SharedLayer) else kind
        layer.may_be_rounded = type(layer) in (FullLayer, SlidingLayer) and plain
        if not layer.reusable:
            _warn(decoder_config(model).model_type, number, kind, type(template).__name__)
        layers.append(layer)
    return layers


def _own_layer(kind: str) -> KeptLayer:
    layer = OwnState()
    layer.kind = kind
    return layer


@dataclass(frozen=True)
class _Found:
    """What `DynamicCache` makes of settings."""

    settings: str
    layers: list[tuple[Any, str]]
    """A layer as it makes it, never used, and the name of its kind."""


_found: "weakref.WeakKeyDictionary[nn.Module, _Found]" = weakref.WeakKeyDictionary()
"""By model: each turn's cache would ask again, and settings are slow to read."""


def _templates(model: nn.Module) -> list[tuple[Any, str]]:
    config = decoder_config(model)
    text = config.get_text_config(decoder=True)
    settings = f"{type(text).__qualname__} {vars(text)}"
    known = _found.get(model)
    if known is not None and known.settings == settings:
        return known.layers
    try:
        templates = DynamicCache(config=text).layers
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"transformers can't make a cache for {config.model_type}: {error}") from error
    if not templates:
        raise UnsupportedModelError(f"{config.model_type} does not say which layers it has")
    templates = _as_many_as_there_are(model, templates)
    names = getattr(text, "layer_types", None) or []
    kinds = [names[n] if n < len(names) else _NAMES.get(type(t).__name__, "") for n, t in enumerate(templates)]
    layers = [(template, kind or type(template).__name__) for template, kind in zip(templates, kinds, strict=True)]
    _found[model] = _Found(settings, layers)
    return layers


def _as_many_as_there_are(model: nn.Module, templates: list[Any]) -> list[Any]:
    """The configuration of an encoder-decoder may speak of the encoder's layers."""
    if not is_encoder_decoder(model) or decoder_layers(decoder_of(model), len(templates)):
        return templates
    counts = {len(module) for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)}
    there = [count for count in sorted(counts) if decoder_layers(decoder_of(model), count)]
    if there and len({type(template) for template in templates}) == 1:
        return templates[:1] * there[-1]
    return templates


_NAMES = {"DynamicLayer": "full_attention", "DynamicSlidingWindowLayer": "sliding_attention"}


def _warn(model: str, number: int, kind: str, cls: str) -> None:
    if cls in _warned:
        return
    _warned.add(cls)
    logger.warning(
        "layer %d of %s is of kind %r (%s), which nothing is known of: with such models nothing is reused and nothing "
        "kept; `hf_attnstore.cache.layers.kinds.register_kind` can teach it",
        number, model, kind, cls,
    )  # fmt: skip


def granularity(layers: list[KeptLayer]) -> str:
    """What can be reused of a text: up to any `token`, up to a `checkpoint`, or nothing (`none`)."""
    if not all(layer.reusable for layer in layers):
        return "none"
    return "checkpoint" if any(layer.has_state for layer in layers) else "token"
