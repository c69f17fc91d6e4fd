"""What a model's conversations take, how many fit, and what reusing one saves on this machine: tried out, in words."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from torch import nn

from ..settings import value_of
from ..sizes import format_bytes, format_seconds, parse_bytes
from ..store.memory.size import AUTO
from ..store.store import AttentionStore
from .cache import AttentionStoreCache
from .hooks import attachment_of, detach, owner_of
from .model.structure import device_of, is_encoder_decoder, position_limit

TRIED = 512
"""Tokens that are computed, kept and loaded to find out."""


def sizing(model: nn.Module, tokens: int = 4096) -> str:
    """A few lines on conversations of so many tokens. Computes a few hundred tokens, in a store of its own.

    Of encoder-decoder models nothing is said: their conversations are not one text.
    """
    owner = owner_of(model)
    if is_encoder_decoder(owner):
        return ""
    attached = attachment_of(owner) is not None
    whole_config: Any = owner.config
    config = whole_config.get_text_config(decoder=True)
    count = min(TRIED, position_limit(config) or TRIED, int(config.max_position_embeddings or TRIED))
    ids = torch.randint(3, config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device_of(owner))
    with tempfile.TemporaryDirectory() as folder, AttentionStore(folder, on_device=0) as store, torch.no_grad():
        for first in (True, False):  # the first forward of all takes longer
            cache = AttentionStoreCache(owner, "tried", store, gate=False, save=not first)
            began = time.perf_counter()
            owner(input_ids=ids, past_key_values=cache, use_cache=True)
            computing = time.perf_counter() - began
            cache.save()
        store.flush()
        store.drop_memory()
        again = AttentionStoreCache(owner, "tried", store, gate=False, save=False)
        began = time.perf_counter()
        done = again.match(ids)
        owner(input_ids=ids[:, done:], past_key_values=again, use_cache=True)
        resuming = time.perf_counter() - began
        again.save()
        nbytes, codec = store.session("tried").bytes / count, store.codec
    if not attached:
        detach(owner)
    if not again.stats.loaded_bytes:
        return "KV           none that is kept by token"
    whole = nbytes * tokens
    disk, memory = value_of("disk"), value_of("memory")
    fits = [f"{int(parse_bytes(disk) // whole):,} in disk={disk}"]
    fits += [f"{int(parse_bytes(memory) // whole):,} in memory={memory}"] if memory != AUTO else []
    kind = f"{str(owner.dtype).removeprefix('torch.')}, codec {codec}"
    saved = format_seconds((computing - resuming) * tokens / count)
    lines = (
        f"KV           {format_bytes(nbytes)} a token ({kind}), {tokens:,} tokens take {format_bytes(whole)}",
        f"fits         conversations of {tokens:,} tokens: {', '.join(fits)}",
        f"here         {count:,} tokens computed in {format_seconds(computing)}, loaded in {format_seconds(resuming)}",
        f"             a turn after {tokens:,} tokens saves about {saved}"
        if computing > resuming
        else "             computing so many is faster here than loading them",
    )
    return "\n".join(lines)
