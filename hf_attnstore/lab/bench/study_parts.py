"""Whose the loss after a truncation is: one truncation, with the KV of some layers or tokens computed anew.

Nothing is rotated here: what stays keeps its positions, and so does what comes after it. Only `moved`, this library,
rotates; it says the same as `kept` where rotating costs nothing.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from inspect import signature
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
        `moved`, the same in this library; and `kept` with some of it computed anew. Where layers slide also
        `computed anew, first unseen`: sliding layers see no further than they would, had nothing been dropped, so
        that the first tokens are out of their sight.
    """
    held, new, wanted = ids[:, :window], ids[:, window:-1], ids[0, window + 1 :]
    drop = math.ceil((window - keep_first) / 2)
    stay = torch.cat([torch.arange(keep_first), torch.arange(keep_first + drop, window)])
    after = torch.arange(window, window + chunk)

    def nats(layers: Layers) -> float:
        logits = _fed(model, new, after, _cache(layers))[1]
        return float(torch.nn.functional.cross_entropy(logits[0].float(), wanted))

    whole, _ = _fed(model, held, torch.arange(window), _cache(), last=True)
    anew, _ = _fed(model, held[:, stay], stay, _cache(), last=True)
    kept = [(keys[:, :, stay], values[:, :, stay]) for keys, values in whole]
    found = {"nothing dropped": nats(whole), "computed anew": nats(anew), "kept": nats(kept)}
    sliding = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None) or []
    mixed_kinds = sorted(set(kinds)) if len(set(kinds)) > 1 else []
    if "sliding_attention" in mixed_kinds:
        unseen, _ = _fed(model, held[:, stay], stay, _cache(), last=True, sliding=sliding)
        found["computed anew, first unseen"] = nats(unseen)
    found["moved"] = _moved(model, ids, window, keep_first)
    for kind in mixed_kinds:
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


def _fed(
    model: Any,
    ids: torch.Tensor,
    positions: torch.Tensor,
    cache: DynamicCache,
    *,
    last: bool = False,
    sliding: int | None = None,
) -> tuple[Layers, torch.Tensor]:
    """What the cache holds after `ids` `[1, tokens]`, and the logits of the last part.

    Args:
        positions: `[tokens]`, of all that the cache is to hold.
        last: the last logits are enough, as large vocabularies take longer than all layers.
        sliding: how far sliding layers see, by `positions`; None leaves that to the model, which counts tokens.
    """
    few = {"logits_to_keep": 1} if last and "logits_to_keep" in signature(model.forward).parameters else {}
    for start in range(0, ids.shape[1], _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        taken = {"position_ids": positions[None, part].to(ids.device), **as_forward_takes(model, cache), **few}
        if sliding is not None:
            taken["attention_mask"] = _seen(positions[part], positions[: part.stop], sliding, ids.device)
        logits = model(input_ids=ids[:, part], **taken).logits
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers], logits


def _seen(new: torch.Tensor, held: torch.Tensor, sliding: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Masks `[1, 1, new, held]` by kind of layer."""
    far = (new[:, None] - held[None]).to(device)[None, None]
    return {"full_attention": far >= 0, "sliding_attention": (far >= 0) & (far < sliding)}


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
