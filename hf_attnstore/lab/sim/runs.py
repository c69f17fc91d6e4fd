"""Single runs of a study, as plain records in and plain figures out, so that they can be shared out to processes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .engine import Server, simulate
from .machine import CODECS, Links, Prices
from .optimum import optimum
from .paper import BATCH, BLOCK, DISK, MEMORY, SESSIONS, SETTINGS, WARM_UP, paper_workload
from .plain import plain_fifo
from .replay import Requests, replay, requests_of
from .traces import load_trace
from .workload import Workload

NO_STORE = "recompute"
OPTIMUM = "optimum"
PLAIN_FIFO = "fifo (any block)"


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Nothing here is cyclic, and looking for cycles among millions of records takes a good part of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class PaperRun:
    """The paper's workload on one of its settings.

    Attributes:
        setting: number in `SETTINGS`.
        policy: by name, or `NO_STORE`.
        sessions, gap, seed: of the workload.
        decode: how many times as long decoding takes as the arithmetic says.
        flops: the share of the accelerators' arithmetic that prefill reaches.
        buffer: share of the layers that may be loaded ahead of a job; None: the paper's 15 layers.
        codec: how memory and disk keep KV.
    """

    setting: int
    policy: str
    ahead: bool = True
    sessions: int = SESSIONS
    gap: float = 30.0
    seed: int = 0
    memory: int = MEMORY
    disk: int = DISK
    depth: float = 1.0
    decode: float = 1.0
    flops: float = 0.58
    moved: bool = True
    overlap: bool = True
    buffer: int | None = None
    saving_behind: bool = True
    block_tokens: int = BLOCK
    codec: str = "raw"

    @_without_collecting()
    def run(self, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Returns `Outcome.summary`, what it cost, and how long simulating took."""
        setting = SETTINGS[self.setting]
        workload = _paper(self.sessions, self.gap, self.seed)
        stores = self.policy != NO_STORE
        layers = 15 if self.buffer is None else self.buffer
        server = Server(
            replace(setting.model, decode_factor=self.decode, used_flops=self.flops),
            self.memory if stores else 0,
            self.disk if stores else 0,
            policy=self.policy if stores else "lru",
            ahead=self.ahead,
            depth=self.depth,
            batch=BATCH,
            window=setting.window,
            moved=self.moved,
            block_tokens=self.block_tokens,
            links=Links(buffer=min(1.0, layers / setting.model.layers), overlap=self.overlap),
            saving_behind=self.saving_behind,
            codec=self.codec,
        )
        return _timed(workload, server, min(WARM_UP, workload.turns // 5), progress)


@dataclass(frozen=True)
class TraceRun:
    """A trace against a store of a share of its different blocks, without time.

    Attributes:
        capacity: share of the trace's blocks, as they are computed; more than 1 is no limit.
        depth: look-ahead, in turns that fit into the store; 0: none.
        wrong: share of what is foreseen that is wrong.
        thinking: how many times as long people think.
        codec: how blocks are kept: of smaller ones more fit.
    """

    path: str
    policy: str
    capacity: float
    depth: float = 0.0
    wrong: float = 0.0
    thinking: float = 1.0
    block_tokens: int = 256
    kind: str = "auto"
    codec: str = "raw"

    @_without_collecting()
    def run(self, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Returns hit rates, and how far was looked ahead."""
        requests = _requests(self.path, self.kind, self.thinking, self.block_tokens)
        blocks = max(1, int(self.capacity / CODECS[self.codec] * requests.unique))
        window = max(1, int(self.depth * blocks / requests.per_session)) if self.depth else 0
        began = time.process_time()
        if self.policy == OPTIMUM:
            hits = optimum(requests, blocks)
        elif self.policy == PLAIN_FIFO:
            hits = plain_fifo(requests, blocks)
        else:
            hits = replay(requests, blocks, self.policy, window=window, wrong=self.wrong, progress=progress)
        return {
            "token_hit_rate": hits.rate,
            "session_hit_rate": hits.whole / max(1, hits.resumed),
            "turns": hits.turns,
            "tokens": hits.tokens,
            "blocks": blocks,
            "window": window,
            "cpu_seconds": time.process_time() - began,
        }


@dataclass(frozen=True)
class ServedTrace:
    """A trace on one of the paper's machines, with time.

    Attributes:
        rate: how many times as fast its requests come.
    """

    path: str
    setting: int
    policy: str
    ahead: bool = True
    memory: int = MEMORY
    disk: int = DISK
    rate: float = 1.0
    thinking: float = 1.0
    block_tokens: int = 256
    kind: str = "auto"
    codec: str = "raw"

    @_without_collecting()
    def run(self, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Returns what `PaperRun.run` does."""
        workload = _trace(self.path, self.kind).at_rate(self.rate).thinking(self.thinking)
        stores = self.policy != NO_STORE
        server = Server(
            SETTINGS[self.setting].model,
            self.memory if stores else 0,
            self.disk if stores else 0,
            policy=self.policy if stores else "lru",
            ahead=self.ahead,
            batch=BATCH,
            block_tokens=self.block_tokens,
            codec=self.codec,
        )
        return _timed(workload, server, workload.turns // 5, progress)


Run = PaperRun | TraceRun | ServedTrace


def record_of(run: Run) -> dict[str, Any]:
    """A run for a JSON file: the name of its class, and its fields."""
    return {"class": type(run).__name__, **asdict(run)}


def _timed(workload: Workload, server: Server, warm_up: int, progress: Callable[[int], None]) -> dict[str, Any]:
    began = time.process_time()
    outcome = simulate(workload, server, warm_up=warm_up, progress=progress)
    cost = outcome.cost(server, Prices())
    return {**outcome.summary(), "dollars": cost, "cpu_seconds": time.process_time() - began}


@lru_cache(maxsize=2)
def _paper(sessions: int, gap: float, seed: int) -> Workload:
    return paper_workload(sessions, gap=gap, seed=seed)


@lru_cache(maxsize=4)
def _trace(path: str, kind: str) -> Workload:
    return load_trace(Path(path), kind)  # type: ignore[arg-type]


@lru_cache(maxsize=2)
def _requests(path: str, kind: str, thinking: float, block_tokens: int) -> Requests:
    return requests_of(_trace(path, kind).thinking(thinking), block_tokens)


def _run(run: Run) -> dict[str, Any]:
    return run.run()


def run_all(
    runs: Sequence[Run], jobs: int = 1, done: Callable[[Run, dict[str, Any]], None] = lambda run, found: None
) -> dict[Run, dict[str, Any]]:
    """Does all runs, `jobs` at a time, each in one process.

    Args:
        done: called with every run and what it found, as they end.
    """
    found: dict[Run, dict[str, Any]] = {}
    distinct = list(dict.fromkeys(runs))
    if jobs <= 1:
        for run in distinct:
            found[run] = run.run()
            done(run, found[run])
        return found
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for run, result in zip(distinct, pool.map(_run, distinct), strict=True):
            found[run] = result
            done(run, result)
    return found
