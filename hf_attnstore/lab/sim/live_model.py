"""The turns of a workload computed by a model with its KV in a store, beside the simulation of the same."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ...cache import AttentionStoreCache
from ...cache.model.argument import as_generate_takes
from ...store import AttentionStore
from ...store.blocks.keys import Key, decode_tokens
from ..bench.shapes import random_ids
from .live import LiveTurns, Names, Turned
from .replay import Request, Requests

BLOCK = 16
"""Tokens that stand for a block of the workload: prompts of some hundred instead of some ten thousand tokens."""


def scaled_down(requests: Requests) -> Requests:
    """The same turns in blocks of `BLOCK` tokens, all of them whole."""
    rows = [
        replace(
            row,
            tokens=BLOCK * len(row.prompt),
            history=min(row.history, BLOCK * len(row.prompt)),
            kept=BLOCK * len(row.blocks),
            short=False,
            prompt_short=0,
            superseded=None,
        )
        for row in requests.rows
        if row.blocks
    ]
    return Requests(requests.name, BLOCK, rows)


@dataclass(frozen=True)
class ModelTurns:
    """Turns that a model computes.

    Attributes:
        root: what first blocks of the model follow.
        block_bytes: bytes of the KV of a block.
        every: every so many turns the token is compared with what the model says without a store.
    """

    model: PreTrainedModel
    root: Key
    block_bytes: int
    every: int = 20
    block_size: int = BLOCK

    @classmethod
    def of(cls, model: PreTrainedModel, every: int = 20) -> ModelTurns:
        """Finds out what there is to know of a model, by saving one block."""
        with (
            tempfile.TemporaryDirectory(prefix="attnstore-sim-") as folder,
            AttentionStore(folder, memory="1GiB", disk=0, on_device=0, block_size=BLOCK) as store,
        ):
            _answer(model, torch.arange(1, BLOCK + 1).unsqueeze(0), _cache(model, store))
            store.flush()
            (block,) = store._memory._blocks.values()
        return cls(model, block.meta.parent, block.nbytes, every)

    def ids(self, count: int, sibling: int) -> list[int]:
        # what follows the same block begins with another token: the store finds parts of blocks, too
        return [sibling, *random_ids(self.model, BLOCK - 1, (count,))[0].tolist()]

    def on(self, store: AttentionStore, names: Names) -> LiveTurns:
        return _Computed(store, names, self)


class _Computed(LiveTurns):
    def __init__(self, store: AttentionStore, names: Names, turns: ModelTurns) -> None:
        super().__init__(store, names)
        self._turns = turns
        self._count = 0

    def run(self, row: Request, prompt: list[Key], blocks: list[Key]) -> Turned:
        model = self._turns.model
        ids = torch.tensor([[token for key in blocks for token in decode_tokens(self.names.metas[key].tokens)]])
        cache = _cache(model, self.store)
        answer = _answer(model, ids, cache)
        self.store.flush()
        self._count += 1
        if self._count % self._turns.every == 0:
            self.wrong += _answer(model, ids, None) != answer
        found = cache.stats.blocks_from
        return Turned(sum(found.values()), found.get("memory", 0))


def _cache(model: PreTrainedModel, store: AttentionStore) -> AttentionStoreCache:
    return AttentionStoreCache(model, store=store, drop=0, gate=False)


def _answer(model: PreTrainedModel, ids: torch.Tensor, cache: AttentionStoreCache | None) -> int:
    generate: Any = model.generate
    named = as_generate_takes(model, cache)
    return int(generate(ids.to(model.device), max_new_tokens=1, do_sample=False, **named)[0, -1])
