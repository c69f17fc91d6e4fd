"""Finding out how a model's keys and values depend on position, by asking the model.

Attention over a single token does not depend on where the token is. A forward over one token therefore caches, in
every layer, what that layer makes of the token, turned by its position and by nothing else; comparing a few positions
shows how. Nothing is known of architectures: frequencies are taken from the model's rotary modules if the probe
confirms them, and measured if not.
"""

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..model.argument import as_forward_takes, cache_name
from ..model.structure import has_length_dependent_rope, own_state
from ..positions.geometry import Geometry, LayerGeometry, Rotation
from .known import Known

logger = logging.getLogger("hf_attnstore")

GEOMETRIES: Known[Geometry] = Known("", "probe", 3, Geometry.to_json, Geometry.from_json)
"""The version is to be raised when verdicts may change."""

_TOKENS = 4
_FARTHEST = 2048
_FEWEST = 8
"""Positions that a model must have: with fewer, nothing is left to check a rotation against."""
_CONFIRMING = 12
"""Tokens of a sequence that only confirms what single tokens showed."""
_SEQUENCE = 132
"""Tokens fed where a model takes no positions; they must reach as far as precision needs."""
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""By dtype: how far keys may be from what a rotation predicts, relative to their length. Models in half precision
round the cosines and the keys."""


_NO_ROTATION = "{} depend on position in a way that is no rotation (learned positions, perhaps)"


class _Refused(Exception):
    """The model's keys can't be moved; the message says why."""


def probe(model: nn.Module) -> Geometry:
    """How positions are in the KV of a transformers model. Runs two or three short forwards; changes nothing.

    Any doubt is a refusal: `Geometry.refused` says why.
    """
    try:
        return Geometry(tuple(_probe(model)))
    except _Refused as reason:
        return Geometry((), str(reason))
    except Exception as error:
        logger.debug("probing %s failed", type(model).__name__, exc_info=True)
        return Geometry((), f"the model could not be probed ({type(error).__name__}: {error})")


def _probe(model: nn.Module) -> Iterator[LayerGeometry]:
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    if model.training:
        raise _Refused("the model is in training mode")
    if getattr(config, "is_encoder_decoder", False):
        raise _Refused("it is an encoder-decoder model")
    if own_state(model):
        raise _Refused("it keeps a running state, not keys")
    if has_length_dependent_rope(text):
        raise _Refused("its rotary frequencies depend on the length of the text")
    for number, layer in enumerate(DynamicCache(config=text).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _Refused(f"layer {number} keeps a state that is not by token ({type(layer).__name__})")
    parameters = inspect.signature(model.forward).parameters
    if cache_name(parameters) is None:
        raise _Refused("its forward takes no cache")
    ids = ordinary_ids(config, text)
    if _positions(text) < _FEWEST:
        raise _Refused(f"the model has too few positions to tell ({_positions(text)})")
    # in a sequence of one and the same token, attention averages equal values: no position but by rotation either
    takes_positions = "position_ids" in parameters
    count = min(_CONFIRMING if takes_positions else _SEQUENCE, _positions(text))
    sequence = _run(model, parameters, ids[:, None].expand(-1, count))
    if takes_positions:
        places = _places(_positions(text))
        rows = ids.repeat(len(places))
        position_ids = torch.tensor(places).repeat_interleave(len(ids))
        single = _run(model, parameters, rows[:, None], position_ids=position_ids[:, None])
        measured = [[tensor[:, :, 0].unflatten(0, (len(places), len(ids))) for tensor in layer] for layer in single]
    else:
        places = [place for place in _places(count) if place < count]
        measured = [[_at(tensor, places, count) for tensor in layer] for layer in sequence]
    tolerance = max(_TOLERANCE.get(tensor.dtype, 4e-2) for layer in sequence for tensor in layer)
    candidates = _known_frequencies(model)
    still = True
    for number, tensors in enumerate(measured):
        found = [
            _explain(tensor.double(), places, candidates, tolerance, f"layer {number}'s {name}")
            for name, tensor in zip(("keys", "values"), tensors, strict=True)
        ]
        still = still and not any(found)
        # before the first attention nothing but the position tells one token of the sequence from another, so here
        # it shows whether the model really goes by the positions that it is given; without any rotation, everywhere
        if number == 0 or still:
            for rotation, tensor in zip(found, sequence[number], strict=True):
                first = max(1, count - tensor.shape[2])  # a sliding window has let go of those before
                near = [place for place in range(first, first + 9) if place < count]
                states = _at(tensor, near, count).double()
                if not _agrees(rotation, states, near, 10 * tolerance):
                    raise _Refused(f"layer {number} does not go by the position ids alone")
        yield LayerGeometry(*found)


def _positions(text: Any) -> int:
    """How many positions may be used."""
    stated = getattr(text, "max_position_embeddings", None)
    return min(int(stated), _FARTHEST) if isinstance(stated, int) and stated > 0 else _FARTHEST


def _places(limit: int) -> list[int]:
    """Positions to look at: 1, then at growing distances from it for measuring, and others to check against."""
    distances = [1 << n for n in range(12) if 1 + (1 << n) < limit]
    others = [place for place in (4, 7, 12, 23, 47, 99, 187, 411, 1003, 1801) if place < limit]
    return [1, *(1 + distance for distance in distances), *others]


def ordinary_ids(config: Any, text: Any) -> torch.Tensor:
    """A few token ids `[tokens]` that are nothing special."""
    special: set[int] = set()
    for source in (config, text):
        for name, value in source.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    ids = (n * text.vocab_size // 97 for n in (41, 29, 67, 53, 13, 83, 31, 71, 19, 59, 7, 89))
    chosen = [number for number in dict.fromkeys(ids) if number not in special]
    return torch.tensor(chosen[:_TOKENS])


@torch.no_grad()
def _run(model: nn.Module, parameters: Any, ids: torch.Tensor, **inputs: torch.Tensor) -> list[list[torch.Tensor]]:
    """Keys and values of every layer, `[rows, heads, tokens, dim]` on the CPU, for `ids` `[rows, tokens]`."""
    config: Any = model.config
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embeddings.weight.device
    if device.type == "meta":
        device = getattr(embeddings, "_hf_hook").execution_device  # noqa: B009
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    moved = {name: value.to(device) for name, value in inputs.items()}
    model(input_ids=ids.contiguous().to(device), use_cache=True, **as_forward_takes(model, cache), **moved, **extra)
    states = []
    for number, layer in enumerate(cache.layers):
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        both = [tensor.detach().cpu() for tensor in held if tensor is not None]
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or len(both) < 2:
            raise _Refused(f"layer {number} caches nothing by token")
        states.append([tensor.unsqueeze(1) if tensor.ndim == 3 else tensor for tensor in both])
        if any(tensor.shape[0] != ids.shape[0] for tensor in states[-1]):
            raise _Refused(f"layer {number} caches {list(both[0].shape)} for {list(ids.shape)} tokens")
    if not states:
        raise _Refused("the model caches nothing")
    return states


def _at(tensor: torch.Tensor, places: list[int], count: int) -> torch.Tensor:
    """Of the states `[rows, heads, tokens, dim]` of a sequence, those at `places`, `[places, rows, heads, dim]`."""
    first = count - tensor.shape[2]
    if first > min(places):
        raise _Refused("its sliding windows are too short to tell")
    return tensor[:, :, [place - first for place in places]].permute(2, 0, 1, 3)


def _known_frequencies(model: nn.Module) -> list[torch.Tensor]:
    """The frequencies that the model's own rotary modules have, each `[pairs]`."""
    found: list[torch.Tensor] = []
    for module in model.modules():
        for name, value in (*module._buffers.items(), *module.__dict__.items()):
            if not (name.endswith("inv_freq") and "original" not in name and isinstance(value, torch.Tensor)):
                continue
            if value.ndim != 1 or value.device.type == "meta" or not len(value):
                continue
            frequencies = value.detach().cpu().double()
            if not any(torch.equal(frequencies, other) for other in found):
                found.append(frequencies)
    return found


