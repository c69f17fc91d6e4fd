"""What a single forward is given beside ids, where its prompt has pictures, sounds or embeddings."""

from collections.abc import Mapping
from typing import Any

import torch

from .modalities import TYPES, Content, NotIdentifiedError


def fit_inputs(content: Content, start: int, count: int, named: Mapping[str, Any], *, vouched: bool) -> dict[str, Any]:
    """Checks the inputs of a forward over the tokens from `start` on against the prompt they are from.

    Args:
        vouched: whether the caller has seen to it that they belong there.

    Returns:
        Inputs to replace. Token types are read by position from the beginning of the conversation, so where they
        mark something they have to be those of all of it.

    Raises:
        NotIdentifiedError: something else is fed, or a part of a picture.
    """
    stop = start + count
    if vouched and start >= len(content):
        return {}
    expected = content.inputs(start, stop)
    rows = next((named[name].shape[0] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None), 1)
    if rows > 1 and content.count(start, stop) > 1 and any(named.get(name) is not None for name in content.consumed):
        # those that `generate` does not encode before, it repeats one by one, so that rows get each other's
        raise NotIdentifiedError("several pictures or sounds for several rows")
    if not vouched:
        for name, value in expected.items():
            if not _same(named.get(name), value):
                raise NotIdentifiedError(f"{name} other than those of the tokens fed")
    replaced: dict[str, Any] = {}
    for name in TYPES:
        types, whole = named.get(name), content.types(name, stop)
        if not isinstance(types, torch.Tensor) or (whole is None and not types.any()):
            continue
        if whole is None or not _same(types[:1, -count:], whole[:, -count:]):
            raise NotIdentifiedError(f"{name} of the caller's own")
        if name == "token_type_ids" and types.shape[-1] != stop and bool(whole[:, -count:].any()):
            replaced[name] = whole.to(types).expand(types.shape[0], -1)
    return replaced


def _same(given: Any, expected: Any) -> bool:
    if given is None or expected is None:
        return given is None and expected is None
    if isinstance(expected, torch.Tensor):
        return isinstance(given, torch.Tensor) and torch.equal(given.to(expected), expected)
    return bool(given == expected)
