"""A real store driven through the turns of a workload, beside the simulation of the same.

Without a model blocks are tiny and random, but all else is the store: files, index, accounts, policy, threads. Its
clock is that of the workload, so that an hour of conversations takes seconds and ages are what they were.
`live_model.py` has turns that a model computes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ...errors import AttentionStoreError
from ...store import AttentionStore
from ...store.blocks.block import Block, BlockMeta
from ...store.blocks.keys import Key, block_key, chain_root, encode_tokens
from ...store.disk.surroundings import Clock, Surroundings
from ...store.transfer.stages import Piece, Stage
from .replay import Hits, Request, Requests, replay
from .tiers import Tiers

_TOKENS, _DIM = 2, 8
_NAME = "layers.0.keys"
_BLOCK_BYTES = _TOKENS * _DIM * 4
_FINGERPRINT = "0" * 40


@dataclass
class Agreement:
    """A live store beside the simulation, turn by turn.

    Attributes:
        turns: how many there were.
        found, found_simulated: blocks found, in all.
        fast, fast_simulated: those of them in memory.
        evicted, evicted_simulated: blocks that memory gave up.
        differing: numbers of turns after which memory did not hold the same blocks, or which did not find the same.
        wrong: blocks that came back with other bytes than they were saved with; with a model, tokens that it would not
            have said without a store.
        seconds: what the live store took.
    """

    turns: int = 0
    found: int = 0
    found_simulated: int = 0
    fast: int = 0
    fast_simulated: int = 0
    evicted: int = 0
    evicted_simulated: int = 0
    differing: list[int] = field(default_factory=list)
    wrong: int = 0
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        return not self.differing and not self.wrong and self.evicted == self.evicted_simulated


@dataclass(frozen=True)
class Turned:
    """Blocks that a turn found, and those of them that were in memory."""

    found: int
    fast: int


@dataclass(frozen=True)
class _Turn:
    turned: Turned
    held: frozenset[Hashable]


class Turns(Protocol):
    """How turns are run on a live store.

    Attributes:
        root: what first blocks follow.
        block_bytes: bytes of a block in memory.
        block_size: of the store.
    """

    @property
    def root(self) -> Key: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def block_size(self) -> int: ...

    def ids(self, count: int, sibling: int) -> list[int]:
        """Token ids of the block that is the `count`th to be named, and the `sibling`th to follow the same one."""
        ...

    def on(self, store: AttentionStore, names: Names) -> LiveTurns: ...


def compare(
    requests: Requests,
    folder: Path,
    memory: int,
    policy: str = "lru",
    progress: Callable[[int], None] = lambda done: None,
    turns: Turns | None = None,
) -> Agreement:
    """Runs all turns on a store in `folder`, which must not exist yet, and in simulation.

    Args:
        memory: blocks that fit into the memory tier. The disk has room for all.
        turns: who runs them on the live store; default: tiny random blocks, without a model.

    Raises:
        AttentionStoreError: there is something in `folder`.
    """
    if folder.exists():
        raise AttentionStoreError(f"{folder} exists; a replay needs a store of its own")
    turns = turns if turns is not None else TinyBlocks()
    names = Names(turns.root, turns.ids)
    requests = names.named(_without_replaced(requests))
    result = Agreement(turns=len(requests.rows))
    simulated: list[_Turn] = []

    def watch(number: int, tiers: Tiers, hits: Hits) -> None:
        held = frozenset(tiers.memory.keys())
        simulated.append(_Turn(Turned(hits.by_turn[number], hits.fast_by_turn[number]), held))
        result.evicted_simulated = tiers.memory.evictions

    replay(requests, memory, policy, disk=requests.unique + len(requests.rows), trace=True, after=watch)
    began = time.perf_counter()
    clock = _WorkloadClock()
    with AttentionStore(
        folder,
        memory=memory * turns.block_bytes,
        disk="64GiB",
        on_device=0,
        block_size=turns.block_size,
        policy=policy,
        surroundings=Surroundings(clock),
    ) as store:
        live = turns.on(store, names)
        for number, row in enumerate(requests.rows):
            clock.now = row.at
            turn, expected = live.turn(row), simulated[number]
            result.found += turn.turned.found
            result.fast += turn.turned.fast
            result.found_simulated += expected.turned.found
            result.fast_simulated += expected.turned.fast
            if turn != expected:
                result.differing.append(number)
            if number % 20 == 0:
                progress(number)
        result.evicted = store._memory.evicted
        result.wrong = live.wrong
    result.seconds = time.perf_counter() - began
    progress(len(requests.rows))
    return result


def _without_replaced(requests: Requests) -> Requests:
    """Short ends that longer blocks replace are left out: here all blocks are of one size."""
    if not any(row.superseded is not None for row in requests.rows):
        return requests
    rows = [
        replace(
            row,
            prompt=row.prompt[:-1] if row.prompt_short else row.prompt,
            blocks=row.blocks[:-1] if row.short else row.blocks,
            short=False,
            prompt_short=0,
            superseded=None,
        )
        for row in requests.rows
    ]
    return Requests(requests.name, requests.block_tokens, [row for row in rows if row.blocks])


@dataclass
class Names:
    """Keys of blocks, and what is in them, by the names that they have in a workload."""

    root: Key
    ids: Callable[[int, int], list[int]]
    keys: dict[Hashable, Key] = field(default_factory=dict)
    followers: Counter[Key] = field(default_factory=Counter)
    metas: dict[Key, BlockMeta] = field(default_factory=dict)
    numbers: dict[Key, int] = field(default_factory=dict)

    def named(self, requests: Requests) -> Requests:
        """The same requests with keys for names, so that ties between blocks end alike."""
        rows = []
        for row in requests.rows:
            before = self.keys[row.before] if row.before is not None else None
            parent = before if before is not None else self.root
            for number, name in enumerate(row.blocks, row.start):
                key = self.keys.get(name)
                if key is None:
                    tokens = encode_tokens(self.ids(len(self.keys), self.followers[parent]))
                    self.followers[parent] += 1
                    key = self.keys[name] = block_key(parent, tokens)
                    self.metas[key] = BlockMeta(key, parent, _FINGERPRINT, number * len(tokens), tokens)
                    self.numbers[key] = len(self.numbers)
                parent = key
            blocks, prompt = ([self.keys[name] for name in names] for names in (row.blocks, row.prompt))
            rows.append(replace(row, prompt=prompt, blocks=blocks, before=before))
        return Requests(requests.name, requests.block_tokens, rows)


class _WorkloadClock(Clock):
    """What the date is, is set."""

    now = 0.0

    def time(self) -> float:
        return self.now


class LiveTurns(ABC):
    """Turns on a live store.

    Attributes:
        wrong: how often something came back, or out, that was not what it should have been.
    """

    def __init__(self, store: AttentionStore, names: Names) -> None:
        self.store = store
        self.names = names
        self.wrong = 0

    def turn(self, row: Request) -> _Turn:
        """Runs a turn to its end, and waits until all that it left to be done is."""
        turned = self.run(row, _as_keys(row.prompt), _as_keys(row.blocks))
        held = frozenset(key for key in self.names.metas if self.store._memory.get(key) is not None)
        return _Turn(turned, held)

    @abstractmethod
    def run(self, row: Request, prompt: list[Key], blocks: list[Key]) -> Turned:
        """Runs a turn that looks for `prompt`, and after which there are `blocks`."""


class TinyBlocks:
    """Turns without a model: blocks of two tokens and one layer, whose bytes are random."""

    root = chain_root(_FINGERPRINT, "")
    block_bytes = _BLOCK_BYTES
    block_size = 256

    def ids(self, count: int, sibling: int) -> list[int]:
        return [count, sibling]

    def on(self, store: AttentionStore, names: Names) -> LiveTurns:
        return _Tiny(store, names)


class _Tiny(LiveTurns):
    """What a cache does of a turn."""

    def run(self, row: Request, prompt: list[Key], blocks: list[Key]) -> Turned:
        store = self.store
        found = store.known(prompt)
        there = prompt[:found]
        slow = [key for key in there if store._memory.get(key) is None]
        if there:
            self._load(there)
        self._save(blocks)
        store.flush()
        store.used(blocks, row.kept, short=row.short, went_on_from=there[-1] if there else None)
        store.promote(slow)
        store.flush()
        return Turned(found, found - len(slow))

    def _tensor(self, key: Key) -> torch.Tensor:
        random = np.random.default_rng(self.names.numbers[key])
        return torch.from_numpy(random.standard_normal((1, _TOKENS, _DIM), dtype=np.float32))

    def _load(self, keys: list[Key]) -> None:
        target = torch.zeros(1, _TOKENS * len(keys), _DIM)
        load = self.store.load([Stage([Piece(key, 0, _TOKENS) for key in keys], {_NAME: target})])
        try:
            load.wait(0)
        finally:
            load.finish()
        for place, key in enumerate(keys):
            self.wrong += not torch.equal(target[:, place * _TOKENS : (place + 1) * _TOKENS], self._tensor(key))

    def _save(self, blocks: list[Key]) -> None:
        for key in blocks:
            if self.store.has(key):
                continue
            if not self.store.reserve(_BLOCK_BYTES):
                break
            self.store.put(Block(self.names.metas[key], {_NAME: self._tensor(key)}))


def _as_keys(names: Sequence[Hashable]) -> list[Key]:
    return [name for name in names if isinstance(name, bytes)]
