"""The right column: numbers and plots of a conversation and of the store, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..sizes import format_bytes, format_seconds
from .plots import tiers_plot, timeline_plot, times_plot
from .records import TurnRecord, cost_of_recomputing
from .sessions import Conversation


def conversation_panel(conversation: Conversation | None) -> str:
    """How fast the turns of a conversation were, and where their KV came from."""
    records: Sequence[TurnRecord | None] = conversation.records if conversation is not None else []
    costs = [cost_of_recomputing(records, number) for number in range(len(records))]
    last = next((r for r in reversed(records) if r is not None and r.with_store), None)
    times = times_plot(
        [r.ttft_with if r is not None else None for r in records],
        [(cost[0], cost[1] != "estimated") if cost is not None else None for cost in costs],
    )
    legend = (
        '<p class="legend"><span class="with">with the store</span> <span class="without">without: measured</span> '
        '<span class="without estimated">estimated</span></p>'
    )
    events = conversation.timeline if conversation is not None else ()
    return (
        _section("Time to first token", legend + times)
        + _section("This conversation", _numbers(_of_turns(records, last)))
        + _section("The last turn", timeline_plot(events))
    )


def _of_turns(records: Sequence[TurnRecord | None], last: TurnRecord | None) -> list[tuple[str, str]]:
    known = [r for r in records if r is not None and r.with_store]
    prompt, reused = sum(r.prompt for r in known), sum(r.reused for r in known)
    bandwidth = "–"
    if last is not None and last.loaded_bytes and last.load_seconds:
        where = " and ".join(sorted(last.blocks_from))
        bandwidth = f"{format_bytes(last.loaded_bytes / last.load_seconds)}/s" + (f", {where}" if where else "")
    return [
        ("hit rate", f"{reused / prompt:.0%} of {prompt:,}" if prompt else "–"),
        ("load bandwidth", bandwidth),
        ("exposed load time", format_seconds(last.exposed_seconds) if last is not None and last.loaded_bytes else "–"),
    ]


def store_panel(stats: Mapping[str, int | float]) -> str:
    """Bytes by tier against their caps, and the hit rate of all turns. `stats` are `AttentionStore.stats()`."""
    tiers = [
        (tier, int(stats[f"{tier}_bytes"]), int(stats[f"{tier}_capacity"]))
        for tier in ("device", "memory", "disk")
        if stats.get(f"{tier}_capacity")
    ]
    prompt = stats["prompt_tokens"]
    rate = f"{stats['reused_tokens'] / prompt:.0%} of {int(prompt):,}" if prompt else "–"
    return _section("Store", tiers_plot(tiers) + _numbers([("hit rate, all turns", rate)]))


def _section(title: str, body: str) -> str:
    return f'<section class="panel"><h3>{title}</h3>{body}</section>'


def _numbers(pairs: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in pairs) + "</dl>"
