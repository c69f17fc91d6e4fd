"""The measurement of one history length: every method in turn, interleaved, and nothing timed twice.

Each repeat runs every step once, in an order shuffled by the seed, so that drift of the machine falls on all alike, and
figures of one repeat can be compared as pairs; the ways to resume a turn follow one another. A first round warms up and
is thrown away.
"""

from __future__ import annotations

import copy
import random
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_attnstore import AttentionStore, AttentionStoreCache, detach
from hf_attnstore.lab.bench import baselines, pagecache
from hf_attnstore.lab.bench.methods import METHODS, SESSION, Method, Setting, StoreCold, check_reuse, with_load
from hf_attnstore.lab.bench.shapes import BenchError, is_exact, random_ids
from hf_attnstore.lab.bench.timing import Sample, settle, timed_generate

PROBES: dict[str, str] = {
    "copy": "plain copy, destination touched before",
    "copy_fresh": "plain copy into fresh memory",
    "read": "plain read, page cache warm",
    "read_cold": "plain read, page cache dropped",
}


@dataclass(frozen=True)
class Workload:
    """One turn to measure: `history` known tokens, `new` tokens on top, `decode` decoded after the first."""

    history: int
    new: int
    decode: int
    repeats: int
    seed: int
    recompute: int | None = None
    """Repeats in which everything is computed anew, which is what takes long after a long history; None: in all."""

    @property
    def recomputed(self) -> int:
        """Repeats in which that is so."""
        return self.repeats if self.recompute is None else min(self.recompute, self.repeats)


@dataclass
class Measured:
    """What one history length gave, one entry per repeat everywhere.

    Attributes:
        kv_bytes: bytes of the history's keys and values.
        file_bytes: bytes of the history's block files.
        attach_seconds: seconds of the first attach: hooks and the digest of the weights, once per model.
        samples: turns by method key, and `first` (a turn with an empty store), `saving` and `not_saving`
            (a resumed turn with and without saving, each on new tokens of its own).
        flush: seconds until everything was on disk after a `first` and a `saving` turn had ended.
        saved_bytes: bytes that the `first` and the `saving` turn saved.
        probes: seconds that `PROBES` took for `kv_bytes` (copies) or `file_bytes` (reads).
        evictions: share of the block files in the page cache before and after it was dropped; None: unknown.
        others: share of all CPUs that other processes used meanwhile, 0 to 1.
        notes: what a reader of the figures must know.
    """

    workload: Workload
    kv_bytes: int
    file_bytes: int = 0
    attach_seconds: float = 0.0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    flush: dict[str, list[float]] = field(default_factory=dict)
    saved_bytes: dict[str, int] = field(default_factory=dict)
    probes: dict[str, list[float]] = field(default_factory=dict)
    evictions: list[tuple[float | None, float | None]] = field(default_factory=list)
    others: float = 0.0
    notes: list[str] = field(default_factory=list)


def step_order(steps: Sequence[str], repeat: int, seed: int, together: Collection[str] = ()) -> list[str]:
    """The order of one repeat's steps: shuffled, the same for the same seed.

    Args:
        together: steps that come one after the other, in an order that is shuffled too: the shorter the time between
            two figures, the less of their ratio is the machine's drift.
    """
    dice = random.Random(f"{seed}/{repeat}")
    apart = [step for step in steps if step not in together]
    near = [step for step in steps if step in together]
    dice.shuffle(apart)
    dice.shuffle(near)
    place = dice.randrange(len(apart) + 1)
    return apart[:place] + near + apart[place:]


def same_tokens(
    title: str, got: Sequence[int], kept: Sequence[int] | None, plain: Sequence[int], exact: bool
) -> str | None:
    """Compare one turn's tokens with those of plain generate, and of a kept cache.

    A history prefilled before and a prompt prefilled in one go are rounded differently. In float32 that
    does not change tokens; in 16 bits it can, for a DynamicCache as for anything else. So there, a method
    must give what the kept DynamicCache gives, and a difference of that one from plain generate is a note.

    Args:
        kept: tokens of the turn with a kept DynamicCache; None when `got` is that turn itself.
        exact: whether the model's dtype has at least 32 bits.

    Returns:
        A note for the report, or None.

    Raises:
        BenchError: the tokens differ.
    """
    if list(got) == list(plain):
        return None
    at = next((i for i, (a, b) in enumerate(zip(got, plain, strict=False)) if a != b), min(len(got), len(plain)))
    if exact or (kept is not None and list(got) != list(kept)):
        raise BenchError(f"{title}: WRONG TOKENS. New token {at} is not what plain generate gives.")
    return (
        f"From new token {at} on, a kept DynamicCache gives other tokens than plain generate, by rounding "
        "in 16 bits; the other methods give what the kept cache gives."
    )


