"""A server on a virtual clock: turns come, wait, are prefilled one by one, and decode in a batch."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ...store.eviction.policies import Policy
from .chains import Chain, Prompt
from .machine import CODECS, Links, Model, Prices
from .replay import BLOCK
from .timed import Loaded, TimedTiers
from .workload import Workload


@dataclass(frozen=True)
class Server:
    """What serves a workload.

    Attributes:
        memory, disk, device: bytes for KV; a memory of 0 recomputes everything.
        policy: who goes first; by name.
        ahead: whether the store is told what waits.
        depth: how many times as far as the paper it looks ahead.
        batch: turns that decode at the same time.
        window: tokens that the model sees at once; None: no limit.
        moved: whether KV stays of use when the window overflows.
        saving: "behind" decoding, or "before" the next turn can begin.
        codec: how memory and disk keep KV, by name in `CODECS`.
    """

    model: Model
    memory: int
    disk: int = 0
    device: int = 0
    policy: str = "predictive"
    ahead: bool = True
    depth: float = 1.0
    batch: int = 24
    window: int | None = None
    moved: bool = True
    block_tokens: int = BLOCK
    links: Links = field(default_factory=Links)
    saving_behind: bool = True
    codec: str = "raw"


@dataclass
class Outcome:
    """What came of a run; turns of the warm-up are not in it.

    Attributes:
        tokens: of prompts; `history` of them were there before, `fast`, `slow` and `kept` were found in memory, on disk
            and on the device.
        turns: those counted; `resumed` with a history, of which all of it was found for `whole`, some for `some`.
        ttft: seconds from a turn's start to its first token, turn by turn.
        waits: seconds in the queue before that.
        prefill, exposed, decode: seconds that the device was busy with; `exposed` of `prefill` waited for loads.
        elapsed: seconds on the clock.
    """

    turns: int = 0
    resumed: int = 0
    whole: int = 0
    some: int = 0
    fast_turns: int = 0
    tokens: int = 0
    history: int = 0
    fast: int = 0
    slow: int = 0
    kept: int = 0
    ttft: array[float] = field(default_factory=lambda: array("d"))
    waits: array[float] = field(default_factory=lambda: array("d"))
    prefill: float = 0.0
    exposed: float = 0.0
    decode: float = 0.0
    elapsed: float = 0.0
    truncations: int = 0
    not_saved: int = 0
    fetched_bytes: int = 0
    written_bytes: int = 0
    deepest_queue: int = 0
    total_turns: int = 0

    @property
    def found(self) -> int:
        return self.fast + self.slow + self.kept

    @property
    def token_rate(self) -> float:
        """Of the tokens of prompts that were there before, the share that was found."""
        return self.found / self.history if self.history else 0.0

    @property
    def session_rate(self) -> float:
        """Of the turns with a history, the share that found all of it."""
        return self.whole / self.resumed if self.resumed else 0.0

    @property
    def memory_share(self) -> float:
        """Of the tokens found, the share that was in memory (or on the device) when the turn began."""
        return (self.fast + self.kept) / self.found if self.found else 0.0

    @property
    def gpu_seconds(self) -> float:
        return self.prefill + self.decode

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts a second of prefilling."""
        return self.tokens / self.prefill if self.prefill else 0.0

    def cost(self, server: Server, prices: Prices) -> float:
        """Dollars for the time that the device was busy."""
        return prices.cost(self.gpu_seconds, server.model.count, server.memory, server.disk)

    def summary(self) -> dict[str, float]:
        """The figures of a run, JSON-able. Seconds, shares and counts."""
        ttft = np.array(self.ttft) if len(self.ttft) else np.zeros(1)
        waits = np.array(self.waits) if len(self.waits) else np.zeros(1)
        return {
            "turns": self.turns,
            "resumed": self.resumed,
            "token_hit_rate": self.token_rate,
            "session_hit_rate": self.session_rate,
            "memory_share": self.memory_share,
            "memory_turns": self.fast_turns / max(1, self.some),
            "device_tokens": self.kept,
            "memory_tokens": self.fast,
            "disk_tokens": self.slow,
            "prompt_tokens": self.tokens,
            "history_tokens": self.history,
            "ttft_mean": float(ttft.mean()),
            "ttft_p50": float(np.quantile(ttft, 0.5)),
            "ttft_p99": float(np.quantile(ttft, 0.99)),
            "wait_mean": float(waits.mean()),
            "wait_p99": float(np.quantile(waits, 0.99)),
            "prefill_tokens_per_second": self.prefill_rate,
            "prefill_seconds": self.prefill,
            "exposed_seconds": self.exposed,
            "decode_seconds": self.decode,
            "gpu_seconds": self.gpu_seconds,
            "elapsed_seconds": self.elapsed,
            "truncations": self.truncations,
            "not_saved_blocks": self.not_saved,
            "fetched_bytes": self.fetched_bytes,
            "written_bytes": self.written_bytes,
            "deepest_queue": self.deepest_queue,
        }


@dataclass(slots=True)
class _Job:
    session: int
    place: int
    came: float
    tokens: int = 0
    prompt: Prompt | None = None
    loaded: Loaded | None = None


