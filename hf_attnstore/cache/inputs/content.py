"""What identifies the parts of a prompt that are not text.

At the placeholders of a picture, and where embeddings are given instead of ids, stand-ins take the place of token ids
in everything that goes by ids. They are made from a digest of the picture's own input, so that the same picture has
the same ones and another picture has others; no id of a vocabulary is as large as a stand-in.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .foreign import is_harmless
from .styles import STYLES, Modality

STAND_IN = 1 << 31
"""Stand-ins are from here up, and fit into 32 bits: each carries 31 bits of a digest."""

FEWEST = 4
"""Positions that an item must have: 124 bits of its digest. A match that ends within an item is none."""

TYPES = ("token_type_ids", "mm_token_type_ids")
"""Inputs that may mark the places of items, `[1, tokens]`."""


_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")


class NotIdentifiedError(Exception):
    """What is given beside the ids is not understood; the message says what."""


def has_stand_ins(ids: np.ndarray) -> bool:
    """Whether some of `ids` `[tokens]` stand for something that is not text."""
    return bool((ids >= STAND_IN).any())


def last_stand_in(ids: np.ndarray) -> int:
    """How many of `ids` `[tokens]` there are up to the last that stands for something that is not text; 0 if none."""
    places = np.flatnonzero(ids >= STAND_IN)
    return int(places[-1]) + 1 if len(places) else 0


def stand_ins(digest: bytes, count: int) -> np.ndarray:
    """`count` stand-ins (int64) that are made of a digest."""
    drawn = np.frombuffer(hashlib.shake_256(digest).digest(4 * count), dtype=">u4")
    return drawn.astype(np.int64) | STAND_IN


@dataclass(frozen=True, eq=False)
class Item:
    """A picture, a video, a sound: it is reused as a whole or not at all."""

    places: np.ndarray
    """Positions of its placeholders in the prompt."""
    rows: tuple[int, int]
    """Its rows `[start, stop)` of the features."""
    numbers: tuple[int, int]
    """Its rows in what is given beside them."""

    @property
    def start(self) -> int:
        return int(self.places[0])

    @property
    def stop(self) -> int:
        return int(self.places[-1]) + 1


class Content:
    """A prompt `[tokens]` of which ids do not identify everything."""

    raw: np.ndarray
    """The ids that the model is fed."""
    consumed: tuple[str, ...]
    """Names of the inputs that are understood here."""
    beside: tuple[str, ...] = ()
    """Names of those of them that say something of the others, such as sizes."""
    positions: torch.Tensor | None = None
    """`[…, 1, tokens]`: where the model is to see each of them, if that is more than counting. Set by the caller."""

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def ids(self) -> np.ndarray:
        """What identifies each token: its id, or a stand-in."""
        raise NotImplementedError

    def extents(self) -> Iterator[tuple[int, int]]:
        """The ranges `[start, stop)` of positions within which nothing may end."""
        raise NotImplementedError

    def floor(self, length: int) -> int:
        """The longest beginning of at most `length` tokens that ends within nothing."""
        before = -1
        while before != length:
            before = length
            for start, stop in self.extents():
                if start < length < stop:
                    length = start
        return length

    def inputs(self, start: int, stop: int) -> dict[str, Any]:
        """What of the inputs belongs to the tokens `[start, stop)`; None for those of which nothing does.

        Raises:
            NotIdentifiedError: a part of something does.
        """
        raise NotImplementedError

    @property
    def understood(self) -> tuple[str, ...]:
        """`consumed`, and what marks the places of these."""
        return (*self.consumed, *TYPES)

    def value(self, name: str) -> Any:
        """An input by name."""
        raise NotImplementedError

    def types(self, name: str, stop: int) -> torch.Tensor | None:
        """The token types `[1, stop]` called `name` that go with the first tokens; None if none are marked."""
        return None

    def count(self, start: int, stop: int) -> int:
        """How many pictures and the like belong to the tokens `[start, stop)`."""
        return 0

    def identify(self, start: int, fed: torch.Tensor) -> np.ndarray | None:
        """What identifies tokens that are fed from position `start` on; None if they are not those of the prompt.

        Args:
            fed: ids `[tokens]` or embeddings `[tokens, dim]`; what comes after the prompt are ids.
        """
        raise NotImplementedError

    def positions_at(self, start: int, stop: int) -> torch.Tensor | None:
        """Where the model is to see the tokens `[start, stop)`, of which some may come after the prompt."""
        if self.positions is None:
            return None
        known = self.positions[..., start:stop]
        first, last = (max(place - len(self), 0) + 1 for place in (start, stop))
        beyond = torch.arange(first, last, device=known.device)
        return torch.cat([known, self.positions[..., -1:] + beyond], dim=-1)


class Items(Content):
    """Ids with placeholders, and what is to take their places."""

    def __init__(self, raw: np.ndarray, parts: Sequence[tuple[Modality, Sequence[Item]]], named: Mapping[str, Any]):
        self.raw = raw
        self._parts = parts
        self._named = named
        self.consumed = tuple(name for modality, _ in parts for name in (modality.features, *modality.beside))
        self.beside = tuple(name for modality, _ in parts for name in modality.beside if named.get(name) is not None)
        self._extents = sorted((item.start, item.stop) for _, items in parts for item in items)
        self.all_or_none = False
        """Whether items are reused only if all are."""

    def __len__(self) -> int:
        return len(self.raw)

    @cached_property
    def ids(self) -> np.ndarray:
        ids = self.raw.astype(np.int64)
        settings = self._settings()
        for modality, items in self._parts:
            for item in items:
                ids[item.places] = stand_ins(self._digest(modality, item, settings), len(item.places))
        return ids

    def _settings(self) -> str:
        """What else goes into every item: whether its places are marked, and settings of the model's own."""
        marked = [name for name in TYPES if _marks(self._named.get(name))]
        plain = {
            name: value
            for name, value in self._named.items()
            if isinstance(value, (bool, int, float, str)) and not is_harmless(name)
        }
        return repr((marked, sorted(plain.items())))

    def _digest(self, modality: Modality, item: Item, settings: str) -> bytes:
        hasher = hashlib.blake2b(digest_size=32, person=b"attnstore-item")
        hasher.update(repr((modality.features, len(item.places), settings)).encode())
        hasher.update((item.places - item.start).tobytes())
        beside = {
            name: torch.as_tensor(self._named[name])[slice(*item.numbers)]
            for name in modality.beside
            if self._named.get(name) is not None
        }
        features = modality.trim(self._named[modality.features][slice(*item.rows)], beside)
        for name, part in {modality.features: features, **beside}.items():
            part = part.detach().cpu().contiguous()
            hasher.update(repr((name, str(part.dtype), tuple(part.shape))).encode())
            hasher.update(part.view(-1).view(torch.uint8).numpy().data)
        return hasher.digest()

    def extents(self) -> Iterator[tuple[int, int]]:
        if self.all_or_none:
            yield self._extents[0][0], max(stop for _, stop in self._extents)
        yield from reversed(self._extents)

    def inputs(self, start: int, stop: int) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        for modality, items in self._parts:
            inside = [item for item in items if start <= item.start and item.stop <= stop]
            if any(item.start < stop and item.stop > start for item in items if item not in inside):
                raise NotIdentifiedError(f"{modality.features} of which only a part is fed")
            for name in (modality.features, *modality.beside):
                value = self._named.get(name)
                if value is None or not inside:
                    chosen[name] = None
                    continue
                first, last = inside[0], inside[-1]
                rows = (first.rows, last.rows) if name == modality.features else (first.numbers, last.numbers)
                chosen[name] = value[rows[0][0] : rows[1][1]]
        return chosen

    def count(self, start: int, stop: int) -> int:
        inside = (item for _, items in self._parts for item in items if start <= item.start < stop)
        return sum(item.numbers[1] - item.numbers[0] for item in inside)

    def value(self, name: str) -> Any:
        return self._named[name]

    def types(self, name: str, stop: int) -> torch.Tensor | None:
        types = self._named.get(name)
        if types is None or not _marks(types):
            return None
        beyond = max(stop - len(self), 0)  # what was generated is text
        return torch.cat([types[:, :stop], types.new_zeros(1, beyond)], dim=-1)

    def identify(self, start: int, fed: torch.Tensor) -> np.ndarray | None:
        if fed.ndim != 1:
            return None
        row: np.ndarray = fed.detach().cpu().numpy().astype(np.int64)
        known = self.raw[start : start + len(row)]
        if not np.array_equal(known, row[: len(known)]):
            return None
        return np.concatenate([self.ids[start : start + len(known)], row[len(known) :]])