def measure(
    model: PreTrainedModel,
    workload: Workload,
    folder: Path,
    *,
    block_size: int = 256,
    progress: Callable[[str, int], None] = lambda doing, total: None,
    steps: Sequence[str] | None = None,
) -> Measured:
    """Measure one history length.

    Args:
        model: attached to nothing; left attached to nothing.
        folder: an empty folder on the disk to measure; left with the store, closed, and the baselines' files.
        block_size: tokens per block.
        progress: called before each step with what is being done and how many steps there are in all.
        steps: names of steps to leave the others out: methods, `first`, `saving`, probes. Plain generate is of `first`,
            and a step of its own (`recompute`) where that is left out.

    Raises:
        BenchError: a method gave wrong tokens, or did not reuse what it should.
    """
    with torch.inference_mode():
        detach(model)
        ids = random_ids(model, workload.history + workload.new, (workload.seed, workload.history))
        kept = baselines.filled_cache(model, ids[:, : workload.history])
        bytes_ = baselines.kv_bytes(kept)
        result = Measured(workload, bytes_)
        with (
            _store(folder, bytes_, block_size) as store,
            _store(folder / "cold", bytes_, block_size) as cold_store,
        ):
            setting = Setting(
                model=model,
                ids=ids,
                history=workload.history,
                decode=workload.decode,
                folder=folder,
                store=store,
                kept=kept,
                kv_bytes=bytes_,
                evictions=result.evictions,
            )
            baselines.write_torch(kept, setting.torch_file)
            baselines.write_safetensors(kept, setting.safetensors_file)
            # Files of their own: what was read back from the disk lies in the page cache in smaller pieces than what
            # was written, and is then read a third more slowly.
            cold = replace(setting, folder=folder / "cold", store=cold_store)
            _Run(setting, cold, workload, result, block_size).all(progress, steps)
        detach(model)
    return result


def _store(folder: Path, kv_bytes: int, block_size: int) -> AttentionStore:
    """An empty store where a `Setting` with that folder looks for it, whose device tier is for who measures that."""
    memory = memory_cap(kv_bytes)
    return AttentionStore(folder / "store", memory=memory, disk="1TiB", block_size=block_size, on_device=0)


def _save_history(setting: Setting) -> float:
    """Returns the seconds it took to make the cache, in which the first one for a model attaches to it."""
    start = time.perf_counter()
    cache = AttentionStoreCache(setting.model, SESSION, setting.store, gate=False)
    seconds = time.perf_counter() - start
    timed_generate(setting.model, setting.ids[:, : setting.history], 0, lambda: cache)
    setting.store.flush()
    return seconds


def memory_cap(kv_bytes: int) -> int:
    """Bytes for the memory tier: enough that nothing measured is evicted from it."""
    return max(2 * 2**30, 4 * kv_bytes)