def simulate(
    workload: Workload,
    server: Server,
    *,
    warm_up: int = 0,
    policy: Policy | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Serves all turns of a workload.

    Prefilling stops the others' decoding, as in servers that decide step by step. A turn's first token comes with the
    end of its prefill.

    Args:
        warm_up: turns, by their start, that are not counted.
        policy: instead of a new one of the server's kind.
        progress: called now and then with the number of turns done.
    """
    return _Run(workload, server, warm_up, policy, progress).run()


class _Run:
    def __init__(
        self,
        workload: Workload,
        server: Server,
        warm_up: int,
        policy: Policy | None,
        progress: Callable[[int], None],
    ) -> None:
        self.workload, self.server, self.warm_up, self.progress = workload, server, warm_up, progress
        block = workload.block_tokens or server.block_tokens
        names = itertools.count()
        self.chains = [
            Chain(block, names, server.window, moved=server.moved, answers=workload.keeps_answers)
            for _ in workload.conversations
        ]
        self.store = None
        if server.memory or server.disk:
            self.store = TimedTiers(
                server.memory, server.disk, policy or server.policy, kv_bytes=server.model.kv_bytes,
                stored_bytes=server.model.kv_bytes * CODECS[server.codec], block_tokens=block, links=server.links,
                ahead=server.ahead, depth=server.depth, device=server.device,
            )  # fmt: skip
        self.out = Outcome()
        self.now = 0.0
        self.steps = 0.0
        """Steps that the batch has decoded since the beginning."""
        self.context = 0
        """Tokens in the batch."""
        self.running: list[tuple[float, int, _Job]] = []
        self.queue: deque[_Job] = deque()
        self.arrivals = [(c.start, number, 0) for number, c in enumerate(workload.conversations) if c.turns]
        heapq.heapify(self.arrivals)
        self.done = 0
        self.counting = False
        self.counted_from = 0.0

    def run(self) -> Outcome:
        while True:
            self._take_arrivals()
            if self.store is not None:
                self.store.advance(self.now)
                self.store.look_ahead(self.now)
            if self.queue and len(self.running) < self.server.batch:
                self._start(self.queue.popleft())
            elif self.running:
                self._decode()
            elif self.arrivals:
                self.now = max(self.now, self.arrivals[0][0])
            else:
                break
        out = self.out
        out.elapsed = self.now - self.counted_from
        out.truncations = sum(chain.truncations for chain in self.chains)
        out.total_turns = self.done
        if self.store is not None:
            out.not_saved = self.store.not_saved
            out.fetched_bytes, out.written_bytes = self.store.fetched_bytes, self.store.written_bytes
        self.progress(self.done)
        return out

    def _take_arrivals(self) -> None:
        arrivals = self.arrivals
        while arrivals and arrivals[0][0] <= self.now:
            came, session, place = heapq.heappop(arrivals)
            self.queue.append(_Job(session, place, came))
            if self.store is not None:  # it came while the batch decoded: what it needs is fetched from then on
                self.store.advance(came)
                self.store.queued(session, self.chains[session])
                self.store.look_ahead(came)
        self.out.deepest_queue = max(self.out.deepest_queue, len(self.queue))

    def _start(self, job: _Job) -> None:
        out, model, chain = self.out, self.server.model, self.chains[job.session]
        turn = self.workload.conversations[job.session].turns[job.place]
        if not self.counting and self.done >= self.warm_up:
            self.counting, self.counted_from = True, self.now
        prompt = chain.prompt(turn)
        loaded = Loaded(0, 0, 0, 0.0)
        if self.store is not None:
            loaded = self.store.begin(job.session, prompt, chain, self.now)
        reused = min(loaded.tokens, prompt.tokens - 1)
        compute = model.prefill_seconds(prompt.tokens - reused, reused)
        links = self.server.links
        exposed = max(0.0, loaded.seconds * (1 - links.buffer) - compute) if links.overlap else loaded.seconds
        wait = self.now - job.came
        seconds = compute + exposed
        if not self.server.saving_behind:
            seconds += (prompt.tokens - reused) * model.kv_bytes / links.device
        self.now += seconds
        job.prompt, job.loaded, job.tokens = prompt, loaded, prompt.tokens + turn.output
        self.context += job.tokens
        heapq.heappush(self.running, (self.steps + max(1, turn.output), self.done, job))
        self.done += 1
        if self.done % 1000 == 0:
            self.progress(self.done)
        if self.counting:
            out.turns += 1
            out.tokens += prompt.tokens
            out.ttft.append(seconds)
            out.waits.append(wait)
            out.prefill += seconds
            out.exposed += exposed
            if prompt.history:
                out.history += prompt.history
                out.resumed += 1
                out.whole += reused >= min(prompt.history, prompt.tokens - 1)
                out.some += reused > 0
                out.fast_turns += reused > 0 and not loaded.slow
            kept = min(loaded.kept, reused)
            slow = min(loaded.slow, reused - kept)
            out.kept += kept
            out.slow += slow
            out.fast += reused - slow - kept

    def _decode(self) -> None:
        """Decodes until a turn is over, or one comes that can begin."""
        step = self.server.model.step_seconds(self.context)
        until = self.now + max(0.0, self.running[0][0] - self.steps) * step
        if len(self.running) < self.server.batch and self.arrivals and self.arrivals[0][0] < until:
            until = max(self.now, self.arrivals[0][0])
            over = None
        else:
            over = heapq.heappop(self.running)
        seconds = until - self.now
        if over is not None:
            self.steps = over[0]
        else:
            self.steps += seconds / step
        if self.counting:
            self.out.decode += seconds
        self.now = until
        if over is not None:
            self._take_arrivals()
            self._finish(over[2])

    def _finish(self, job: _Job) -> None:
        chain = self.chains[job.session]
        turns = self.workload.conversations[job.session].turns
        chain.answer(turns[job.place])
        self.context -= job.tokens
        if self.store is not None:
            assert job.prompt is not None
            assert job.loaded is not None
            self.store.advance(self.now)
            self.store.end(job.session, job.prompt, chain, job.loaded, self.now)
        following = job.place + 1
        if following < len(turns):
            turn = turns[following]
            heapq.heappush(self.arrivals, (max(self.now + turn.think, turn.at), job.session, following))