class Embeddings(Content):
    """Embeddings `[1, tokens, dim]` instead of ids. They are identified in groups: a group's stand-ins are made of
    all rows up to its end."""

    consumed = ("inputs_embeds",)

    def __init__(self, embeds: torch.Tensor, beside: torch.Tensor | None):
        self._rows = embeds[0].detach()
        self._beside = beside
        self.raw = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._rows.shape[0])

    def _edges(self) -> list[int]:
        """Where groups begin, and the end. The last one takes in what does not fill a group."""
        return [*range(0, len(self) - FEWEST + 1, FEWEST), len(self)]

    @cached_property
    def ids(self) -> np.ndarray:
        hasher = hashlib.blake2b(digest_size=32, person=b"attnstore-embeds")
        hasher.update(repr((str(self._rows.dtype), self._rows.shape[1])).encode())
        beside = self._beside.detach().cpu().numpy()[0].astype(np.int64) if self._beside is not None else None
        raw = self._rows.cpu().contiguous().view(torch.uint8).numpy()
        edges = self._edges()
        parts = []
        for start, stop in pairwise(edges):
            hasher.update(raw[start:stop].data)
            if beside is not None:
                hasher.update(beside[start:stop].data)
            parts.append(stand_ins(hasher.digest() + bytes([stop - start]), stop - start))
        return np.concatenate(parts)

    def extents(self) -> Iterator[tuple[int, int]]:
        edges = self._edges()
        yield from pairwise(edges)

    def floor(self, length: int) -> int:
        return max((edge for edge in self._edges() if edge <= length), default=0) if length < len(self) else length

    def inputs(self, start: int, stop: int) -> dict[str, Any]:
        return {}

    def identify(self, start: int, fed: torch.Tensor) -> np.ndarray | None:
        if fed.ndim == 1:  # what was generated after them
            return fed.detach().cpu().numpy().astype(np.int64) if start >= len(self) else None
        stop = start + len(fed)
        same = stop <= len(self) and torch.equal(fed, self._rows[start:stop].to(fed))
        return self.ids[start:stop] if same else None


