"""How far to read ahead: plain decisions over numbers, no I/O and no tensors. Who goes first is in `policies`."""

import math


def lookahead_depth(load_seconds: float, compute_seconds: float, layers: int) -> int:
    """How many layers to have on their way beyond the one that computes.

    `load_seconds` and `compute_seconds` are per layer, as measured; 0 means not measured yet. When loading a
    layer takes longer than computing one, every layer is asked for at once: the reader is the bottleneck
    and must never idle. (The paper's read buffer, section 3.2.1, is what makes that room.)
    """
    if load_seconds <= 0 or compute_seconds <= 0 or load_seconds >= compute_seconds:
        return layers
    return min(layers, 1 + math.ceil(2 * load_seconds / compute_seconds))
