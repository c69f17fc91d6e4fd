"""A real store driven through the turns of a workload, beside the simulation of the same.

Blocks are tiny and random, but all else is the store: files, index, accounts, policy, threads. Its clock is that of the
workload, so that an hour of conversations takes seconds and ages are what they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import AttentionStoreError
from ..store import AttentionStore, block_store, disk_store, upcoming
from ..store.blocks import Block, BlockMeta
from ..store.keys import Key, block_key, encode_tokens
from ..store.transfer import Piece, Stage
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
        wrong: blocks that came back with other bytes than they were saved with.
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
class _Turn:
    found: int
    fast: int
    held: frozenset[Hashable]


def compare(
    requests: Requests,
    folder: Path,
    memory: int,
    policy: str = "lru",
    progress: Callable[[int], None] = lambda done: None,
) -> Agreement:
    """Runs all turns on a store in `folder`, which must not exist yet, and in simulation.

    Args:
        memory: blocks that fit into the memory tier. The disk has room for all.

    Raises:
        AttentionStoreError: there is something in `folder`.
    """
    if folder.exists():
        raise AttentionStoreError(f"{folder} exists; a replay needs a store of its own")
    requests = _without_replaced(requests)
    result = Agreement(turns=len(requests.rows))
    simulated: list[_Turn] = []

    def watch(number: int, tiers: Tiers, hits: Hits) -> None:
        held = frozenset(tiers.memory.keys())
        simulated.append(_Turn(hits.by_turn[number], hits.fast_by_turn[number], held))
        result.evicted_simulated = tiers.memory.evictions

    replay(requests, memory, policy, disk=requests.unique + len(requests.rows), trace=True, after=watch)
    began = time.perf_counter()
    clock = _Clock()
    with (
        _on(clock),
        AttentionStore(folder, memory=memory * _BLOCK_BYTES, disk="64GiB", block_size=256, policy=policy) as store,
    ):
        store._memory._clock = clock.time
        live = _Live(store)
        for number, row in enumerate(requests.rows):
            clock.now = row.at
            turn, expected = live.turn(row), simulated[number]
            result.found += turn.found
            result.fast += turn.fast
            result.found_simulated += expected.found
            result.fast_simulated += expected.fast
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


class _Clock:
    """The module `time` with a time of its own for what it says the time is."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@contextmanager
def _on(clock: _Clock) -> Iterator[None]:
    """The store's modules go by `clock` for the length of a `with`."""
    modules: Sequence[ModuleType] = (block_store, disk_store, upcoming)
    try:
        for module in modules:
            module.time = clock  # type: ignore[attr-defined]
        yield
    finally:
        for module in modules:
            module.time = time  # type: ignore[attr-defined]


class _Live:
    """What a cache does of a turn, without a model."""

    def __init__(self, store: AttentionStore) -> None:
        self._store = store
        self._names: dict[Key, Hashable] = {}
        self._keys: dict[Hashable, Key] = {}
        self._numbers: dict[Hashable, int] = {}
        self._root = store.root(_FINGERPRINT)
        self.wrong = 0

    def turn(self, row: Request) -> _Turn:
        store = self._store
        keys = [self._keys[name] for name in row.prompt if name in self._keys]
        if any(name not in self._keys for name in row.prompt[: len(keys)]):
            keys = []
        found = store.known(keys)
        there = keys[:found]
        slow = [key for key in there if store._memory.get(key) is None]
        if there:
            self._load(there)
        if slow:
            store.promote(slow)
            store.flush()
        self._save(row)
        store.flush()
        blocks = [self._keys[name] for name in row.blocks]
        store.used(blocks, row.kept, short=row.short, went_on_from=there[-1] if there else None)
        store.flush()
        held = frozenset(name for key, name in self._names.items() if store._memory.get(key) is not None)
        return _Turn(found, found - len(slow), held)

    def _tensor(self, number: int) -> torch.Tensor:
        random = np.random.default_rng(number)
        return torch.from_numpy(random.standard_normal((1, _TOKENS, _DIM), dtype=np.float32))

    def _load(self, keys: list[Key]) -> None:
        target = torch.zeros(1, _TOKENS * len(keys), _DIM)
        load = self._store.load([Stage([Piece(key, 0, _TOKENS) for key in keys], {_NAME: target})])
        try:
            load.wait(0)
        finally:
            load.finish()
        for place, key in enumerate(keys):
            part = target[:, place * _TOKENS : (place + 1) * _TOKENS]
            self.wrong += not torch.equal(part, self._tensor(self._numbers[self._names[key]]))

    def _save(self, row: Request) -> None:
        store = self._store
        parent = self._keys[row.before] if row.before is not None else self._root
        saved = True
        for number, name in enumerate(row.blocks, row.start):
            ids = self._numbers.setdefault(name, len(self._numbers))
            tokens = encode_tokens([ids, number])
            key = self._keys.get(name) or block_key(parent, tokens)
            self._keys[name], self._names[key] = key, name
            if saved and not store.has(key):
                saved = store.reserve(_BLOCK_BYTES)
                if saved:
                    meta = BlockMeta(key, parent, _FINGERPRINT, number * _TOKENS, tokens)
                    store.put(Block(meta, {_NAME: self._tensor(ids)}))
            parent = key
