"""Which runs a report is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...store.eviction.policies import DEFAULT
from .machine import CODECS
from .paper import BLOCK, DISKS, SESSIONS, SETTINGS
from .runs import NO_STORE, OPTIMUM, PLAIN_FIFO, PaperRun, Run, ServedTrace, TraceRun

DEFAULT_POLICY = DEFAULT
CAPACITIES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.30, 0.50)
CURVES = (PLAIN_FIFO, "fifo", "lru", "hyperbolic", DEFAULT_POLICY, OPTIMUM)
DEPTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""In turns that fit into the store: 1 is the paper's window."""
PAPER_DEPTHS = (0.25, 1.0, 4.0)
PREFILLING = (0.58, 0.2, 0.1, 0.05)
"""Shares of the accelerators' arithmetic."""
LOOK_AHEAD_AT = (0.05, 0.10)
WRONG = (0.0, 0.05, 0.1, 0.2, 0.4)
THINKING = (0.1, 0.3, 1.0, 3.0)
GAPS = (0.0, 30.0, 300.0, 1800.0)
PAPER_POLICY = "lru"
"""What orders blocks that no waiting turn needs, as in the paper: its scheduler-aware eviction."""
PAPER_POLICIES = (
    (PAPER_POLICY, True),
    (DEFAULT_POLICY, True),
    ("lru", False),
    ("fifo", False),
    (DEFAULT_POLICY, False),
)
"""Name of a policy, and whether the queue is known to the store."""
CODED_POLICIES = ("lru", DEFAULT_POLICY)
TIMED_POLICIES = ((NO_STORE, True), PAPER_POLICIES[0], PAPER_POLICIES[2])
"""Of which times are told: recomputing everything, and the paper's policy with and without the queue."""


@dataclass(frozen=True)
class Trace:
    """A trace, and the tokens of a block that it is cut into."""

    path: str
    title: str
    block_tokens: int


