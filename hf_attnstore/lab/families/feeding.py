"""Feeding a model tokens through a cache, and seeing how it is fed by others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ...cache.model.argument import as_generate_takes, cache_name
from .shrink import ORDINARY_IDS


def cache_argument(model: Any) -> str | None:
    """The argument under which a model takes its cache; None if it takes none."""
    return cache_name(inspect.signature(model.forward).parameters)


def new_cache(model: Any) -> DynamicCache:
    """transformers' own cache, as `generate` makes it."""
    return DynamicCache(config=model.config)


def some_ids(count: int, seed: int) -> torch.Tensor:
    """Random ordinary ids `[1, count]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(ORDINARY_IDS.start, ORDINARY_IDS.stop, (1, count), generator=generator)


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, cache: Cache, **inputs: Any) -> torch.Tensor:
    """One forward over the new tokens `ids` `[1, tokens]`; logits `[1, tokens, vocabulary]`."""
    name = cache_argument(model)
    if name is None:
        raise ValueError("its forward takes no cache")
    logits: torch.Tensor = model(input_ids=ids, **{name: cache}, use_cache=True, **inputs).logits
    return logits.clone()


def feed_parts(
    model: Any, ids: torch.Tensor, lengths: Sequence[int], cache: Cache, *, places: bool = False
) -> torch.Tensor:
    """Forwards over `ids` from the beginning, so many tokens each; the logits of all, as of one.

    Args:
        places: whether to say where the tokens are, by `position_ids`, to a model that does not find out itself.
    """
    logits, start = [], 0
    for part in ids.split(list(lengths), dim=1):
        logits.append(feed(model, part, cache, **(positions(model, start, part.shape[1]) if places else {})))
        start += part.shape[1]
    return torch.cat(logits, dim=1)


def positions(model: Any, start: int, count: int) -> dict[str, torch.Tensor]:
    """The argument that says where tokens are, for a model that takes one."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": torch.arange(start, start + count)[None]}


@torch.no_grad()
def feed_whole(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """One forward over everything, without a cache."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.clone()


def generate(model: Any, ids: torch.Tensor, cache: Cache | None, tokens: int = 6) -> Any:
    """A greedy `generate` on the whole conversation `ids`; sequences and raw logits."""
    passed = as_generate_takes(model, cache)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **passed,
    )


@dataclass
class Said:
    """What `generate` returns, as far as it is looked at here."""

    sequences: torch.Tensor
    logits: list[torch.Tensor]


def greedy(model: Any, ids: torch.Tensor, cache: Cache, held: int, lengths: Sequence[int], tokens: int = 6) -> Said:
    """What a greedy `generate` on the conversation `ids` gives, in a loop of forwards.

    Args:
        held: how many tokens of it the cache holds.
        lengths: of the forwards over the others.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    made: list[torch.Tensor] = []
    todo = list(lengths)
    while len(made) < tokens:
        count = todo.pop(0) if todo else 1
        logits = feed(model, ids[:, held : held + count], cache, **positions(model, held, count), **last)[:, -1]
        held += count
        if not todo:
            made.append(logits)
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return Said(ids, made)


@contextmanager
def recorded(model: Any, cache: Cache | None = None) -> Iterator[list[torch.Tensor]]:
    """The ids `[1, tokens]` of each forward of a model while this lasts; only of those with `cache`, where given."""
    seen: list[torch.Tensor] = []
    names = list(inspect.signature(model.forward).parameters)

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = named.get("input_ids")
        if ids is not None and (cache is None or any(value is cache for value in named.values())):
            seen.append(ids.detach().cpu().clone())

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
