"""What the page remembers of each turn, and what it makes of that: what recomputing costs, and the footer's words.

Records are kept with the conversation, so they survive a reload, a restart, and go along with a fork.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from ..chat.session import ChatTurn
from ..sizes import format_bytes, format_seconds

TURNS, TIMELINE = "ui-turns", "ui-timeline"
"""Under which keys records and the last turn's timeline are kept with a conversation."""

Known = Literal["measured", "measured nearby", "estimated"]


@dataclass(frozen=True)
class TurnRecord:
    """One turn. Times in seconds."""

    with_store: bool = True
    ttft: float | None = None
    waited: float = 0.0
    """For turns of others."""
    prompt: int = 0
    reused: int = 0
    prefilled: int = 0
    dropped: int = 0
    generated: int = 0
    tokens_per_second: float | None = None
    finish: str = ""
    diverged: str = ""
    """Why not more was reused, in words."""
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    exposed_seconds: float = 0.0
    blocks_from: Mapping[str, int] = field(default_factory=dict)
    recompute_estimate: float | None = None
    """What the cache says that recomputing would have taken."""
    fetched_bytes: int = 0
    """Brought from disk to memory before the message was sent."""
    fetched_seconds: float | None = None
    """How long reading those bytes from disk takes, as measured; None while unknown."""
    other_ttft: float | None = None
    """The other way, with or without the store, for the same turn, if it was tried."""

    @property
    def seen(self) -> int:
        """Tokens of the prompt that the model saw."""
        return self.prompt - self.dropped

    @property
    def cut(self) -> bool:
        """Whether the answer can go on: it was ended by its length or by the user."""
        return self.finish in ("length", "stopped", "interrupted")

    @property
    def ttft_without(self) -> float | None:
        """Measured without the store."""
        return self.other_ttft if self.with_store else self.ttft

    @property
    def ttft_with(self) -> float | None:
        """Measured with the store."""
        return self.ttft if self.with_store else self.other_ttft


def record_of(turn: ChatTurn, *, with_store: bool, waited: float, fetched: tuple[int, float | None]) -> TurnRecord:
    """The record of a turn that has just been."""
    stats = turn.cache
    return TurnRecord(
        with_store=with_store,
        ttft=turn.ttft_seconds,
        waited=waited,
        prompt=turn.prompt_tokens,
        reused=turn.reused_tokens,
        prefilled=turn.prefilled_tokens,
        dropped=stats.dropped_tokens,
        generated=turn.generated_tokens,
        tokens_per_second=turn.tokens_per_second,
        finish=turn.finish,
        diverged=stats.why_not_more if with_store else "",
        loaded_bytes=stats.loaded_bytes,
        load_seconds=stats.load_seconds,
        exposed_seconds=stats.exposed_load_seconds,
        blocks_from=dict(stats.blocks_from),
        recompute_estimate=stats.recompute_seconds if with_store else None,
        fetched_bytes=fetched[0] if with_store else 0,
        fetched_seconds=fetched[1] if with_store else None,
    )


def replaced(records: Sequence[TurnRecord | None], number: int, new: TurnRecord) -> list[TurnRecord | None]:
    """The records of a conversation after turn `number` was answered, again or for the first time.

    Answered again the other way, with the same prompt, it is a comparison: the new record has both times.
    """
    kept = [*records[:number], *([None] * (number - len(records)))]
    before = records[number] if number < len(records) else None
    if before is not None and before.prompt == new.prompt:
        other = before.other_ttft if before.with_store == new.with_store else before.ttft
        new = replace(new, other_ttft=other)
    return [*kept, new]


def to_json(records: Sequence[TurnRecord | None]) -> list[Any]:
    return [asdict(record) if record is not None else None for record in records]


def from_json(saved: Any, turns: int) -> list[TurnRecord | None]:
    """The records of the first `turns` turns; None for one of which nothing (or nothing readable) is known."""
    found: list[TurnRecord | None] = []
    names = {entry.name for entry in fields(TurnRecord)}
    for entry in saved if isinstance(saved, list) else []:
        known = isinstance(entry, dict)
        found.append(TurnRecord(**{n: v for n, v in entry.items() if n in names}) if known else None)
    return [*found, *([None] * turns)][:turns]


