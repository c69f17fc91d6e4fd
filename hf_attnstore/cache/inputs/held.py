"""A prompt of ids alone that goes on after what a cache object holds, pictures included.

Whoever has a cache in hand that holds a picture may leave the picture out when going on, as with transformers' own
caches: the placeholders among the ids then stand for what is held, and not for text.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ...errors import CacheUseError
from ...session.chain import common_prefix
from .content import TYPES, Content, NotIdentifiedError, has_stand_ins


class HeldContent(Content):
    """A prompt of which the first `agreed` tokens are those of `known`, whose pictures are not given again."""

    def __init__(self, raw: np.ndarray, known: Content, agreed: int) -> None:
        self.raw = raw
        self._ids = np.concatenate([known.ids[:agreed], raw[agreed:]])
        self._extents = [(start, stop) for start, stop in known.extents() if stop <= agreed]
        self._origin: Content = known._origin if isinstance(known, HeldContent) else known
        self._agreed: int = min(agreed, known._agreed) if isinstance(known, HeldContent) else agreed
        self.consumed = self.beside = known.beside
        if known.positions is not None:
            self.positions = _positions(known.positions, agreed, len(raw))

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def ids(self) -> np.ndarray:
        return self._ids

    def extents(self) -> Iterator[tuple[int, int]]:
        yield from self._extents

    def inputs(self, start: int, stop: int) -> dict[str, Any]:
        if any(first < stop and last > start for first, last in self._extents):
            raise NotIdentifiedError("pictures, sounds or embeddings that the cache does not hold any more")
        return dict.fromkeys(self.consumed)

    def value(self, name: str) -> Any:
        return self._origin.value(name)

    def types(self, name: str, stop: int) -> torch.Tensor | None:
        types = self._origin.types(name, self._agreed)
        return None if types is None else torch.cat([types, types.new_zeros(1, stop)], dim=-1)[:, :stop]

    def identify(self, start: int, fed: torch.Tensor) -> np.ndarray | None:
        if fed.ndim != 1 or has_stand_ins(self._ids[start:]):
            return None
        row: np.ndarray = fed.detach().cpu().numpy().astype(np.int64)
        return row


def held_ids(known: Content | None, held: np.ndarray) -> np.ndarray:
    """The ids that a model was fed for the tokens `held`; `known` is of their beginning."""
    if known is None or not known.raw.size:
        return held
    count = common_prefix(known.ids, held)
    return np.concatenate([known.raw[:count], held[count:]])


def go_on_after(known: Content | None, held: np.ndarray, raw: np.ndarray, named: Mapping[str, Any]) -> Content | None:
    """What of the prompt `raw` `[tokens]`, given without pictures, stands for something that a cache holds.

    Args:
        known: what of the text in the cache is not text.
        held: what identifies the tokens `[tokens]` in the cache; `known` is of their beginning.
        named: what is given beside the ids.

    Returns:
        None if nothing does.

    Raises:
        CacheUseError: what is given beside the ids is not what was held, or places of pictures come where the prompt
            is another than what the cache holds.
    """
    if known is None or not known.raw.size or not has_stand_ins(held):
        return None
    count = common_prefix(known.ids, held)
    agreed = known.floor(common_prefix(known.raw[:count], raw))
    goes_on = has_stand_ins(known.ids[:agreed])
    places = known.raw[known.ids != known.raw]
    if np.isin(raw[agreed:], places).any() and (agreed < count or not goes_on):
        raise CacheUseError(
            f"the prompt is what the cache holds up to token {agreed}, and has places of pictures, sounds or "
            "embeddings after that: pass these too, or another cache for another conversation"
        )
    if not goes_on:
        return None
    content = HeldContent(raw, known, agreed)
    for name in known.beside:
        value = named.get(name)
        if value is not None and not torch.equal(torch.as_tensor(value), torch.as_tensor(known.value(name))):
            raise CacheUseError(f"{name} is not that of the pictures that are held: pass all inputs, or leave it out")
    for name in TYPES:
        given = named.get(name)
        if isinstance(given, torch.Tensor) and given.any():
            whole = content.types(name, given.shape[-1])
            if whole is None or not torch.equal(given.cpu(), whole.cpu()):
                raise CacheUseError(f"{name} is not that of what the cache holds: pass all inputs, or leave it out")
    return content


def _positions(known: torch.Tensor, agreed: int, total: int) -> torch.Tensor:
    """Positions `[…, 1, total]` of a text that is that of `known` for its first `agreed` tokens."""
    count = known.shape[-1]
    # whatever comes after them, it begins where what came there began
    following = known[..., agreed : agreed + 1] if agreed < count else known[..., -1:] + 1
    beyond = torch.arange(max(total - agreed, 0), device=known.device)
    return torch.cat([known[..., :agreed], following + beyond], dim=-1)[..., :total]