class _Run:
    """The steps of one history length, over one setting; `cold` is another of the same history, whose files leave the
    page cache."""

    def __init__(self, setting: Setting, cold: Setting, workload: Workload, result: Measured, block_size: int) -> None:
        self.setting = setting
        self.cold = cold
        self.workload = workload
        self.result = result
        self.block_size = block_size
        self.methods: dict[str, Method] = {kind.key: kind(cold if kind is StoreCold else setting) for kind in METHODS}
        self.plain: tuple[int, ...] | None = None
        self.kept: tuple[int, ...] | None = None
        self.exact = is_exact(setting.model)

    def all(self, progress: Callable[[str, int], None], only: Sequence[str] | None) -> None:
        steps: dict[str, Callable[[int], None]] = {"first": self._first_turn, "saving": self._saving_turn}
        for key in self.methods:
            if key != "recompute" or (only is not None and "first" not in only):  # else part of the first turn's pair
                steps[key] = partial(self._method, key)
        for key in PROBES:
            steps[key] = partial(self._probe, key)
        if only is not None:
            steps = {key: step for key, step in steps.items() if key in only}
        if "recompute" in steps:
            steps["recompute"] = lambda _: self._method_plain()
        anew = {"first", "recompute"} & steps.keys()
        without = len(anew) * (self.workload.repeats - self.workload.recomputed)
        total = (self.workload.repeats + 1) * len(steps) + 1 - without
        progress("saving the history", total)
        self._prepare(with_cold=not {"cold", "read_cold"}.isdisjoint(steps))
        for repeat in range(-1, self.workload.repeats):
            # The warm-up runs in order: plain generate and the kept cache, which others must equal, first.
            names = list(steps) if repeat < 0 else step_order(list(steps), repeat, self.workload.seed, self.methods)
            if repeat < 0:
                names.sort(key=lambda name: ({"first": 0, "recompute": 0, "kept": 1}).get(name, 2))
            for name in names:
                if name in anew and repeat >= self.workload.recomputed:
                    continue
                where = "warm-up" if repeat < 0 else f"repeat {repeat + 1} of {self.workload.repeats}"
                progress(f"{where}: {name}", total)
                steps[name](repeat)
            if repeat < 0:
                for lists in (self.result.samples, self.result.flush, self.result.probes):
                    lists.clear()
                self.result.evictions.clear()

    def _prepare(self, with_cold: bool) -> None:
        """Save the history as a session of both settings, of the other one where it is of use. Measures the first
        attach on the way."""
        setting = self.setting
        settle(setting.model.device)
        self.result.attach_seconds = _save_history(setting)
        if with_cold:
            _save_history(self.cold)
        self.result.file_bytes = sum(path.stat().st_size for path in setting.blocks)
        self.source = torch.ones(setting.kv_bytes, dtype=torch.uint8)
        self.target = torch.zeros(setting.kv_bytes, dtype=torch.uint8, device=setting.model.device)
        if setting.model.device.type == "cuda":
            self.source = self.source.pin_memory()

    def _keep(self, key: str, sample: Sample) -> None:
        self.result.samples.setdefault(key, []).append(sample)

    def _check(self, title: str, tokens: tuple[int, ...]) -> None:
        if self.plain is None:
            raise BenchError("Plain generate must come before what is compared with it.")
        note = same_tokens(title, tokens, self.kept, self.plain, self.exact)
        if note and note not in self.result.notes:
            self.result.notes.append(note)

    def _method(self, key: str, repeat: int) -> None:
        method = self.methods[key]
        method.prepare()
        sample = method.run()
        self._check(method.title, sample.tokens)
        if key == "kept":
            self.kept = sample.tokens
        self._keep(key, sample)

    def _first_turn(self, repeat: int) -> None:
        """Plain generate, and the same turn with an empty store that saves it all, in alternating order."""
        setting = self.setting
        arms = ["recompute", "first"]
        for arm in arms if repeat % 2 else arms[::-1] if repeat >= 0 else arms:
            if arm == "recompute":
                self._method_plain()
            else:
                folder = setting.folder / "first"
                with AttentionStore(
                    folder, memory=memory_cap(setting.kv_bytes), disk="1TiB", block_size=self.block_size
                ) as store:
                    AttentionStoreCache(setting.model, SESSION, store)  # attaches, outside of the timed region
                    sample, cache = timed_generate(
                        setting.model,
                        setting.ids,
                        setting.decode,
                        partial(AttentionStoreCache, setting.model, SESSION, store),
                    )
                    self._flush("first", store)
                    if cache.stats.reused_tokens:
                        raise BenchError("A first turn with an empty store reused something.")
                    self.result.saved_bytes["first"] = cache.stats.saved_bytes
                    del cache
                shutil.rmtree(folder)
                # Prefilled in one go, like plain generate: equal to it in any dtype.
                if self.plain is not None and sample.tokens != self.plain:
                    raise BenchError("A first turn with the store: WRONG TOKENS, not what plain generate gives.")
                self._keep("first", sample)

    def _method_plain(self) -> None:
        method = self.methods["recompute"]
        method.prepare()
        sample = method.run()
        if self.plain is not None and sample.tokens != self.plain:
            raise BenchError("Plain generate gave other tokens than before: this model is not deterministic here.")
        self.plain = sample.tokens
        self._keep("recompute", sample)

    def _saving_turn(self, repeat: int) -> None:
        """A resumed turn with saving and one without, each on new tokens of its own.

        Tokens of their own, because blocks that are there already would not be written again.
        """
        setting, workload = self.setting, self.workload
        arms = ["saving", "not_saving"]
        for number, arm in enumerate(arms if repeat % 2 else arms[::-1]):
            fresh = random_ids(setting.model, workload.new, (workload.seed, workload.history, repeat + 2, number))
            ids = torch.cat([setting.ids[:, : setting.history], fresh], dim=1)
            name = f"{arm}-{repeat}"
            setting.store.fork(SESSION, name)
            self.methods["memory"].prepare()
            sample, cache = timed_generate(
                setting.model,
                ids,
                setting.decode,
                partial(AttentionStoreCache, setting.model, name, setting.store, save=arm == "saving"),
            )
            check_reuse(cache, f"turn, {arm}", setting.history, setting.kv_bytes, "memory")
            if arm == "saving":
                self._flush("saving", setting.store)
                self.result.saved_bytes["saving"] = cache.stats.saved_bytes
                if not cache.stats.saved_bytes:
                    raise BenchError("The turn with saving saved nothing.")
            sample = with_load(sample, cache)
            del cache
            setting.store.delete(name)
            detach(setting.model)
            expected, _ = timed_generate(setting.model, ids, setting.decode, partial(copy.deepcopy, setting.kept))
            if sample.tokens != expected.tokens:
                raise BenchError(f"turn, {arm}: WRONG TOKENS, not what a kept DynamicCache gives.")
            self._keep(arm, sample)

    def _flush(self, key: str, store: AttentionStore) -> None:
        start = time.perf_counter()
        store.flush()
        self.result.flush.setdefault(key, []).append(time.perf_counter() - start)

    def _probe(self, key: str, repeat: int) -> None:
        setting = self.setting
        settle(setting.model.device)
        if key in ("copy", "copy_fresh"):
            start = time.perf_counter()
            target = self.target if key == "copy" else torch.empty_like(self.target)
            target.copy_(self.source)
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            seconds = time.perf_counter() - start
        else:
            blocks = (self.cold if key == "read_cold" else setting).blocks
            buffer = memoryview(bytearray(sum(path.stat().st_size for path in blocks) + 1))
            pagecache.read_into(blocks, buffer)
            if key == "read_cold":
                pagecache.evict(blocks)
            seconds = pagecache.read_into(blocks, buffer)
        self.result.probes.setdefault(key, []).append(seconds)
