"""Many sessions on one model: with a queue that tells the store what comes, and without; what it costs to decide."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_attnstore import AttentionStore, AttentionStoreCache, Turn, TurnQueue, attach
from hf_attnstore.cache.model.argument import as_generate_takes
from hf_attnstore.lab.bench.shapes import random_ids
from hf_attnstore.store.eviction.accounts import TierBook
from hf_attnstore.store.eviction.policies import POLICIES, Use, make_policy

Progress = Callable[[str], None]

WAYS = ("queue", "one by one")
"""Every session has a turn in a `TurnQueue`, the next one as soon as one is over; or each turn is begun when the one
before is over, and nobody says so before."""

BAR_IN_MEMORY = 0.95
BAR_DECISION_SECONDS = 20e-6


@dataclass
class Way:
    """What the turns of one way were like, the first turn of every session left out."""

    turns: int = 0
    whole: int = 0
    """Turns of which every block was in memory."""
    blocks: int = 0
    blocks_in_memory: int = 0
    recomputed: int = 0
    """Turns that reused nothing."""
    exposed: list[float] = field(default_factory=list)
    """Seconds that computing waited for loads, turn by turn."""
    seconds: float = 0.0

    @property
    def in_memory(self) -> float:
        """Share of turns that found all of their KV in memory."""
        return self.whole / self.turns if self.turns else 0.0


@dataclass(frozen=True)
class Decision:
    """Seconds that one decision takes, with so many blocks in the tier."""

    policy: str
    blocks: int
    median: float
    mean: float


def measure(
    model: PreTrainedModel,
    sessions: int,
    room: int,
    history: int,
    new: int,
    decode: int,
    rounds: int,
    seed: int,
    folder: Path | None,
    progress: Progress,
) -> dict[str, Way]:
    """Lets sessions take turns, one after the other, in the same order in both ways.

    Args:
        sessions: how many there are.
        room: for how many of them there is memory.
        history: tokens of each before the first of the measured turns.
        new, decode: tokens that a turn adds and generates.
        rounds: measured turns of every session.
    """
    found = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found[way] = _measure(model, way, sessions, room, history, new, decode, rounds, seed, Path(place), progress)
    return found


def _measure(
    model: Any,
    way: str,
    sessions: int,
    room: int,
    history: int,
    new: int,
    decode: int,
    rounds: int,
    seed: int,
    place: Path,
    progress: Progress,
) -> Way:
    longest = history + (rounds + 1) * (new + decode)
    texts = [random_ids(model, history, (seed, number)) for number in range(sessions)]
    settings: dict[str, Any] = {"max_new_tokens": decode, "min_new_tokens": decode, "do_sample": False}
    with AttentionStore(place / "store", memory=1 << 40) as store:
        progress(f"{way}: {sessions} sessions of {history} tokens")
        for number, ids in enumerate(texts):
            cache = AttentionStoreCache(model, f"{number}", store)
            texts[number] = model.generate(ids, **as_generate_takes(model, cache), **settings)
            del cache
        store.flush()
        per_token = sum(store.residence(f"{n}")["memory"] for n in range(sessions)) / sum(t.shape[1] for t in texts)
    order = random.Random(seed).sample(range(sessions), sessions)
    result = Way()
    # a session's room is that of its longest turn, and of what the turn that runs adds
    with AttentionStore(place / "store", memory=int(room * per_token * longest * 1.05), on_device=0) as store:
        began = time.perf_counter()
        if way == "queue":
            attach(model, store)
            with TurnQueue(model, store, max_waiting=sessions * rounds, gate=False) as queue:
                waiting: deque[tuple[int, Turn]] = deque()
                for turn in range(rounds):
                    for number in order:
                        if turn:
                            before, job = waiting.popleft()
                            texts[before] = job.result()
                            _count(result, job.stats)
                            progress(f"{way}: turn {result.turns} of {sessions * rounds}")
                        ids = torch.cat([texts[number], random_ids(model, new, (seed, turn, number))], dim=1)
                        waiting.append((number, queue.submit(f"{number}", ids, **settings)))
                for _, job in waiting:
                    job.result()
                    _count(result, job.stats)
        else:
            for turn in range(rounds):
                for number in order:
                    ids = torch.cat([texts[number], random_ids(model, new, (seed, turn, number))], dim=1)
                    cache = AttentionStoreCache(model, f"{number}", store, gate=False)
                    texts[number] = model.generate(ids, **as_generate_takes(model, cache), **settings)
                    _count(result, cache.stats)
                    progress(f"{way}: turn {result.turns} of {sessions * rounds}")
        result.seconds = time.perf_counter() - began
    return result


def _count(result: Way, stats: object) -> None:
    blocks: dict[str, int] = dict(getattr(stats, "blocks_from", {}))
    result.turns += 1
    result.recomputed += not getattr(stats, "reused_tokens", 0)
    near = blocks.get("memory", 0) + blocks.get("device", 0)
    total = sum(blocks.values())
    result.blocks += total
    result.blocks_in_memory += near
    result.whole += bool(total) and near == total
    result.exposed.append(float(getattr(stats, "exposed_load_seconds", 0.0)))


def decisions(blocks: int, samples: int, progress: Progress, names: Sequence[str] = ()) -> list[Decision]:
    """Times decisions of every policy in a full tier: one block goes for one that comes, and a turn is noticed."""
    found = []
    for name in names or sorted(POLICIES):
        progress(f"decisions: {name}, {blocks:,} blocks")
        found.append(_decisions(name, blocks, samples))
    return found


def _decisions(name: str, blocks: int, samples: int, length: int = 10) -> Decision:
    policy = make_policy(name)
    book = TierBook(blocks, policy)
    now, session = 0.0, 0
    took: list[float] = []
    while len(took) < samples:
        now, session = now + 0.1, session + 1
        chain = [session * length + place for place in range(length)]
        group = policy.group(Use(now, chain, 256 * length))
        full = book.used >= blocks
        for place, key in enumerate(chain):
            stands = policy.place(None, group, now)
            began = time.perf_counter()
            book.reserve(1, now)
            book.add(key, chain[place - 1] if place else None, place, 1, stands)
            if full:
                took.append(time.perf_counter() - began)
        book.order.used(chain, group, now)
    return Decision(name, blocks, statistics.median(took), statistics.fmean(took))
