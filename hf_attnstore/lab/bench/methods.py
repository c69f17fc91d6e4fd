"""The ways to get a conversation's history back that are measured side by side: one class each.

A method's `prepare` puts everything where the method says it is and is not timed; `run` is one turn.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_attnstore import AttentionStore, AttentionStoreCache, detach
from hf_attnstore.lab.bench import baselines, pagecache
from hf_attnstore.lab.bench.shapes import BenchError
from hf_attnstore.lab.bench.timing import CacheT, Sample, timed_generate

SESSION = "bench"


@dataclass
class Setting:
    """What all methods of one history length share.

    Attributes:
        ids: the whole prompt, `[1, history + new]`.
        history: tokens of it that are already known to the kept cache, the store and the files.
        decode: tokens decoded after the first new one.
        folder: an empty folder of the bench's own.
        store: holds the history as session `SESSION`.
        kept: a DynamicCache that holds the history; methods use copies of it.
        kv_bytes: bytes of the history's keys and values.
    """

    model: PreTrainedModel
    ids: torch.Tensor
    history: int
    decode: int
    folder: Path
    store: AttentionStore
    kept: DynamicCache
    kv_bytes: int
    evictions: list[tuple[float | None, float | None]]

    @property
    def blocks(self) -> list[Path]:
        """The store's block files. Looked up each time: a block that is not full is replaced when it grows."""
        return sorted((self.folder / "store" / "blocks").rglob("*.safetensors"))

    @property
    def torch_file(self) -> Path:
        return self.folder / "kept.pt"

    @property
    def safetensors_file(self) -> Path:
        return self.folder / "kept.safetensors"


class Method(ABC):
    """One way to have the history's KV when a turn begins."""

    key: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def prepare(self) -> None:
        """Untimed: put the KV where this method takes it from."""

    @abstractmethod
    def run(self) -> Sample:
        """One timed turn: the whole prompt in, `decode + 1` tokens out."""

    def _turn(self, make_cache: Callable[[], CacheT]) -> tuple[Sample, CacheT]:
        setting = self.setting
        return timed_generate(setting.model, setting.ids, setting.decode, make_cache)


class Recompute(Method):
    """Plain `generate` on the whole prompt."""

    key = "recompute"
    title = "recompute"

    def prepare(self) -> None:
        detach(self.setting.model)

    def run(self) -> Sample:
        return self._turn(lambda: None)[0]


class Kept(Method):
    """A DynamicCache that was kept in memory: the bound for anything that has to be loaded."""

    key = "kept"
    title = "DynamicCache kept in memory"

    def prepare(self) -> None:
        detach(self.setting.model)
        self._copy: DynamicCache | None = copy.deepcopy(self.setting.kept)

    def run(self) -> Sample:
        cache, self._copy = self._copy, None
        return self._turn(lambda: cache)[0]


class StoreDevice(Method):
    """This library, with all KV where the turn before left it, in layers with room for what is new."""

    key = "device"
    title = "store, left in place"

    def prepare(self) -> None:
        setting = self.setting
        setting.store.device_tier.resize(1 << 40)  # the other methods find a store without one
        cache = AttentionStoreCache(setting.model, SESSION, setting.store, save=False)
        with torch.no_grad():
            cache.match(setting.ids, new_tokens=setting.decode + 1)
        cache.save()
        setting.store.flush()

    def run(self) -> Sample:
        setting = self.setting
        sample, cache = self._turn(lambda: AttentionStoreCache(setting.model, SESSION, setting.store, save=False))
        setting.store.device_tier.resize(0)
        check_reuse(cache, self.title, setting.history, 0, "device")
        return with_load(sample, cache)


class StoreMemory(Method):
    """This library, every block in the memory tier."""

    key = "memory"
    title = "store, from memory"
    tier: ClassVar[str] = "memory"

    def prepare(self) -> None:
        # One short turn brings back what an earlier method dropped from the tier, and attaches to the model.
        setting = self.setting
        cache = AttentionStoreCache(setting.model, SESSION, setting.store, save=False, gate=False)
        timed_generate(setting.model, setting.ids, 0, lambda: cache)
        setting.store.flush()  # blocks come into the tier behind the turn

    def run(self) -> Sample:
        setting = self.setting
        sample, cache = self._turn(
            lambda: AttentionStoreCache(setting.model, SESSION, setting.store, save=False, gate=False)
        )
        setting.store.flush()  # whatever goes on behind the turn must not go on in the next one
        check_reuse(cache, self.title, setting.history, setting.kv_bytes, self.tier)
        return with_load(sample, cache)


