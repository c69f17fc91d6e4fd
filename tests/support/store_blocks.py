"""Blocks made by hand, for tests of the store without a model."""

import numpy as np
import torch

from hf_attnstore.store import AttentionStore
from hf_attnstore.store.blocks.block import Block, BlockMeta
from hf_attnstore.store.blocks.keys import Key, block_key, chain_root, encode_tokens
from hf_attnstore.store.records.manifest import Manifest, SpanRow
from hf_attnstore.store.transfer.stages import Piece, Stage

FINGERPRINT = "f" * 40
LAYERS = 2
HEADS = 2
DIM = 4


def make_block(parent: Key, ids: list[int], start: int, namespace: str = "", fingerprint: str = FINGERPRINT) -> Block:
    """A block whose tensors follow from its key, so that any mix-up shows."""
    tokens = encode_tokens(ids)
    key = block_key(parent, tokens)
    random = np.random.default_rng(list(key))
    tensors = {
        f"layers.{layer}.{name}": torch.from_numpy(random.standard_normal((HEADS, len(ids), DIM), dtype=np.float32))
        for layer in range(LAYERS)
        for name in ("keys", "values")
    }
    return Block(BlockMeta(key, parent, fingerprint, start, tokens), tensors)


def make_chain(ids: list[int], size: int, namespace: str = "", fingerprint: str = FINGERPRINT) -> list[Block]:
    parent = chain_root(fingerprint, namespace)
    chain = []
    for start in range(0, len(ids), size):
        chain.append(make_block(parent, ids[start : start + size], start, namespace, fingerprint))
        parent = chain[-1].meta.key
    return chain


def save(store: AttentionStore, chain: list[Block], session: str | None = None) -> None:
    """Hands a chain over as a cache would, and commits it."""
    for block in chain:
        assert store.reserve(block.nbytes, wait=True)
        store.put(block)
    if session is not None:
        rows = tuple(SpanRow(block.meta.key, 0, block.meta.token_count) for block in chain)
        store.commit(session, FINGERPRINT, Manifest(rows, length=sum(row.stop for row in rows)))


def on_disk_only(store: AttentionStore, ids: list[int], size: int) -> list[Block]:
    """A chain that is saved, and that memory does not have."""
    chain = make_chain(ids, size)
    save(store, chain, "alice")
    store.flush()
    store.drop_memory()
    return chain


def stages_of(chain: list[Block]) -> list[Stage]:
    """What loads whole blocks into zeros, one stage for each layer."""
    pieces = [Piece(block.meta.key, 0, block.meta.token_count) for block in chain]
    names = [[f"layers.{layer}.{name}" for name in ("keys", "values")] for layer in range(LAYERS)]
    return [
        Stage(pieces, {name: torch.cat([block.tensors[name] for block in chain], dim=1).zero_() for name in layer})
        for layer in names
    ]


def load(store: AttentionStore, chain: list[Block]) -> list[dict[str, torch.Tensor]]:
    """Loads whole blocks, one stage for each layer; raises what the load raises."""
    stages = stages_of(chain)
    parts = [stage.parts() for stage in stages]
    targets = [{name: t for part in parts for name, t in part[place].items()} for place in range(len(chain))]
    running = store.load(stages)
    try:
        for stage in range(LAYERS):
            running.wait(stage)
    finally:
        running.finish()
    return targets


def same(chain: list[Block], loaded: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        torch.equal(tensor, target[name])
        for block, target in zip(chain, loaded, strict=True)
        for name, tensor in block.tensors.items()
    )
