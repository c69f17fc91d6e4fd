"""What durability and encryption cost: the same blocks written, committed and loaded under each setting, in turns."""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...store import AttentionStore
from ...store.blocks.block import Block, BlockMeta
from ...store.blocks.keys import block_key, encode_tokens
from ...store.records.manifest import Manifest, SpanRow
from ...store.transfer.stages import Piece, Stage

SETTINGS = ("as it comes", "durability=power", "encrypted", "encrypted, durability=power")
_FINGERPRINT = "0" * 40
_TOKENS = 256
_HEADS = 8
_DIM = 64


@dataclass
class Speeds:
    """Of one setting; every measurement."""

    write: list[float] = field(default_factory=list)
    """Bytes per second, from handing over to the file's row in the index."""
    load: list[float] = field(default_factory=list)
    """Bytes per second into the targets, from files that the page cache has."""
    commit: list[float] = field(default_factory=list)
    """Seconds of committing a turn."""

    def medians(self) -> tuple[float, float, float]:
        return statistics.median(self.write), statistics.median(self.load), statistics.median(self.commit)


def run(folder: Path, layers: int, blocks: int, repeats: int) -> dict[str, Speeds]:
    """Measures every setting `repeats` times, in turns, on blocks of `layers` layers."""
    found = {setting: Speeds() for setting in SETTINGS}
    key = secrets.token_bytes(32)
    for repeat in range(repeats):
        for setting in SETTINGS[repeat % len(SETTINGS) :] + SETTINGS[: repeat % len(SETTINGS)]:
            with tempfile.TemporaryDirectory(dir=folder, prefix="store-") as root:
                _measure(Path(root), setting, key, layers, blocks, repeat, found[setting])
    return found


def _measure(root: Path, setting: str, key: bytes, layers: int, blocks: int, seed: int, speeds: Speeds) -> None:
    with AttentionStore(
        root,
        memory=0,
        durability="power" if "power" in setting else "process",
        encryption_key=key if "encrypted" in setting else None,
    ) as store:
        chain = _chain(store, layers, blocks, seed)
        size = sum(block.nbytes for block in chain)
        began = time.perf_counter()
        for block in chain:
            store._disk.put(block)
        speeds.write.append(size / (time.perf_counter() - began))
        for count in range(1, blocks + 1):
            spans = tuple(SpanRow(block.meta.key, 0, _TOKENS) for block in chain[:count])
            manifest = Manifest(spans, length=count * _TOKENS)
            began = time.perf_counter()
            store._disk.commit("", "session", _FINGERPRINT, manifest)
            speeds.commit.append(time.perf_counter() - began)
        for measured in (False, True):  # once to warm up
            pieces = [Piece(block.meta.key, 0, _TOKENS) for block in chain]
            stages = []
            for layer in range(layers):
                names = (f"layers.{layer}.keys", f"layers.{layer}.values")
                stages.append(Stage(pieces, {n: torch.zeros(_HEADS, blocks * _TOKENS, _DIM) for n in names}))
            began = time.perf_counter()
            load = store.load(stages)
            try:
                for number in range(layers):
                    load.wait(number)
            finally:
                load.finish()
            if measured:
                speeds.load.append(size / (time.perf_counter() - began))
        expected = torch.cat([block.tensors["layers.0.keys"] for block in chain], dim=1)
        if not torch.equal(stages[0].targets["layers.0.keys"], expected):
            raise AssertionError(f"{setting}: what was loaded is not what was written")


def _chain(store: AttentionStore, layers: int, blocks: int, seed: int) -> list[Block]:
    generator = torch.Generator().manual_seed(seed)
    parent = store.root(_FINGERPRINT)
    chain = []
    for number in range(blocks):
        tokens = encode_tokens([seed * 10_000 + number] * _TOKENS)
        key = block_key(parent, tokens, store.secret)
        tensors = {
            f"layers.{layer}.{name}": torch.randn(_HEADS, _TOKENS, _DIM, generator=generator)
            for layer in range(layers)
            for name in ("keys", "values")
        }
        chain.append(Block(BlockMeta(key, parent, _FINGERPRINT, number * _TOKENS, tokens), tensors))
        parent = key
    return chain