class StoreDisk(StoreMemory):
    """This library, every block on disk, its file in the page cache."""

    key = "disk"
    title = "store, from disk, page cache warm"
    tier = "disk"

    def prepare(self) -> None:
        setting = self.setting
        AttentionStoreCache(setting.model, SESSION, setting.store, save=False, gate=False)  # attaches to the model
        setting.store.flush()
        setting.store.drop_memory()
        read_all(setting.blocks)


class StoreCold(StoreDisk):
    """This library, every block on disk and, if the kernel does as it is asked, not in the page cache."""

    key = "cold"
    title = "store, from disk, page cache dropped"

    def prepare(self) -> None:
        super().prepare()
        before = pagecache.resident_fraction(self.setting.blocks)
        pagecache.evict(self.setting.blocks)
        self.setting.evictions.append((before, pagecache.resident_fraction(self.setting.blocks)))


class TorchFile(Method):
    """A DynamicCache's tensors by `torch.save`, read back by `torch.load`."""

    key = "torch"
    title = "torch.load, page cache warm"

    def prepare(self) -> None:
        detach(self.setting.model)
        read_all([self._file])

    def run(self) -> Sample:
        setting = self.setting
        sample, _ = self._turn(lambda: baselines.cache_of(setting.model, self._read(), setting.history))
        return replace(sample, load=sample.setup, exposed=sample.setup, loaded_bytes=setting.kv_bytes)

    @property
    def _file(self) -> Path:
        return self.setting.torch_file

    def _read(self) -> dict[str, torch.Tensor]:
        return baselines.read_torch(self._file)


class SafetensorsFile(TorchFile):
    """A DynamicCache's tensors by `save_file`, read back by `load_file`."""

    key = "safetensors"
    title = "safetensors load_file, page cache warm"

    @property
    def _file(self) -> Path:
        return self.setting.safetensors_file

    def _read(self) -> dict[str, torch.Tensor]:
        return baselines.read_safetensors(self._file)


METHODS: tuple[type[Method], ...] = (
    Recompute,
    Kept,
    StoreDevice,
    StoreMemory,
    StoreDisk,
    StoreCold,
    TorchFile,
    SafetensorsFile,
)


def read_all(paths: list[Path]) -> None:
    """Read the files once, so that they are in the page cache."""
    scratch = memoryview(bytearray(sum(path.stat().st_size for path in paths) + 1))
    pagecache.read_into(paths, scratch)


def with_load(sample: Sample, cache: AttentionStoreCache) -> Sample:
    """The sample with the cache's own load figures."""
    stats = cache.stats
    return replace(
        sample,
        load=stats.load_seconds,
        exposed=stats.exposed_load_seconds,
        loaded_bytes=stats.loaded_bytes,
    )


def check_reuse(cache: AttentionStoreCache, title: str, history: int, kv_bytes: int, tier: str) -> None:
    """A figure is only worth something if the KV really came from where the method says.

    Raises:
        BenchError: not the whole history was reused, bytes are missing, or they came from another tier.
    """
    stats = cache.stats
    if stats.reused_tokens != history:
        raise BenchError(f"{title}: {stats.reused_tokens} tokens were reused, not the history's {history}.")
    # Sliding-window layers need only their window, so fewer bytes than there are can be right for them; a
    # DynamicCache, which `kv_bytes` was taken from, holds only the window as well.
    most = 1.05 * kv_bytes + 65_536 if kv_bytes else 0
    if not 0.99 * kv_bytes <= stats.loaded_bytes <= most:
        raise BenchError(f"{title}: {stats.loaded_bytes} bytes were loaded, the history has {kv_bytes}.")
    check_tier(cache, title, tier)


def check_tier(cache: AttentionStoreCache, title: str, tier: str) -> None:
    """Raises:
    BenchError: blocks came from nowhere, or not from this tier alone.
    """
    used = {name for name, blocks in cache.stats.blocks_from.items() if blocks}
    if used != {tier}:
        raise BenchError(f"{title}: blocks came from {sorted(used) or 'nowhere'}, not from {tier} alone.")
