"""Whose the loss after a truncation is: one truncation, with the KV of some layers or tokens computed anew.

Nothing is rotated here: what stays keeps its positions, and so does what comes after it. Only `moved`, this library,
rotates; it says the same as `kept` where rotating costs nothing.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.model.argument import as_forward_takes

SEAM = 64
"""So many tokens next to those that are kept first are computed anew."""
_AT_ONCE = 256

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def parts(model: PreTrainedModel, ids: torch.Tensor, window: int, chunk: int, keep_first: int = 1) -> dict[str, float]:
    """Nats a token of the `chunk` tokens after the first `window` of `ids`, `[1, window + chunk + 1]`, where half of
    the window has gone.

    Returns:
        By what there is of the window: `nothing dropped`; `computed anew`, the tokens that stay; `kept`, their KV;
        `moved`, the same in this library; and `kept` with some of it computed anew.
    """
    held, new, wanted = ids[:, :window], ids[:, window:-1], ids[0, window + 1 :]
    drop = math.ceil((window - keep_first) / 2)
    stay = torch.cat([torch.arange(keep_first), torch.arange(keep_first + drop, window)])
    after = torch.arange(window, window + chunk)

    def nats(layers: Layers) -> float:
        logits = _fed(model, new, after, _cache(layers))[1]
        return float(torch.nn.functional.cross_entropy(logits[0].float(), wanted))

    whole, _ = _fed(model, held, torch.arange(window), _cache())
    anew, _ = _fed(model, held[:, stay], stay, _cache())
    kept = [(keys[:, :, stay], values[:, :, stay]) for keys, values in whole]
    found = {"nothing dropped": nats(whole), "computed anew": nats(anew), "kept": nats(kept)}
    found["moved"] = _moved(model, ids, window, keep_first)
    kinds = getattr(model.config, "layer_types", None) or []
    for kind in sorted(set(kinds)) if len(set(kinds)) > 1 else ():
        mixed = [
            fresh if kinds[place] == kind else old for place, (old, fresh) in enumerate(zip(kept, anew, strict=True))
        ]
        found[f"kept, {kind.removesuffix('_attention')} layers anew"] = nats(mixed)
    seam = keep_first + SEAM
    first = [
        (torch.cat([k2[:, :, :seam], k1[:, :, seam:]], dim=2), torch.cat([v2[:, :, :seam], v1[:, :, seam:]], dim=2))
        for (k1, v1), (k2, v2) in zip(kept, anew, strict=True)
    ]
    found[f"kept, {SEAM} next to the first anew"] = nats(first)
    return found


def _cache(layers: Layers = ()) -> DynamicCache:
    """Layers of all tokens, whatever their kind: masks see to what is in a sliding window."""
    cache = DynamicCache()
    for place, (keys, values) in enumerate(layers):
        cache.update(keys.clone(), values.clone(), place)
    return cache


def _fed(model: Any, ids: torch.Tensor, positions: torch.Tensor, cache: DynamicCache) -> tuple[Layers, torch.Tensor]:
    """What the cache holds after `ids` `[1, tokens]`, and the logits of the last part."""
    for start in range(0, ids.shape[1], _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        taken = {"position_ids": positions[None, part].to(ids.device), **as_forward_takes(model, cache)}
        logits = model(input_ids=ids[:, part], **taken).logits
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers], logits


def _moved(model: Any, ids: torch.Tensor, window: int, keep_first: int) -> float:
    with tempfile.TemporaryDirectory() as folder, AttentionStore(folder, memory="4GiB", disk=0, on_device=0) as store:
        cache = AttentionStoreCache(model, store=store, window=window, keep_first=keep_first, drop=0.5, gate=False)
        for start in range(0, window, _AT_ONCE):
            model(input_ids=ids[:, start : min(start + _AT_ONCE, window)], **as_forward_takes(model, cache))
        done = cache.match(ids[:, :-1])
        logits = model(input_ids=ids[:, done:-1], **as_forward_takes(model, cache)).logits[0].float()
        nats = float(torch.nn.functional.cross_entropy(logits[window - done :], ids[0, window + 1 :]))
        cache.reset()
    return nats
