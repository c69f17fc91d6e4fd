"""Load or recompute: what the gate chooses, against always loading and always computing.

A conversation is resumed from tiers of different speed, among them a disk that is made slow so that loading takes about
as long as computing. The gate begins each of them knowing nothing, and learns from its own turns alone: first turns, of
which nothing is known, and resumed ones.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.costs import gate as gating
from hf_attnstore.cache.costs.decide import Choice, Exploration
from hf_attnstore.cache.costs.learn import Costs
from hf_attnstore.lab.bench.methods import check_tier
from hf_attnstore.lab.bench.shapes import BenchError, is_exact, random_ids
from hf_attnstore.lab.bench.slow_disk import SlowDisk
from hf_attnstore.lab.bench.timing import Sample, timed_generate
from hf_attnstore.store.disk.surroundings import Surroundings

METHODS = ("load", "recompute", "gate", "plain")
"""Always loading, always computing what is known (both through the cache), the gate, and plain `generate`."""

AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Bandwidths of slow disks, relative to one at which loading takes about as long as computing."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tier:
    """Where a conversation is resumed from."""

    kind: str
    """ "memory" or "disk"."""
    bandwidth: float | None = None
    """Bytes per second of a disk that is made slow; None for one as fast as it is."""

    @property
    def label(self) -> str:
        if self.bandwidth is None:
            return "disk, warm" if self.kind == "disk" else self.kind
        return f"disk at {self.bandwidth / 1e6:,.3g} MB/s"


@dataclass
class Cell:
    """One history resumed from one tier."""

    tier: str
    bandwidth: float | None
    history: int
    ttft: dict[str, list[float]] = field(default_factory=lambda: {method: [] for method in METHODS})
    """Seconds to the first token, by method."""
    reused: list[int] = field(default_factory=list)
    """Tokens that the gate reused, turn by turn."""
    reason: str = ""
    """What the gate said in the last turn."""

    def median(self, method: str) -> float:
        return statistics.median(self.ttft[method])

    @property
    def best(self) -> float:
        """Seconds of the better of the two that always do the same."""
        return min(self.median("load"), self.median("recompute"))

    @property
    def regret(self) -> float:
        """How much longer the gate's turns took than that."""
        return self.median("gate") / self.best - 1

    @property
    def choice_regret(self) -> float:
        """The same of what it chose alone: where that was all or nothing, by the times of those that always do so. Says
        less, and is the same on a busy machine."""
        always = {self.history: self.median("load"), 0: self.median("recompute")}
        taken = [always.get(reused, own) for reused, own in zip(self.reused, self.ttft["gate"], strict=True)]
        return statistics.mean(taken) / self.best - 1

    @property
    def better_chosen(self) -> int:
        """In how many turns it chose the better of the two, whole: what a busy machine's clock changes least."""
        better = self.history if self.median("load") <= self.median("recompute") else 0
        return sum(reused == better for reused in self.reused)


class _AlwaysCompute(gating.Gate):
    """Reuses as little as can be."""

    def choose(self, *args: Any, **kwargs: Any) -> Choice:
        return Choice(0, "nothing is reused")


def measure(
    model: PreTrainedModel,
    histories: Sequence[int],
    new: int,
    bandwidths: Sequence[float],
    repeats: int,
    seed: int,
    folder: Path | None,
    progress: Progress,
) -> list[Cell]:
    """Measures every history from every tier.

    Args:
        histories: tokens, all of which the store has.
        new: tokens of the prompt beyond these.
        bandwidths: of slow disks, bytes per second; without any, five around where loading takes as long as computing.
        folder: for the store; temporary by default.

    Raises:
        BenchError: methods gave different tokens, in a dtype of at least 32 bits, or KV came from another tier.
    """
    cells = []
    with tempfile.TemporaryDirectory(prefix="attnstore-gate-", dir=folder) as place:
        prompts = {history: random_ids(model, history, (seed, history)) for history in histories}
        with AttentionStore(place, memory=1 << 40, on_device=0) as store:  # all of it, however long
            for history, ids in prompts.items():
                progress(f"computing {history:,} tokens to keep")
                timed_generate(model, ids, 0, lambda: AttentionStoreCache(model, store=store, drop=0, gate=False))
            store.flush()
            for history, ids in prompts.items():
                reused = _turn(model, store, "load", torch.cat([ids, ids[:, :1]], dim=1))[1].reused_tokens
                if reused != history:
                    raise BenchError(f"Of {history} tokens {reused} were kept.")
            cells += _tier(model, store, Tier("memory"), prompts, new, repeats, seed, progress)
        # nothing that was read from disk stays in memory there
        disk = SlowDisk()
        with AttentionStore(place, memory=0, surroundings=Surroundings(disk=disk)) as store:
            if not bandwidths:
                bandwidths = [factor * _crossover(model, store, prompts, new, seed) for factor in AROUND]
            for tier in [Tier("disk"), *(Tier("disk", bandwidth) for bandwidth in sorted(bandwidths, reverse=True))]:
                with disk.at(tier.bandwidth):
                    cells += _tier(model, store, tier, prompts, new, repeats, seed, progress)
    return cells


