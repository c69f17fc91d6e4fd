"""From raw samples to a report's figures, and the bars for them. Pure: numbers in, numbers out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BAR_HISTORY = 4096
"""Tokens of history that the bar against recompute is for; a shorter one has less to win."""


@dataclass(frozen=True)
class Spread:
    """A median with the middle half of the samples around it, in the samples' unit."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Ratio:
    """One figure against another of the same repeat.

    Attributes:
        paired: median of the ratios within each repeat; what the bars look at.
        medians: ratio of the two medians.
        low, high: middle half of the ratios within each repeat.
        smallest: ratio of the smallest of each; on a busy machine the one least disturbed.
    """

    paired: float
    medians: float
    low: float
    high: float
    smallest: float


@dataclass(frozen=True)
class Bar:
    """What a ratio must not exceed."""

    key: str
    text: str
    limit: float
    above: str
    below: str
    min_history: int = 0


BARS: tuple[Bar, ...] = (
    Bar("ttft_device", "TTFT with KV left in place, against a kept DynamicCache", 1.02, "ttft/device", "ttft/kept"),
    Bar("ttft_memory", "TTFT from memory, against a kept DynamicCache", 1.05, "ttft/memory", "ttft/kept"),
    Bar("ttft_disk", "TTFT from disk (warm), against a kept DynamicCache", 1.12, "ttft/disk", "ttft/kept"),
    Bar(
        "ttft_recompute",
        "TTFT from memory, against recompute",
        0.05,
        "ttft/memory",
        "ttft/recompute",
        BAR_HISTORY,
    ),
    Bar(
        "ttft_disk_recompute",
        "TTFT from disk (warm), against recompute",
        0.05,
        "ttft/disk",
        "ttft/recompute",
        BAR_HISTORY,
    ),
    Bar("decode", "decode per token, against a DynamicCache", 1.0, "decode/memory", "decode/kept"),
    Bar("saving", "a turn with saving, against the same without", 1.03, "total/saving", "total/not_saving"),
    Bar("first", "a first turn with the store, against plain generate", 1.02, "total/first", "total/recompute"),
    Bar(
        "rss_memory",
        "peak RSS of a resumed turn from memory, against a kept DynamicCache",
        1.3,
        "rss/memory",
        "rss/kept",
    ),
    Bar(
        "rss_disk",
        "peak RSS of a resumed turn from disk, against a kept DynamicCache",
        1.3,
        "rss/disk",
        "rss/kept",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured for it; `passed` is None where it does not apply or was not measured."""

    bar: Bar
    ratio: Ratio | None
    passed: bool | None
    why_not: str = ""


def spread(values: Sequence[float]) -> Spread:
    """Median and middle half of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Compare two series of the same repeats, pair by pair.

    Args:
        above, below: from the first repeat on; of a longer one the rest, which has no pair, is left out.

    Raises:
        ValueError: one is empty.
    """
    pairs_of = min(len(above), len(below))
    if not pairs_of:
        raise ValueError("There is nothing to compare.")
    above, below = above[:pairs_of], below[:pairs_of]
    pairs = spread([a / b for a, b in zip(above, below, strict=True)])
    medians = statistics.median(above) / statistics.median(below)
    return Ratio(pairs.median, medians, pairs.low, pairs.high, min(above) / min(below))


def evaluate(series: Mapping[str, Sequence[float]], history: int, bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Hold the series against the bars.

    Args:
        series: values by name, one per repeat, such as "ttft/memory" in seconds.
        history: tokens of history that they were measured at.
    """
    verdicts = []
    for bar in bars:
        above, below = series.get(bar.above), series.get(bar.below)
        if not above or not below:
            verdicts.append(Verdict(bar, None, None, "not measured"))
            continue
        found = ratio(above, below)
        if history < bar.min_history:
            verdicts.append(Verdict(bar, found, None, f"for a history of {bar.min_history} tokens or more"))
        else:
            verdicts.append(Verdict(bar, found, found.paired <= bar.limit))
    return verdicts