def _marks(types: Any) -> bool:
    return isinstance(types, torch.Tensor) and bool(types.any())


def read_content(config: Any, ids: Any, named: Mapping[str, Any]) -> Content | None:
    """What of a prompt is not identified by ids alone.

    Args:
        ids: `[1, tokens]`; may be missing where there are embeddings.
        named: all inputs by name.

    Returns:
        None if there is nothing of the kinds that are known.

    Raises:
        NotIdentifiedError: something is not as it is known.
    """
    embeds = named.get("inputs_embeds")
    if embeds is not None:
        return _read_embeddings(ids, embeds)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or ids.is_floating_point():
        return None
    given = [modality for modality in STYLES.get(config.model_type, ()) if named.get(modality.features) is not None]
    if not given:
        return None
    raw: np.ndarray = ids[0].detach().cpu().numpy()
    parts = [(modality, _items(config, modality, raw, named)) for modality in given]
    _check_types(config, parts, raw, named)
    return Items(raw, parts, named)


def has_places(config: Any, ids: torch.Tensor) -> bool:
    """Whether some of `ids` are what a model's config calls places of something that is not text."""
    names = [name for name in vars(config) if name.endswith(("_token_id", "_token_index")) and name not in _SPECIAL]
    places = [value for name in names if isinstance(value := getattr(config, name), int)]
    return bool(torch.isin(ids.cpu(), torch.tensor(places, dtype=torch.long)).any())