def _crossover(
    model: PreTrainedModel, store: AttentionStore, prompts: dict[int, torch.Tensor], new: int, seed: int
) -> float:
    """Bytes per second at which the middle one of the histories takes about as long to load as to compute."""
    history = sorted(prompts)[len(prompts) // 2]
    ids = torch.cat([prompts[history], random_ids(model, new, (seed, 99))], dim=1)
    computed = statistics.median(_turn(model, store, "recompute", ids)[0].ttft for _ in range(3))
    loaded = [_turn(model, store, "load", ids) for _ in range(3)]
    gain = computed - statistics.median(sample.ttft for sample, _ in loaded)
    return loaded[0][1].stats.loaded_bytes / max(gain, computed / 20)


def _tier(
    model: PreTrainedModel,
    store: AttentionStore,
    tier: Tier,
    prompts: dict[int, torch.Tensor],
    new: int,
    repeats: int,
    seed: int,
    progress: Progress,
) -> list[Cell]:
    _know_nothing(model, store)
    cells = [Cell(tier.label, tier.bandwidth, history) for history in prompts]
    number = 0
    for cell in cells:  # as every conversation begins: with turns of which nothing is known
        number += 1
        progress(f"{tier.label}, {cell.history:,} tokens: a first turn")
        _turn(model, store, "gate", random_ids(model, cell.history + new, (seed, 1, number)))
    for learning in (True, False):
        for repeat in range(4 if learning else repeats):
            for cell in cells:
                number += 1
                what = "learning" if learning else f"repeat {repeat + 1} of {repeats}"
                progress(f"{tier.label}, {cell.history:,} tokens: {what}")
                tail = random_ids(model, new, (seed, number))
                ids = torch.cat([prompts[cell.history], tail], dim=1)
                if learning:
                    _turn(model, store, "gate", ids)
                    continue
                turn = number % len(METHODS)
                tokens = set()
                for method in (*METHODS[turn:], *METHODS[:turn]):
                    sample, cache = _turn(model, store, method, ids)
                    cell.ttft[method].append(sample.ttft)
                    tokens.add(sample.tokens)
                    if method == "load":
                        check_tier(cache, tier.label, tier.kind)
                    if method == "gate":
                        cell.reused.append(cache.reused_tokens)
                        cell.reason = cache.stats.gate
                if len(tokens) > 1 and is_exact(model):
                    raise BenchError(f"The methods gave different tokens for {cell.history} tokens from {tier.label}.")
    return cells


def _know_nothing(model: PreTrainedModel, store: AttentionStore) -> None:
    probe = AttentionStoreCache(model, store=store, drop=0, save=False)
    ids = random_ids(model, 2, (7,))
    timed_generate(model, ids, 0, lambda: probe)
    learned = probe._setup.gate.learned
    assert learned is not None
    learned.costs, learned.exploration = Costs(), Exploration()


def _turn(
    model: PreTrainedModel, store: AttentionStore, method: str, ids: torch.Tensor
) -> tuple[Sample, AttentionStoreCache]:
    """One resumed turn that is not kept; whether it is timed or not, one by one and from the same state."""

    def make() -> Any:
        if method == "plain":
            return None
        cache = AttentionStoreCache(model, store=store, drop=0, save=False, gate=method != "load")
        if method == "recompute":
            cache._setup.gate = _AlwaysCompute(enabled=True, devices=cache._setup.gate.devices)
        cache._setup.gate.learns = method == "gate"
        return cache

    return timed_generate(model, ids, 0, make)
