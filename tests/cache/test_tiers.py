"""A tier is one small interface: the tiers that there are behave alike, and one below the disk serves turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.store_blocks import make_chain
from support.tiny_models import BLOCK, make_model, tokens
from support.turns import Reference, assert_reused, assert_same, follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.store.blocks.block import Block, Bytes
from hf_attnstore.store.blocks.format import encode_block
from hf_attnstore.store.blocks.keys import Key
from hf_attnstore.store.blocks.stored import Ranges, StoredBlock
from hf_attnstore.store.blocks.tier import Tier


class Held(Ranges):
    """Bytes in memory."""

    def __init__(self, data: bytes, reads: list[int]) -> None:
        self._data, self._reads = data, reads

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, buffers: Sequence[Bytes], offset: int) -> int:
        self._reads.append(offset)
        part = self._data[offset : offset + buffers[0].nbytes]  # a part of what was asked for, as engines may
        memoryview(buffers[0])[: len(part)] = part
        return len(part)


class DictTier(Tier):
    """Encoded blocks by key."""

    name = "dict"
    capacity = 1 << 30

    def __init__(self) -> None:
        self.blocks: dict[Key, bytes] = {}
        self.reads: list[int] = []

    @property
    def used(self) -> int:
        return sum(map(len, self.blocks.values()))

    def find(self, keys: Sequence[Key]) -> set[Key]:
        return {key for key in keys if key in self.blocks}

    def sources(self, keys: Sequence[Key]) -> Mapping[Key, Callable[[], StoredBlock]]:
        return {key: partial(self._open, key) for key in self.find(keys)}

    def _open(self, key: Key) -> StoredBlock:
        return StoredBlock(f"dict:{key.hex()}", Held(self.blocks[key], self.reads), self.vault, key)

    def put(self, block: Block, supersedes: Key | None = None) -> bool:
        header, chunks = encode_block(block, self.vault)
        self.blocks[block.meta.key] = b"".join([header, *map(np.ndarray.tobytes, chunks)])
        return True

    def delete(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self.blocks.pop(key, None)


@pytest.fixture(autouse=True)
def _no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSTORE_GATE", "off")


@pytest.mark.parametrize("which", range(3))
def test_every_tier_finds_opens_and_lets_go_of_what_was_put_in(which: int, tmp_path: Path) -> None:
    first, second = make_chain(list(range(32)), 16)
    with AttentionStore(tmp_path, block_size=16, below=[DictTier()]) as store:
        tier = store._tiers[which]
        keys = [first.meta.key, second.meta.key]
        assert tier.find(keys) == set() == set(tier.sizes(keys))
        assert store.reserve(first.nbytes + second.nbytes)
        before = tier.used
        assert tier.put(first)
        assert tier.put(second)
        assert before <= tier.used <= tier.capacity
        assert tier.find([*keys, b"x" * 32]) == set(tier.sizes(keys)) == set(keys)
        tier.touch(keys)
        assert tier.describe(keys[1]) == (16, second.meta.tokens)
        assert tier.describe(keys[1], "another model") is None
        for key, opens in tier.sources(keys).items():
            source = opens()
            wanted = {first.meta.key: first, second.meta.key: second}[key]
            if not isinstance(source, Block):
                with source:
                    assert source.specs() == wanted.specs()
                    source = Block(source.read_meta(), source.fetch(source.specs()))
            assert source.meta == wanted.meta
            assert all(torch.equal(source.tensors[name], tensor) for name, tensor in wanted.tensors.items())
        tier.delete([keys[1], b"x" * 32])
        assert tier.find(keys) == {keys[0]}
        assert not tier.sources([keys[1]])


def converse(tier: DictTier, folder: Path) -> torch.Tensor:
    """A first turn of 70 tokens on some machine. Returns the prompt of the next one."""
    model = make_model()
    with AttentionStore(folder, block_size=BLOCK, below=[tier]) as store:
        ours = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
        store.flush()
        assert store.stats()["dict_used"] == tier.used > 0
    return follow_up(ours, 20, 2)


def expected(prompt: torch.Tensor, kept: int) -> Any:
    """The second turn with the KV of so many tokens kept in memory."""
    reference = Reference(make_model())
    if kept:
        reference.turn(tokens(70))
        reference.cache.crop(kept - 75)
    return reference.turn(prompt)


def test_what_memory_and_disk_lost_comes_back_layer_by_layer_from_below(tmp_path: Path) -> None:
    tier, model = DictTier(), make_model()
    prompt = converse(tier, tmp_path / "one")
    whole = 75 // BLOCK
    with AttentionStore(tmp_path / "another", block_size=BLOCK, below=[tier]) as store:
        tier.reads.clear()
        cache = AttentionStoreCache(model, "alice", store)
        assert_same(turn(model, prompt, cache), expected(prompt, whole * BLOCK))
        assert_reused(cache, prompt, whole * BLOCK)
        assert cache.stats.blocks_from == {"dict": whole}
        assert cache.stats.loaded_bytes == whole * BLOCK * 384
        assert len(set(tier.reads)) > 2 * whole  # a header, and ranges of each layer
        store.flush()
        assert store.residence("alice")["memory"] > 0
        again = AttentionStoreCache(model, "bob", store)
        assert torch.equal(turn(model, prompt, again).sequences, turn(make_model(), prompt, None).sequences)
        assert again.stats.blocks_from.keys() == {"memory"}
        store.drop_memory()  # it was brought to the disk, too, before what follows it
        tier.blocks.clear()
        after = AttentionStoreCache(model, "carol", store)
        assert torch.equal(turn(model, prompt, after).sequences, turn(make_model(), prompt, None).sequences)
        assert after.stats.blocks_from.keys() == {"disk"}


@pytest.mark.parametrize("what", ["missing", "cut", "flipped", "another's", "unreachable"])
def test_a_block_that_fails_below_is_computed_again(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, model = DictTier(), make_model()
    prompt = converse(tier, tmp_path / "one")
    key, other = list(tier.blocks)[2:4]
    data = tier.blocks[key]
    if what == "unreachable":

        def fails(self: Held, buffers: Sequence[Bytes], offset: int) -> int:
            raise ConnectionResetError(104, "Connection reset by peer")

        monkeypatch.setattr(Held, "read", fails)
    elif what == "missing":
        del tier.blocks[key]
    else:
        flipped = data[:-200] + bytes([data[-200] ^ 1]) + data[-199:]
        tier.blocks[key] = {"cut": data[:-1], "flipped": flipped, "another's": tier.blocks[other]}[what]
    with AttentionStore(tmp_path / "another", block_size=BLOCK, below=[tier]) as store:
        cache = AttentionStoreCache(model, "alice", store)
        kept = 0 if what == "unreachable" else 2 * BLOCK
        assert_same(turn(model, prompt, cache), expected(prompt, kept))
        assert_reused(cache, prompt, kept)
        store.flush()
        assert what == "unreachable" or tier.blocks[key] == data  # it was made again, and went up


def test_what_is_deleted_goes_from_below_too(tmp_path: Path) -> None:
    tier, model = DictTier(), make_model()
    with AttentionStore(tmp_path, block_size=BLOCK, below=[tier], disk="1GiB") as store:
        turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
        store.flush()
        assert len(tier.blocks) == len(store.manifest("alice").spans) > 4
        store.delete("alice")
        assert tier.blocks == {}


def test_a_tier_below_serves_a_store_without_a_disk(tmp_path: Path) -> None:
    tier, model = DictTier(), make_model()
    with AttentionStore(tmp_path, block_size=BLOCK, below=[tier], disk=0) as store:
        ours = turn(model, tokens(70), AttentionStoreCache(model, None, store)).sequences
        store.flush()
        assert store.stats()["not_saved_blocks"] == 0
        store.drop_memory()
        prompt = follow_up(ours, 20, 2)
        cache = AttentionStoreCache(model, None, store)
        assert_same(turn(model, prompt, cache), expected(prompt, 4 * BLOCK))
        assert_reused(cache, prompt, 4 * BLOCK)
        assert cache.stats.blocks_from == {"dict": 4}
