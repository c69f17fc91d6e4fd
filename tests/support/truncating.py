"""Truncation with moved keys done by hand, by code that shares nothing with the package's."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import DynamicCache


class _Recording(DynamicCache):
    """Remembers the KV of every token as the model made it, whatever a layer lets go of."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.made: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(config.num_hidden_layers)]
        self.recording = True

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.recording:
            self.made[layer_idx].append((key_states.clone(), value_states.clone()))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def frequencies(model: Any, layer: int) -> torch.Tensor:
    """Radians per token of a layer's channel pairs, of models with half-split rotation of the whole head."""
    buffers = dict(model.model.rotary_emb.named_buffers())
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    found = buffers.get(f"{kinds[layer]}_inv_freq", buffers.get("inv_freq"))
    assert found is not None
    return found.double()


def turned(keys: torch.Tensor, by: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Keys `[1, heads, tokens, dim]`, each token's turned by its number of positions."""
    angles = by.double()[:, None] * inv_freq[None]
    cos, sin = angles.cos(), angles.sin()
    first, second = keys.double().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)


class TruncatingReference:
    """A conversation in a window: KV is kept aside as it was made, and put together anew for every turn."""

    def __init__(self, model: Any, window: int, keep_first: int = 4, drop: float = 0.5) -> None:
        self.model, self.window, self.keep_first, self.drop = model, window, keep_first, drop
        self.ids: list[int] = []
        self.shown: list[int] = []
        self.made_at: list[int] = []
        self.kv: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.dropped = 0
        self.prefilled = 0

    def turn(self, prompt: torch.Tensor, room: int, **settings: Any) -> Any:
        """One greedy turn on the whole conversation; the result is of the tokens in the window."""
        ids = prompt[0].tolist()
        assert ids[: len(self.ids)] == self.ids
        new = ids[len(self.ids) :]
        excess = len(self.shown) + len(new) + room - self.window
        if excess > 0:
            low = min(self.keep_first, len(self.shown))
            count = max(excess, math.ceil(self.drop * (len(self.shown) - low)))
            count = min(count, len(self.shown) - low)
            assert count >= excess
            self.dropped += count
            del self.shown[low : low + count], self.made_at[low : low + count]
            self.kv = [tuple(torch.cat([t[:, :, :low], t[:, :, low + count :]], dim=2) for t in kv) for kv in self.kv]
        cache = _Recording(self.model.config)
        if self.shown:
            by = torch.arange(len(self.shown)) - torch.tensor(self.made_at)
            cache.recording = False
            for layer, (keys, values) in enumerate(self.kv):
                cache.update(turned(keys, by, frequencies(self.model, layer)), values, layer)
            cache.recording = True
        self.prefilled = len(new)
        shown = torch.tensor([self.shown + new])
        out = self.model.generate(
            shown,
            attention_mask=torch.ones_like(shown),
            past_key_values=cache,
            max_new_tokens=room,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )
        before = len(self.shown)
        self.shown = out.sequences[0, :-1].tolist()
        self.made_at += range(before, len(self.shown))
        self.ids = ids + out.sequences[0, shown.shape[1] : -1].tolist()
        made = [tuple(torch.cat(parts, dim=2) for parts in zip(*layer, strict=True)) for layer in cache.made]
        old = self.kv or [tuple(t[:, :, :0] for t in kv) for kv in made]
        self.kv = [
            tuple(torch.cat(pair, dim=2) for pair in zip(a, b, strict=True)) for a, b in zip(old, made, strict=True)
        ]
        return out
