"""What overlap of loading and saving with computing brings: resumed turns with it, with less of it, and without.

All ways are the same code, begun in another way (`loading`), run in turns in shuffled order.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_attnstore import AttentionStore, AttentionStoreCache, detach
from hf_attnstore.cache.transfer.load import Restore, as_it_comes
from hf_attnstore.lab.bench import baselines
from hf_attnstore.lab.bench.measure import memory_cap, same_tokens, step_order
from hf_attnstore.lab.bench.methods import SESSION, Kept, Setting, StoreCold, StoreDisk, StoreMemory, check_reuse
from hf_attnstore.lab.bench.shapes import BenchError, random_ids
from hf_attnstore.lab.bench.slow_disk import SlowDisk
from hf_attnstore.lab.bench.timing import Sample, timed_generate
from hf_attnstore.store.disk.surroundings import Surroundings
from hf_attnstore.timeline import Event, Timeline, exposed_seconds, in_order

JOB = "the job before"
"""The session whose turn runs while the next one's blocks are fetched."""
_JOB_TOKENS = 256
_FETCH_SECONDS = 10.0


Begin = Callable[[Restore], None]


def loading(*, depth: int | None = None, first: bool = False, io_threads: bool = False) -> Begin:
    """A way to begin a load that is not the best one, for `cache.begin_load`.

    Args:
        depth: how many layers are asked for beyond the one that computes; None: by what was measured.
        first: whether everything is in place before the first layer computes.
        io_threads: whether I/O threads bring what is for host memory too, and not only what is for devices.
    """

    def begin(restore: Restore) -> None:
        if io_threads:
            restore.load.use_threads()
        if depth is not None:
            restore.look_ahead(depth)
        restore.ask()
        if first:
            restore.settle()

    return begin


def save_late(cache: AttentionStoreCache) -> AttentionStoreCache:
    """Has a cache hand nothing over to the store before its next turn ends."""

    def hold(*_: object) -> None:
        hook.remove()
        cache.hold_back()

    hook = cache.model.register_forward_pre_hook(hold, prepend=True)  # before the forward looks what is to be saved
    return cache


@dataclass(frozen=True)
class Way:
    """One way to have the history's KV in place."""

    key: str
    title: str
    words: str
    begin: Begin = as_it_comes
    tier: str = "disk"
    """Where the blocks are when the turn begins: "disk", "memory", or "fetched" into memory under the job before."""


FIRST, ONE, MEASURED, ALL, THREADS, FETCHED, MEMORY = (
    Way("first", "no overlap", "everything is loaded before the first layer computes", loading(first=True)),
    Way("one", "one layer ahead", "layer by layer, without a pre-load buffer", loading(depth=1)),
    Way("measured", "as it comes", "as far ahead as the measured pace asks for; all first where the page cache has it"),
    Way("all", "all layers asked for", "layer by layer, all of them asked for at once", loading(depth=1 << 20)),
    Way(
        "threads", "I/O threads", "the same, read by I/O threads as it is for a device",
        loading(depth=1 << 20, io_threads=True),
    ),
    Way("fetched", "fetched before", "the session was scheduled when the job before began", tier="fetched"),
    Way("memory", "in memory", "all blocks are in memory already", tier="memory"),
)  # fmt: skip


@dataclass(frozen=True)
class Disk:
    """A disk, or a state of it."""

    key: str
    title: str
    cold: bool = False
    bytes_per_second: float | None = None


@dataclass(frozen=True)
class Point:
    """A turn: so many tokens of history, so many new ones."""

    history: int
    new: int

    @property
    def label(self) -> str:
        return f"{self.history:,} + {self.new:,}"


