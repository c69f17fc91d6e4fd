"""What the package makes of a model, in words."""

from itertools import groupby
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from ..sizes import format_bytes
from .hooks import owner_of
from .identity.fingerprint import fingerprint_of
from .layers.kinds import granularity, make_layers
from .positions.truncation import window_of
from .probing.positions import probe

_GRANULARITY = {
    "token": "up to any token",
    "checkpoint": "up to a checkpoint of the layers' running states: at the end of every prompt and of every turn",
    "none": "nothing: some of its layers are of a kind that nothing is known of",
}


def describe(model: nn.Module) -> str:
    """A few lines about a model: identity, size, kinds of layers, window, and whether its keys can be moved.

    Runs a few short forwards, and leaves the model as it is.
    """
    model = owner_of(model)
    config: Any = model.config
    size = sum(parameter.nbytes for parameter in model.parameters())
    lines = [f"{type(model).__name__}, {format_bytes(size)}", f"fingerprint  {fingerprint_of(model).current()}"]
    try:
        layers = make_layers(model)
        kinds = [
            f"{len(list(group))} × {name}" + (f" (window {window:,})" if window else "")
            for (name, window), group in groupby(layers, key=lambda layer: (layer.kind, getattr(layer, "window", None)))
        ]
        lines.append(f"layers       {', '.join(kinds)}")
        lines.append(f"reuse        {_GRANULARITY[granularity(layers)]}")
    except UnsupportedModelError as error:
        lines.append(f"layers       can't be kept: {error}")
    window = window_of(config, None, None, 1.0)
    lines.append(f"window       {f'{window.size:,} tokens' if window else 'no limit stated'}")
    geometry = probe(model)
    verdict = "kept keys are rotated to their new places" if geometry.movable else "kept tokens are computed again"
    lines.append(f"truncation   {verdict}")
    lines += [f"             {line}" for line in geometry.describe().splitlines()]
    return "\n".join(lines)