@dataclass
class Plan:
    """The runs of a report, part by part.

    Attributes:
        sessions: of the paper's workload.
        block_tokens: of the paper's workload.
    """

    mooncake: Trace | None = None
    agent: Trace | None = None
    sessions: int = SESSIONS
    block_tokens: int = BLOCK
    capacities: Sequence[float] = CAPACITIES
    left_out: list[str] = field(default_factory=list)

    @property
    def traces(self) -> list[Trace]:
        return [trace for trace in (self.mooncake, self.agent) if trace is not None]

    # the paper's workload

    def paper(self, setting: int, policy: str, ahead: bool = True) -> PaperRun:
        """One setting of the paper, as it is."""
        return PaperRun(setting, policy, ahead, sessions=self.sessions, block_tokens=self.block_tokens)

    def paper_table(self) -> Iterator[PaperRun]:
        """The table of models."""
        for setting in range(len(SETTINGS)):
            yield self.paper(setting, NO_STORE)
            for policy, ahead in PAPER_POLICIES:
                yield self.paper(setting, policy, ahead)

    def gaps(self) -> Iterator[PaperRun]:
        """What the paper leaves open: how long people take between turns."""
        for gap in GAPS:
            for policy, ahead in PAPER_POLICIES[:3]:
                yield replace(self.paper(0, policy, ahead), gap=gap)

    def decoding(self) -> Iterator[PaperRun]:
        """Faster and slower decoding: with it goes the depth of the queue."""
        for factor in (0.1, 0.3, 1.0):
            for policy, ahead in TIMED_POLICIES:
                yield replace(self.paper(0, policy, ahead), decode=factor)

    def prefilling(self) -> Iterator[PaperRun]:
        """Slower prefilling: with it go the gain, and what loading has to hide behind."""
        for flops in PREFILLING:
            for policy, ahead in TIMED_POLICIES:
                yield replace(self.paper(0, policy, ahead), flops=flops)

    def disks(self) -> Iterator[PaperRun]:
        """Disks of the sizes of the paper."""
        for disk in DISKS:
            for policy, ahead in PAPER_POLICIES[:3]:
                yield replace(self.paper(0, policy, ahead), disk=disk)

    def coded_paper(self) -> Iterator[PaperRun]:
        """The paper's models by every codec; on smaller disks those whose sessions do not all fit."""
        for setting in range(len(SETTINGS)):
            for disk in DISKS if setting < 2 else DISKS[-1:]:
                for policy, ahead in (PAPER_POLICIES[0], PAPER_POLICIES[2]):
                    for codec in CODECS:
                        yield replace(self.paper(setting, policy, ahead), disk=disk, codec=codec)

    def depths(self) -> Iterator[PaperRun]:
        """Windows deeper and less deep than the paper's."""
        for depth in PAPER_DEPTHS:
            yield replace(self.paper(1, PAPER_POLICY), depth=depth)

    def mechanisms(self) -> dict[str, PaperRun]:
        """One thing left out at a time."""
        whole = self.paper(0, PAPER_POLICY)
        return {
            "everything": whole,
            "no read buffer": replace(whole, buffer=0),
            "no overlap of loading": replace(whole, overlap=False),
            "saving before the next turn": replace(whole, saving_behind=False),
            "positions in keys: overflow invalidates": replace(whole, moved=False),
            "no look-ahead": replace(whole, ahead=False),
        }

    # traces

    def curves(self, trace: Trace) -> Iterator[TraceRun]:
        """Every policy at every capacity."""
        yield self.trace(trace, "lru", 2.0)
        for policy in CURVES:
            for capacity in self.capacities:
                yield self.trace(trace, policy, capacity)

    def trace(self, trace: Trace, policy: str, capacity: float) -> TraceRun:
        return TraceRun(trace.path, policy, capacity, block_tokens=trace.block_tokens)

    def coded(self, trace: Trace) -> Iterator[TraceRun]:
        """The same bytes by every codec, with two policies."""
        for policy in CODED_POLICIES:
            for codec in CODECS:
                for capacity in self.capacities:
                    yield replace(self.trace(trace, policy, capacity), codec=codec)

    def trace_depths(self, trace: Trace) -> Iterator[TraceRun]:
        """Look-ahead in the true order."""
        for capacity in LOOK_AHEAD_AT:
            for policy in ("lru", DEFAULT_POLICY):
                for depth in (0.0, *DEPTHS):
                    yield replace(self.trace(trace, policy, capacity), depth=depth)

    def wrong(self, trace: Trace) -> Iterator[TraceRun]:
        """Look-ahead of which a part is wrong."""
        for capacity in LOOK_AHEAD_AT:
            for wrong in WRONG:
                yield replace(self.trace(trace, DEFAULT_POLICY, capacity), depth=1.0, wrong=wrong)

    def thinking(self, trace: Trace) -> Iterator[TraceRun]:
        """People who think more or less long."""
        for factor in THINKING:
            for policy in ("lru", DEFAULT_POLICY):
                yield replace(self.trace(trace, policy, 0.05), thinking=factor)

    def served(self, trace: Trace) -> Iterator[ServedTrace]:
        """A trace on the paper's machine for the 70B model, in its own time."""
        run = ServedTrace(trace.path, 2, NO_STORE, block_tokens=trace.block_tokens)
        yield run
        for policy, ahead in ((DEFAULT_POLICY, True), (DEFAULT_POLICY, False), ("lru", False)):
            yield replace(run, policy=policy, ahead=ahead)

    def coded_served(self, trace: Trace) -> Iterator[ServedTrace]:
        """The same by every codec, with the default policy."""
        for ahead in (True, False):
            for codec in CODECS:
                yield ServedTrace(trace.path, 2, DEFAULT_POLICY, ahead, block_tokens=trace.block_tokens, codec=codec)

    def runs(self) -> list[Run]:
        """All of them, without repetitions, the longest kind first."""
        found: list[Run] = [
            *self.paper_table(),
            *self.gaps(),
            *self.prefilling(),
            *self.decoding(),
            *self.disks(),
            *self.depths(),
            *self.coded_paper(),
        ]
        found += self.mechanisms().values()
        for trace in self.traces:
            found += [*self.curves(trace), *self.trace_depths(trace), *self.wrong(trace), *self.served(trace)]
            found += [*self.coded(trace), *self.coded_served(trace)]
        if self.agent is not None:
            found += self.thinking(self.agent)
        return list(dict.fromkeys(found))
