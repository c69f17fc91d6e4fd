"""Positions of models that place pictures in space (M-RoPE).

Such a model computes them from all ids and the sizes of all pictures, and remembers on itself how far text after
them is off (`rope_deltas`), from whichever conversation came last. So nothing is taken from there: positions are
computed from the whole prompt before each turn, by the model's own method, and given to each forward.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..inputs.content import Content, NotIdentifiedError


def places_in_space(model: nn.Module) -> bool:
    """Whether a model remembers positions of another conversation."""
    return any(hasattr(part, "rope_deltas") for part in (model, getattr(model, "model", None)))


def spatial_positions(
    model: nn.Module, ids: torch.Tensor | None, named: Mapping[str, Any], content: Content | None
) -> torch.Tensor:
    """Positions `[…, 1, tokens]` of a whole prompt, as `generate` makes them where nothing is cached.

    Args:
        ids: `[1, tokens]`.
        named: the inputs by name; embeddings take the place of missing ids.
        content: what of the prompt ids do not identify.

    Raises:
        NotIdentifiedError: they depend on how the prompt is computed.
    """
    data = ids if ids is not None and ids.shape[1] else named["inputs_embeds"]
    if content is not None and any(stop == len(content) and content.raw.size for _, stop in content.extents()):
        # what comes after it is placed by its last row in `generate`, and by its farthest one elsewhere
        raise NotIdentifiedError("a prompt that ends with a picture")
    chosen = {name: named[name] for name in content.consumed if name in named} if content is not None else {}
    chosen.pop("inputs_embeds", None)
    types = named.get("mm_token_type_ids")
    if types is not None:
        chosen["mm_token_type_ids"] = types
    chosen["attention_mask"] = torch.ones(data.shape[:2], dtype=torch.long, device=data.device)
    prepare: Any = model._prepare_position_ids_for_generation
    positions: torch.Tensor = prepare(data, chosen)
    return positions
