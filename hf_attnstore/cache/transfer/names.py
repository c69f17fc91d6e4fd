"""The names of layers' tensors in blocks."""

from collections.abc import Mapping

from ...errors import LoadError
from ...store.blocks.block import TensorSpec


def tensor_name(layer: int, name: str) -> str:
    """The name of a layer's tensor in a block."""
    return f"layers.{layer}.{name}"


def by_layer_of(described: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """What a block has, by what `tensor_name` begins with for a layer, then by the layer's own names."""
    found: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in described.items():
        parts = name.split(".", 2)
        if len(parts) == 3:
            found.setdefault(f"{parts[0]}.{parts[1]}.", {})[parts[2]] = spec
    return found


def specs_of(by_layer: Mapping[str, dict[str, TensorSpec]], number: int) -> dict[str, TensorSpec]:
    """What a block has of a layer, by the layer's own names."""
    specs = by_layer.get(tensor_name(number, ""))
    if not specs:
        raise LoadError(f"a stored block has nothing of layer {number}")
    return specs