@dataclass
class PointResult:
    """What one point gave, one entry per repeat everywhere.

    Attributes:
        samples: turns by step: "kept" (a DynamicCache kept in memory), "memory", and "<disk>/<way>".
        fetched: share of the blocks that were in memory when a turn after `schedule` began.
        evictions: share of the block files in the page cache before and after it was dropped; None: unknown.
    """

    point: Point
    kv_bytes: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    fetched: dict[str, list[float]] = field(default_factory=dict)
    evictions: list[tuple[float | None, float | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class SavingResult:
    """Turns that save, one entry per repeat everywhere.

    Attributes:
        seconds: by "<turn>/<disk>/<arm>", until the turn was over for its caller: "none" saves nothing, "behind" is
            as it comes, "after" saves everything when the turn has ended and waits for the disk.
        flush: seconds that writing went on behind a turn, by the same names.
        saved_bytes: bytes that were saved, by turn.
    """

    history: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    flush: dict[str, list[float]] = field(default_factory=dict)
    saved_bytes: dict[str, int] = field(default_factory=dict)


ARMS: dict[str, str] = {
    "none": "not saved",
    "behind": "beside it (as it comes)",
    "after": "at its end, to disk",
}
TURNS: dict[str, str] = {"first": "first turn", "resumed": "resumed turn"}


def ways_of(device: torch.device) -> tuple[Way, ...]:
    """The ways that differ on a device: for one that is not the CPU, I/O threads read in any case."""
    ways = (FIRST, ONE, MEASURED, ALL, THREADS, FETCHED)
    return ways if device.type == "cpu" else tuple(way for way in ways if way is not THREADS)


@contextmanager
def no_gate() -> Iterator[None]:
    """Everything known is loaded, also where computing it would be faster."""
    before = os.environ.get("ATTNSTORE_GATE")
    os.environ["ATTNSTORE_GATE"] = "off"
    try:
        yield
    finally:
        if before is None:
            del os.environ["ATTNSTORE_GATE"]
        else:
            os.environ["ATTNSTORE_GATE"] = before


class Bench:
    """One history, saved in a store of its own, and the turns on top of it.

    Args:
        folder: an empty folder on the disk to measure.
        decode: tokens decoded after the first new one.
    """

    def __init__(
        self, model: PreTrainedModel, history: int, folder: Path, *, decode: int, seed: int, block_size: int
    ) -> None:
        detach(model)
        self._model = model
        self._seed = seed
        self._traces = 0
        self.history = random_ids(model, history, (seed, history))
        kept = baselines.filled_cache(model, self.history)
        nbytes = baselines.kv_bytes(kept)
        self.disk = SlowDisk()
        self.store = AttentionStore(
            folder / "store", memory=memory_cap(2 * nbytes), disk="1TiB", on_device=0, block_size=block_size,
            surroundings=Surroundings(disk=self.disk),
        )  # fmt: skip
        self.setting = Setting(
            model=model, ids=self.history, history=history, decode=decode, folder=folder, store=self.store, kept=kept,
            kv_bytes=nbytes, evictions=[],
        )  # fmt: skip
        self._fill(SESSION, self.history)
        self._job = random_ids(model, _JOB_TOKENS, (seed, history, 1))
        self._fill(JOB, self._job)

    def close(self) -> None:
        self.store.close()
        detach(self._model)

    def _fill(self, name: str, ids: torch.Tensor) -> None:
        timed_generate(self._model, ids, 0, lambda: AttentionStoreCache(self._model, name, self.store))
        self.store.flush()

    # loading

    def point(
        self, new: int, disks: Sequence[Disk], ways: Sequence[Way], repeats: int, progress: Callable[[str], None]
    ) -> PointResult:
        """Measures resumed turns with so many new tokens.

        Raises:
            BenchError: a way gave wrong tokens, or did not reuse what it should.
        """
        fresh = random_ids(self._model, new, (self._seed, self.setting.history, new, 2))
        setting = replace(self.setting, ids=torch.cat([self.history, fresh], dim=1), evictions=[])
        result = PointResult(Point(setting.history, new), setting.kv_bytes, evictions=setting.evictions)
        steps: dict[str, tuple[Disk, Way] | None] = {"kept": None, "memory": (Disk("", ""), MEMORY)}
        steps |= {f"{disk.key}/{way.key}": (disk, way) for disk in disks for way in ways}
        expected: tuple[int, ...] | None = None
        for repeat in range(-1, repeats):
            names = list(steps) if repeat < 0 else step_order(list(steps), repeat, self._seed)
            for name in names:
                progress(f"{result.point.label}: {name}")
                found = steps[name]
                if found is None:
                    kept = Kept(setting)
                    kept.prepare()
                    sample = kept.run()
                else:
                    sample = self._resume(setting, *found, result, name)
                if expected is None:
                    expected = sample.tokens
                same_tokens(name, sample.tokens, None, expected, exact=True)
                if repeat >= 0:
                    result.samples.setdefault(name, []).append(sample)
                else:
                    result.fetched.clear()
                    result.evictions.clear()
        return result

    def _resume(self, setting: Setting, disk: Disk, way: Way, result: PointResult, name: str) -> Sample:
        if way.tier == "memory":
            StoreMemory(setting).prepare()
        else:
            (StoreCold if disk.cold else StoreDisk)(setting).prepare()
        with self.disk.at(disk.bytes_per_second):
            if way.tier == "fetched":
                self._run_job(setting)
            sample, cache = timed_generate(
                self._model, setting.ids, setting.decode, lambda: self._cache(way.begin, save=False)
            )
            self.store.flush()
        if way.tier == "fetched":
            self._schedule_nothing()
            blocks = cache.stats.blocks_from
            result.fetched.setdefault(name, []).append(blocks.get("memory", 0) / max(sum(blocks.values()), 1))
            if cache.stats.reused_tokens != setting.history:
                raise BenchError(f"{way.title}: {cache.stats.reused_tokens} tokens were reused.")
        else:
            check_reuse(cache, way.title, setting.history, setting.kv_bytes, way.tier)
        return self._with_load(sample, cache)

    def _run_job(self, setting: Setting) -> None:
        """A turn of another session, which the blocks of the next one are fetched under."""
        self.store.schedule([SESSION])
        cache = AttentionStoreCache(self._model, JOB, self.store, save=False)
        timed_generate(self._model, self._job, setting.decode, lambda: cache)

    def _cache(self, begin: Begin, *, save: bool, name: str = SESSION) -> AttentionStoreCache:
        on_device = self._model.device.type == "cuda"  # only there does it take a recording to know what was exposed
        cache = AttentionStoreCache(self._model, name, self.store, save=save, record=on_device)
        cache.begin_load = begin
        return cache

    @staticmethod
    def _with_load(sample: Sample, cache: AttentionStoreCache) -> Sample:
        stats = cache.stats
        exposed = exposed_seconds(cache.timeline) if cache.record_timeline else stats.exposed_load_seconds
        return replace(sample, load=stats.load_seconds, exposed=exposed, loaded_bytes=stats.loaded_bytes)

    # saving

    def saving(self, new: int, disks: Sequence[Disk], repeats: int, progress: Callable[[str], None]) -> SavingResult:
        """Measures turns that save: beside themselves, after themselves, and not at all.

        Raises:
            BenchError: an arm gave wrong tokens, or did not save what it should.
        """
        result = SavingResult(self.setting.history)
        steps = [(turn, disk, arm) for turn in TURNS for disk in disks for arm in ARMS]
        for repeat in range(-1, repeats):
            order = range(len(steps)) if repeat < 0 else step_order([str(n) for n in range(len(steps))], repeat, 1)
            for number in order:
                turn, disk, arm = steps[int(number)]
                progress(f"saving, {self.setting.history:,} tokens: {turn}, {disk.key}, {arm}")
                seconds, flush, saved = self._save(turn, disk, arm, new, (repeat + 2) * len(steps) + int(number))
                if repeat >= 0:
                    name = f"{turn}/{disk.key}/{arm}"
                    result.seconds.setdefault(name, []).append(seconds)
                    result.flush.setdefault(name, []).append(flush)
                    result.saved_bytes[turn] = max(saved, result.saved_bytes.get(turn, 0))
        return result

    def _save(self, turn: str, disk: Disk, arm: str, new: int, seed: int) -> tuple[float, float, int]:
        """One turn on new tokens of its own, since blocks that are there already would not be written again."""
        history, decode = self.setting.history, self.setting.decode
        if turn == "resumed":
            ids = torch.cat([self.history, random_ids(self._model, new, (self._seed, history, seed, 3))], dim=1)
            StoreMemory(self.setting).prepare()
            self.store.fork(SESSION, "saving")
        else:
            ids = random_ids(self._model, history, (self._seed, history, seed, 4))
            AttentionStoreCache(self._model, None, self.store, save=False)  # attaches
        with self.disk.at(disk.bytes_per_second):
            make = partial(self._cache, as_it_comes, save=arm != "none", name="saving")
            late = (lambda: save_late(make())) if arm == "after" else make
            sample, cache = timed_generate(self._model, ids, decode, late)
            began = time.perf_counter()
            self.store.flush()
            flush = time.perf_counter() - began
        saved, reused = cache.stats.saved_bytes, cache.stats.reused_tokens
        if bool(saved) != (arm != "none") or reused != (history if turn == "resumed" else 0):
            raise BenchError(f"{TURNS[turn]}, {ARMS[arm]}: {saved} bytes were saved, {reused} tokens reused.")
        del cache
        if turn == "resumed":
            detach(self._model)
            expected, _ = timed_generate(self._model, ids, decode, partial(copy.deepcopy, self.setting.kept))
            if sample.tokens != expected.tokens:
                raise BenchError(f"{TURNS[turn]}, {ARMS[arm]}: WRONG TOKENS, not what a kept DynamicCache gives.")
        if turn == "resumed" or arm != "none":
            self.store.delete("saving")
        if arm == "after":
            return sample.total + flush, 0.0, saved
        return sample.total, flush, saved

    # timelines

    def trace(self, new: int, disk: Disk, begin: Begin, upcoming: int = 0) -> tuple[tuple[Event, ...], Sample]:
        """One recorded turn that loads from disk and saves.

        Args:
            upcoming: tokens of the session that is scheduled next, and fetched meanwhile; 0 for none.
        """
        setting = self.setting
        if upcoming:
            self._fill("upcoming", random_ids(self._model, upcoming, (self._seed, upcoming, 6)))
        for name in ("warm-up", "traced"):
            self._traces += 1  # on new tokens each time: what was saved is not saved again
            fresh = random_ids(self._model, new, (self._seed, setting.history, self._traces, 5))
            ids = torch.cat([self.history, fresh], dim=1)
            self.store.fork(SESSION, name)
            (StoreCold if disk.cold else StoreDisk)(setting).prepare()

            def make(name: str = name) -> AttentionStoreCache:
                cache = AttentionStoreCache(self._model, name, self.store, record=True)
                cache.begin_load = begin
                return cache

            behind = Timeline()  # what is fetched may take longer than the turn
            with self.disk.at(disk.bytes_per_second), self._scheduled("upcoming" if upcoming else None):
                self.store.recorders.include(behind)
                sample, cache = timed_generate(self._model, ids, setting.decode, make)
                self.store.flush()
                self._wait_for("upcoming" if upcoming else None)
                self.store.recorders.leave_out(behind)
            check_reuse(cache, "the traced turn", setting.history, setting.kv_bytes, "disk")
            self.store.delete(name)
        return in_order({*cache.timeline, *behind.events()}), self._with_load(sample, cache)

    def _wait_for(self, name: str | None) -> None:
        """Returns when a session is in memory, or nothing more of it comes."""
        if name is None:
            return
        until = time.monotonic() + _FETCH_SECONDS
        blocks = [span.block for span in self.store.manifest(name).spans]
        while any(self.store.tier_of(key) != "memory" for key in blocks) and time.monotonic() < until:
            time.sleep(0.01)

    @contextmanager
    def _scheduled(self, name: str | None) -> Iterator[None]:
        """Until this ends, a session is scheduled as soon as the model begins to compute."""
        if name is None:
            yield
            return

        def schedule(*_: object) -> None:
            hook.remove()
            self.store.schedule([name])

        hook = self._model.register_forward_pre_hook(schedule)
        try:
            yield
        finally:
            hook.remove()
            self._schedule_nothing()

    def _schedule_nothing(self) -> None:
        """Returns when what is being fetched is in memory, or it would get there in the middle of the next turn."""
        self.store.schedule([])
        self.store._fetcher.drain()
