"""What the server and its store did, for Prometheus."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from ..store.index.counts import MISSED

if TYPE_CHECKING:
    from ..serving import TurnQueue
    from .answer import Answer
    from .batching import Batches

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

_TOTALS = {
    "turns": "Turns of all kinds",
    "turns_with_reuse": "Turns that reused KV",
    "prompt_tokens": "Tokens of prompts",
    "reused_tokens": "Tokens of prompts whose KV was there already",
    "loaded_bytes": "Bytes of KV put in place from the store",
    "written_bytes": "Bytes written to disk",
    "evicted_blocks": "Blocks evicted from disk",
    "fetched_blocks": "Blocks fetched from disk to memory ahead of a turn",
    "shared_blocks": "Blocks sent to the shared tier",
    "shared_bytes": "Bytes sent to the shared tier",
    "shared_read_bytes": "Bytes read from the shared tier",
    "load_seconds": "Time spent on loading",
    "exposed_load_seconds": "Time that computing waited for loads",
    "write_seconds": "Time spent on writing",
}
_FAILURES = (
    "rejected", "read_errors", "write_errors", "not_saved_blocks", "not_admitted_blocks", "shared_errors",
    "shared_dropped_blocks", "shared_refused_blocks",
)  # fmt: skip


def store_metrics(stats: Mapping[str, int | float]) -> Iterator[Metric]:
    """Metric families of what `AttentionStore.stats` or `totals` say."""
    used = GaugeMetricFamily("attnstore_tier_bytes", "Bytes held", labels=["tier"])
    capacity = GaugeMetricFamily("attnstore_tier_capacity_bytes", "Bytes that may be held", labels=["tier"])
    for name, value in stats.items():
        if name.endswith("_capacity"):
            tier = name.removesuffix("_capacity")
            capacity.add_metric([tier], value)
            used.add_metric([tier], stats.get(f"{tier}_bytes", stats.get(f"{tier}_used", 0)))
    yield from (used, capacity)
    for name, said in _TOTALS.items():
        yield CounterMetricFamily(f"attnstore_store_{name}", said, stats[name])
    evicted = CounterMetricFamily("attnstore_tier_evictions", "Evicted from a tier in memory", labels=["tier"])
    for tier in ("device", "memory"):
        if f"evicted_from_{tier}" in stats:
            evicted.add_metric([tier], stats[f"evicted_from_{tier}"])
    yield evicted
    failures = CounterMetricFamily("attnstore_failures", "Blocks and files that failed", labels=["kind"])
    for kind in _FAILURES:
        failures.add_metric([kind], stats[kind])
    yield failures
    missed = CounterMetricFamily("attnstore_missed_turns", "Turns that reused nothing", labels=["why"])
    for name, count in stats.items():
        if name.startswith(MISSED):
            missed.add_metric([name.removeprefix(MISSED)], count)
    yield missed
    for name in ("sessions", "disk_blocks"):
        if name in stats:
            yield GaugeMetricFamily(f"attnstore_{name}", f"Number of {name.replace('_', ' ')}", stats[name])


class _Collected(Collector):
    """Metrics that are asked for when somebody looks."""

    def __init__(self, look: Callable[[], Iterator[Metric]]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        return self._look()


def store_text(stats: Mapping[str, int | float]) -> str:
    """What `store_metrics` has, as text."""
    registry = CollectorRegistry()
    registry.register(_Collected(lambda: store_metrics(stats)))
    return generate_latest(registry).decode()


class _Together:
    """What is looked up in one process, as metrics that several processes put together in a folder: counters are added
    up, and what is as it is has the process's number as a label."""

    def __init__(self, looks: list[Callable[[], Iterator[Metric]]]) -> None:
        self._looks = looks
        self._own = CollectorRegistry()
        self._metrics: dict[str, Any] = {}
        self._counted: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self._lock = threading.Lock()

    def update(self) -> None:
        """What the other processes are to know of this one."""
        with self._lock:
            for family in (family for look in self._looks for family in look()):
                for sample in family.samples:
                    metric = self._metric(family, tuple(sample.labels))
                    one = metric.labels(**sample.labels) if sample.labels else metric
                    if family.type == "gauge":
                        one.set(sample.value)
                    else:
                        key = (sample.name, *sample.labels.values())
                        one.inc(max(sample.value - self._counted[key], 0.0))
                        self._counted[key] = sample.value

    def _metric(self, family: Metric, labels: tuple[str, ...]) -> Any:
        if family.name not in self._metrics:
            more: dict[str, Any] = {"labelnames": labels, "registry": self._own}
            self._metrics[family.name] = (
                Gauge(family.name, family.documentation, multiprocess_mode="liveall", **more)
                if family.type == "gauge"
                else Counter(family.name, family.documentation, **more)
            )
        return self._metrics[family.name]


class Metrics:
    """Those of a server; a registry of its own, so that several in one process do not meet. Where the environment has
    `PROMETHEUS_MULTIPROC_DIR`, all processes that use that folder are counted together.

    Args:
        stats: asked for what the store says.
    """

    def __init__(self, queue: TurnQueue | Batches, stats: Callable[[], Mapping[str, int | float]]) -> None:
        self._registry = registry = CollectorRegistry()
        self._queue = queue
        self._ttft = Histogram(
            "attnstore_ttft_seconds", "Request to first token", buckets=_TTFT_BUCKETS, registry=registry
        )
        self._tokens = Counter("attnstore_tokens", "Tokens of requests", ["what"], registry=registry)
        self._tiers = Counter("attnstore_reusing_turns", "Requests by where KV came from", ["tier"], registry=registry)
        self._blocks = Counter("attnstore_loaded_blocks", "Blocks loaded for requests", ["tier"], registry=registry)
        looks = [lambda: store_metrics(stats()), self._queue_metrics]
        self._together = _Together(looks) if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None
        if self._together is None:
            for look in looks:
                registry.register(_Collected(look))

    def count(self, answer: Answer) -> None:
        """An answer is over."""
        stats = answer.stats
        if answer.ttft_seconds is not None:
            self._ttft.observe(answer.ttft_seconds)
        self._tokens.labels("reused").inc(stats.reused_tokens)
        self._tokens.labels("prefilled").inc(stats.prefilled_tokens)
        self._tokens.labels("generated").inc(answer.turn.generated_tokens if answer.turn is not None else 0)
        self._tiers.labels(answer.tier).inc()
        for tier, blocks in stats.blocks_from.items():
            self._blocks.labels(tier).inc(blocks)
        if self._together is not None:
            self._together.update()

    def _queue_metrics(self) -> Iterator[Metric]:
        stats = self._queue.stats()
        yield GaugeMetricFamily("attnstore_queue_waiting", "Requests that wait", stats.waiting)
        yield GaugeMetricFamily("attnstore_queue_running", "Requests that are answered", stats.running)
        ended = CounterMetricFamily("attnstore_requests", "Requests by how they ended", labels=["outcome"])
        for outcome in ("done", "failed", "cancelled", "timed_out", "refused"):
            ended.add_metric([outcome], getattr(stats, outcome))
        yield ended
        yield CounterMetricFamily("attnstore_queue_waiting_seconds", "Time that requests waited", stats.waiting_seconds)

    def text(self) -> str:
        """All of them, in Prometheus' format."""
        registry = self._registry
        if self._together is not None:
            self._together.update()
            MultiProcessCollector(registry := CollectorRegistry())
        return generate_latest(registry).decode()

    def close(self) -> None:
        """This process ends: what it has counted stays, what it has is over."""
        if self._together is not None:
            self._together.update()
            mark_process_dead(os.getpid())
