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


def read_buffer_bytes(bandwidth: float, load_seconds: float, history: int, compute_seconds: float, new: int) -> float:
    """How much has to be on the device before computing begins, so that it never waits for a load afterwards.

    The paper's formula for the read buffer (section 3.2.1), B * (T_load * L_hist - T_pref * L_new). It is 0 under the
    paper's condition for perfect overlap, T_load * L_hist <= T_pref * L_new: then one layer ahead is enough.

    Args:
        bandwidth: bytes per second of the load.
        load_seconds: to load the KV of one token, all layers.
        history: tokens to load.
        compute_seconds: to compute one token, all layers.
        new: tokens to compute.
    """
    return bandwidth * max(load_seconds * history - compute_seconds * new, 0.0)


def read_buffer_layers(load_seconds: float, compute_seconds: float, layers: int) -> int:
    """The same in layers, where loading all layers takes `load_seconds` and computing them `compute_seconds`: how many
    have to be there, or on their way for as long as they take, before the first one computes. At least 1."""
    if load_seconds <= 0 or layers < 1:
        return min(1, layers)
    buffered = read_buffer_bytes(layers / load_seconds, load_seconds, 1, compute_seconds, 1)
    return min(layers, max(1, math.ceil(buffered)))