def _explain(
    states: torch.Tensor, places: list[int], candidates: list[torch.Tensor], tolerance: float, what: str
) -> Rotation | None:
    """The rotation behind `states` `[places, tokens, heads, dim]`; None if they do not depend on position.

    Raises:
        _Refused: they do, but it is no rotation.
    """
    if _agrees(None, states, places, tolerance):
        return None
    dim = states.shape[-1]
    size = states.norm(dim=-1).amax().clamp_min(1e-30)
    moving = torch.nonzero((states - states[:1]).abs().amax(dim=(0, 1, 2)) > tolerance * size).flatten().tolist()
    if not moving:  # too little in every channel, and still too much together
        raise _Refused(_NO_ROTATION.format(what))
    fitting = [r for r in _proposals(candidates, moving, dim) if _agrees(r, states, places, tolerance)]
    if fitting:
        return min(fitting, key=lambda rotation: float(_errors(rotation, states, places).max()))
    for rotation in _measured(states, places, moving, dim):
        if _agrees(rotation, states, places, tolerance):
            return rotation
    raise _Refused(_NO_ROTATION.format(what))


def _proposals(candidates: list[torch.Tensor], moving: list[int], dim: int) -> Iterator[Rotation]:
    """Rotations with frequencies that the model has, for every way in which they may cover the moving channels."""
    for frequencies in candidates:
        width = 2 * len(frequencies)
        if width > dim:
            continue
        offsets = {0, dim - width, *(place for place in moving[:1] if place + width <= dim)}
        for offset in sorted(offsets):
            if moving[0] < offset or moving[-1] >= offset + width:
                continue
            for interleaved in (False, True):
                yield Rotation(frequencies, offset, interleaved)