def _read_embeddings(ids: Any, embeds: Any) -> Content | None:
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or embeds.shape[0] != 1:
        return None
    if embeds.shape[1] < FEWEST:
        raise NotIdentifiedError(f"inputs_embeds of fewer than {FEWEST} tokens")
    beside = ids if isinstance(ids, torch.Tensor) and ids.numel() else None
    if beside is not None and tuple(beside.shape) != tuple(embeds.shape[:2]):
        raise NotIdentifiedError("inputs_embeds beside other ids")
    return Embeddings(embeds, beside)


def _items(config: Any, modality: Modality, raw: np.ndarray, named: Mapping[str, Any]) -> list[Item]:
    features = named[modality.features]
    if not isinstance(features, torch.Tensor) or not features.ndim:
        raise NotIdentifiedError(f"{modality.features} that are no tensor")
    placeholder = modality.placeholder(config)
    places = np.flatnonzero(raw == placeholder) if placeholder is not None else np.empty(0, dtype=np.int64)
    if not len(places):
        raise NotIdentifiedError(f"{modality.features} without placeholders in the prompt")
    beside = {name: named[name] for name in modality.beside if named.get(name) is not None}
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    layout = modality.layout(config, features, beside, [len(run) for run in runs])
    if layout is None or sum(tokens for tokens, _ in layout) != len(places) or _rows_do_not_fit(layout, beside):
        # which belongs to which is not known: as one item, they are right in any case
        count = max(len(value) for value in (features, *beside.values()))
        items = [Item(places, (0, count), (0, count))]
    else:
        items = _cut(places, layout)
    if modality.whole_runs:
        items = _merged(items)
    if any(len(item.places) < FEWEST for item in items):
        raise NotIdentifiedError(f"{modality.features} with fewer than {FEWEST} placeholders each")
    return items


def _rows_do_not_fit(layout: Sequence[tuple[int, int]], beside: Mapping[str, Any]) -> bool:
    return any(len(value) != len(layout) for value in beside.values())


def _cut(places: np.ndarray, layout: Sequence[tuple[int, int]]) -> list[Item]:
    items = []
    place = row = 0
    for number, (tokens, rows) in enumerate(layout):
        items.append(Item(places[place : place + tokens], (row, row + rows), (number, number + 1)))
        place, row = place + tokens, row + rows
    return items


def _merged(items: Sequence[Item]) -> list[Item]:
    """Items that follow each other without anything between, as one."""
    merged: list[Item] = []
    for item in items:
        last = merged[-1] if merged else None
        if last is not None and last.stop == item.start:
            places = np.concatenate([last.places, item.places])
            merged[-1] = Item(places, (last.rows[0], item.rows[1]), (last.numbers[0], item.numbers[1]))
        else:
            merged.append(item)
    return merged


def _check_types(
    config: Any, parts: Sequence[tuple[Modality, Sequence[Item]]], raw: np.ndarray, named: Mapping[str, Any]
) -> None:
    """Token types may say where the placeholders are, and nothing else."""
    expected = np.zeros(len(raw), dtype=np.int64)
    for modality, items in parts:
        for item in items:
            expected[item.places] = modality.kind
    for name in TYPES:
        types = named.get(name)
        if types is None or not _marks(types):
            continue
        given = types.detach().cpu().numpy()
        if given.shape != (1, len(raw)) or not np.array_equal(given[0], expected):
            raise NotIdentifiedError(f"{name} of the caller's own")