def cost_of_recomputing(records: Sequence[TurnRecord | None], number: int) -> tuple[float, Known] | None:
    """Seconds to the first token of turn `number` without the store; None while nothing is known.

    "measured" if it was measured on this very turn, by trying it with the switch or because nothing could be reused.
    "measured nearby" if the switch was used on this conversation: then it is that time, and what more or fewer tokens
    take. Else it is "estimated": by the cache, or from the prefills of this conversation.
    """
    record = records[number]
    if record is None:
        return None
    if record.ttft_without is not None:
        return record.ttft_without, "measured"
    if not record.reused:
        return (record.ttft, "measured") if record.ttft is not None else None
    known = [r for r in records if r is not None]
    tried = [(r.seen, r.ttft_without) for r in known if r.ttft_without is not None]
    if not tried and record.recompute_estimate is not None:
        return record.recompute_estimate, "estimated"
    prefills = [(r.prefilled, r.ttft - r.exposed_seconds) for r in known if r.with_store and r.ttft is not None]
    slope = _seconds_by_token([*prefills, *tried])
    if tried:
        seen, seconds = min(tried, key=lambda point: abs(point[0] - record.seen))
        return max(0.0, seconds + (slope or 0.0) * (record.seen - seen)), "measured nearby"
    if slope is None:
        return None
    prefilled, seconds = max(prefills)
    return seconds + slope * (record.seen - prefilled), "estimated"


def _seconds_by_token(points: Sequence[tuple[int, float]]) -> float | None:
    """What a token more takes, from the shortest and the longest prefill; None where these are too near to each other.

    A line through both is careful: what a forward takes however short it is, is not counted for every token.
    """
    if not points:
        return None
    low, high = min(points), max(points)
    if high[0] < 2 * low[0] + 16 or high[1] <= low[1]:
        return None
    return (high[1] - low[1]) / (high[0] - low[0])


def footer(records: Sequence[TurnRecord | None], number: int) -> list[str]:
    """The words under an answer, in parts."""
    record = records[number]
    if record is None:
        return []
    parts = []
    if record.ttft is not None:
        parts.append(
            f"first token after {format_seconds(record.ttft)}" + ("" if record.with_store else " without the store")
        )
    parts.append(f"{record.reused:,} tokens reused, {record.prefilled:,} prefilled")
    if record.loaded_bytes:
        parts.append(
            f"{format_bytes(record.loaded_bytes)} from {' and '.join(sorted(record.blocks_from)) or 'the store'}"
        )
    if record.tokens_per_second is not None:
        parts.append(f"{record.tokens_per_second:,.0f} tokens/s")
    parts.append(_compared(records, number))
    if record.fetched_bytes:
        said = f"{format_bytes(record.fetched_bytes)} fetched before you sent it"
        if record.fetched_seconds is not None:
            said += f", which saved about {format_seconds(record.fetched_seconds)} of loading"
        parts.append(said)
    if record.dropped:
        parts.append(f"the oldest {record.dropped:,} tokens are out of the window")
    if record.diverged:
        parts.append(record.diverged)
    if record.waited >= 0.05:
        parts.append(f"waited {format_seconds(record.waited)} for others")
    ends = {
        "interrupted": "stopped",
        "stopped": "stopped",
        "length": "cut at the longest answer",
        "window": "cut: the context window is full",
    }
    if record.finish in ends:
        parts.append(ends[record.finish])
    return parts


def _compared(records: Sequence[TurnRecord | None], number: int) -> str:
    """What the turn would have taken the other way: with the store, or without it."""
    record = records[number]
    assert record is not None
    if not record.with_store:
        other = record.ttft_with
        return f"with the store: {format_seconds(other)} (measured)" if other is not None else "computed as a whole"
    cost = cost_of_recomputing(records, number)
    if not record.reused and record.other_ttft is None:
        return "recomputing: the same, as nothing was reused"
    if cost is None:
        return "recomputing: not known yet"
    times = cost[0] / record.ttft if record.ttft else 0.0
    sooner = f", {times:,.0f} × as long" if times >= 2 else ""
    return f"recomputing: {format_seconds(cost[0])} ({cost[1]}){sooner}"
