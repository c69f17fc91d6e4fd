"""What a single forward is given beside ids, where its prompt has pictures, sounds or embeddings."""

from collections.abc import Mapping
from typing import Any

import torch

from .content import TYPES, Content, NotIdentifiedError


def check_inputs(content: Content, start: int, count: int, named: Mapping[str, Any], *, vouched: bool) -> None:
    """Checks the inputs of a forward over the tokens from `start` on against the prompt they are from.

    Args:
        vouched: whether the caller has seen to it that they belong there.

    Raises:
        NotIdentifiedError: something else is fed, or a part of a picture.
    """
    stop = start + count
    if vouched and start >= len(content):
        return
    expected = content.inputs(start, stop)
    if _rows(named) > 1 and content.count(start, stop) > 1 and any(named.get(n) is not None for n in content.consumed):
        # those that `generate` does not encode before, it repeats one by one, so that rows get each other's
        raise NotIdentifiedError("several pictures or sounds for several rows")
    if vouched:
        return
    for name, value in expected.items():
        if not _same(named.get(name), value):
            raise NotIdentifiedError(f"{name} other than those of the tokens fed")
    for name in TYPES:
        types, whole = named.get(name), content.types(name, stop)
        if not isinstance(types, torch.Tensor) or (whole is None and not types.any()):
            continue
        if whole is None or not _same(types[:1, -count:], whole[:, -count:]):
            raise NotIdentifiedError(f"{name} of the caller's own")


def whole_types(content: Content, start: int, count: int, named: Mapping[str, Any]) -> dict[str, Any]:
    """Token types to replace: a model that lets the tokens of a picture see each other reads them by position, so
    they have to be those of the whole conversation, not (as transformers 5.17 has it) of the tokens fed."""
    name, stop = "token_type_ids", start + count
    types = named.get(name)
    if types is None or types.shape[-1] != count or count == stop or start >= len(content):
        return {}
    whole = content.types(name, stop)
    return {} if whole is None else {name: whole.to(types).expand(types.shape[0], -1)}


def _rows(named: Mapping[str, Any]) -> int:
    data = (named.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((value.shape[0] for value in data if value is not None), 1)


def _same(given: Any, expected: Any) -> bool:
    if given is None or expected is None:
        return given is None and expected is None
    if isinstance(expected, torch.Tensor):
        return isinstance(given, torch.Tensor) and torch.equal(given.to(expected), expected)
    return bool(given == expected)