def _measured(states: torch.Tensor, places: list[int], moving: list[int], dim: int) -> Iterator[Rotation]:
    """Rotations whose frequencies are measured, for every way in which the moving channels may be paired."""
    first, last = moving[0], moving[-1] + 1
    for offset in dict.fromkeys((first, first - first % 2, 0)):
        for width in range(last - offset + (last - offset) % 2, dim - offset + 1, 2):
            for interleaved in (True, False):
                frequencies = _measure(states[..., offset : offset + width], places, interleaved)
                yield Rotation(frequencies, offset, interleaved)
                if interleaved and width > last - offset + 1:
                    break


def _measure(states: torch.Tensor, places: list[int], interleaved: bool) -> torch.Tensor:
    """Radians per token of each pair: from neighbours first, then ever more precisely from greater distances."""
    if interleaved:
        turning = torch.complex(states[..., 0::2].contiguous(), states[..., 1::2].contiguous())
    else:
        turning = torch.complex(*(half.contiguous() for half in states.chunk(2, dim=-1)))
    angles = (turning * turning[0].conj()).sum(dim=(1, 2)).angle()
    frequencies = torch.zeros(angles.shape[-1], dtype=torch.float64)
    distance = 1
    while 1 + distance in places:
        angle = angles[places.index(1 + distance)]
        turns = ((frequencies * distance - angle) / (2 * torch.pi)).round()
        frequencies = (angle + 2 * torch.pi * turns) / distance
        distance *= 2
    return frequencies


def _errors(rotation: Rotation | None, states: torch.Tensor, places: list[int]) -> torch.Tensor:
    """By place: the distance of states from those at the first place, moved there."""
    size = states[0].norm(dim=-1).clamp_min(1e-30)
    errors = []
    for place, there in zip(places, states, strict=True):
        predicted = states[0].clone()
        if rotation is not None:
            rotation.rotate_(predicted, place - places[0])
        errors.append(((there - predicted).norm(dim=-1) / size).max())
    return torch.stack(errors)


def _agrees(rotation: Rotation | None, states: torch.Tensor, places: list[int], tolerance: float) -> bool:
    """Whether a rotation predicts states at every place."""
    # the angle is a product that is rounded in float32: its error grows with the position
    allowed = tolerance + 2.5e-7 * torch.tensor(places, dtype=torch.float64)
    return bool((_errors(rotation, states, places) <= allowed).all())
