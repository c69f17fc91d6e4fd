"""What a turn did, in numbers, and what several did together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from ..sizes import format_bytes, format_seconds
from ..store.transfer.load_stats import LoadStats
from .divergence import Divergence


@dataclass
class TurnStats:
    """One turn of a cache: one `generate`, or the manual forwards since the last `save`."""

    prompt_tokens: int = 0
    """Tokens of the whole prompt: those reused, prefilled and dropped."""
    reused_tokens: int = 0
    """Tokens of the prompt whose KV was there already: in this cache, or from the store."""
    prefilled_tokens: int = 0
    """Tokens of the prompt that the model was really given, counted in its forwards."""
    matched_tokens: int = 0
    """Tokens of the prompt that are known. More than were reused where layers keep a running state, and the longest
    checkpoint of it that the prompt agrees with is of fewer."""
    checkpoints: int = 0
    """Checkpoints of running states handed to the store."""
    generated_tokens: int = 0
    """Tokens after the prompt that the model was given."""
    loaded_bytes: int = 0
    """Bytes of KV put in place from the store."""
    saved_bytes: int = 0
    """Bytes of KV handed to the store; what it had already is not handed over."""
    load_seconds: float = 0.0
    """Time the I/O threads spent on loading."""
    exposed_load_seconds: float = 0.0
    """Time the model had to wait for a load: what overlap did not hide."""
    save_seconds: float = 0.0
    """Time the model had to wait for saving: handing over."""
    blocks_from: Mapping[str, int] = field(default_factory=dict)
    """Number of blocks loaded, by tier."""
    rounded_by: str = ""
    """The lossy codec by which reused tokens are kept, such as `int8`: the answer may be another one than without the
    store. Empty where none is. What was still held where it was computed may be exact all the same."""
    resegmented_tokens: int = 0
    """Tokens of the prompt in whose place others of the same text were fed."""
    dropped_tokens: int = 0
    """Tokens of the prompt that are not in the window."""
    rotated_tokens: int = 0
    """Reused tokens whose keys were rotated to other positions as they were loaded."""
    truncation: Literal["", "rotated", "recomputed"] = ""
    """How the kept tokens came to their places, where some were dropped: by rotation, or computed again."""
    recomputed: str = ""
    """Why something that could have been reused was not; empty if nothing was."""
    missed: str = ""
    """The kind of that reason, in few words."""
    diverged: Divergence | None = None
    """Where the prompt parts from its session, or from the text that agrees with it furthest; None where it goes on
    after that, where nothing is known, and where little is new, so that nobody asked."""
    gate: str = ""
    """What was chosen to be reused of what is known, and why, in words; empty where there was nothing to choose."""
    recompute_seconds: float | None = None
    """How long computing the whole prompt would have taken: estimated from what was computed so far, in this process
    and in others; of a turn that reused nothing, the time to its first token. None while unknown."""
    encoder_reused: int = 0
    """Positions of an encoder's output whose keys and values were there already; encoder-decoder models only."""
    encoder_skipped: bool = False
    """Whether the encoder did not run at all."""
    ttft_seconds: float | None = None
    """From the call of `generate` to its first new token; None where none came, and in a loop of one's own."""
    seconds: float = 0.0
    """From the call of `generate`, or the first of a loop of one's own, to the turn's end, handing over included."""

    def add_load(self, load: LoadStats, exposed_seconds: float) -> None:
        """A load of this turn is over; there may be several."""
        self.loaded_bytes += load.bytes
        self.load_seconds += load.seconds
        self.exposed_load_seconds += exposed_seconds
        self.blocks_from = dict(Counter(self.blocks_from) + load.blocks_from)

    @property
    def recomputing(self) -> str:
        """What computing the whole prompt would have taken, in words; empty while unknown, or if it was."""
        if self.recompute_seconds is None or not self.reused_tokens:
            return ""
        return f"computing it all takes about {format_seconds(self.recompute_seconds)}"

    @property
    def why_not_more(self) -> str:
        """Why not more was reused, in one line; empty where only what is new was computed."""
        if self.recomputed:
            return self.recomputed
        if self.diverged is not None:
            return f"the prompt {self.diverged}"
        if self.reused_tokens < self.matched_tokens - 1:
            checkpoint = f"the last checkpoint of running states is at {self.reused_tokens:,}"
            return f"{self.matched_tokens:,} are known, but {checkpoint}"
        return ""

    def __str__(self) -> str:
        """One line for people: what was reused, what it cost, what it would have cost, and why not more was reused."""
        parts = [
            f"reused {self.reused_tokens:,} of {self.prompt_tokens:,} tokens",
            f"prefilled {self.prefilled_tokens:,}",
        ]
        if self.dropped_tokens:
            how = "kept keys rotated" if self.truncation == "rotated" else "the kept ones computed again"
            parts.append(f"{self.dropped_tokens:,} out of the window ({how})")
        if self.encoder_skipped:
            parts.append("encoder skipped")
        if self.loaded_bytes:
            parts.append(f"loaded {format_bytes(self.loaded_bytes)} from {' and '.join(sorted(self.blocks_from))}")
        if self.rounded_by:
            parts.append(f"kept with loss ({self.rounded_by})")
        if self.ttft_seconds is not None:
            parts.append(f"first token after {format_seconds(self.ttft_seconds)}")
        parts += [self.recomputing] if self.recomputing else []
        return ", ".join(parts) + (f" (not more: {self.why_not_more})" if self.why_not_more else "")


@dataclass(frozen=True)
class TurnTotals:
    """What several turns did together."""

    turns: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    loaded_bytes: int = 0
    saved_seconds: float = 0.0
    """Of the turns of which that is known: what computing their prompts would have taken, less the time to their first
    token. Estimated."""

    def plus(self, turn: TurnStats) -> "TurnTotals":
        """These and one more."""
        saved = 0.0
        if turn.reused_tokens and turn.recompute_seconds is not None and turn.ttft_seconds is not None:
            saved = turn.recompute_seconds - turn.ttft_seconds
        return TurnTotals(
            self.turns + 1,
            self.prompt_tokens + turn.prompt_tokens,
            self.reused_tokens + turn.reused_tokens,
            self.prefilled_tokens + turn.prefilled_tokens,
            self.generated_tokens + turn.generated_tokens,
            self.loaded_bytes + turn.loaded_bytes,
            self.saved_seconds + saved,
        )

    def __str__(self) -> str:
        """One line for people."""
        said = f"{self.turns:,} turns: reused {self.reused_tokens:,} of {self.prompt_tokens:,} tokens"
        saved = f", which saved about {format_seconds(self.saved_seconds)}" if self.saved_seconds > 0 else ""
        return f"{said}, prefilled {self.prefilled_tokens:,}, loaded {format_bytes(self.loaded_bytes)}{saved}"


def added_up(rows: Sequence[TurnStats], whole: TurnStats) -> TurnStats:
    """The numbers of a batch: those of its rows, with what is said of the whole."""
    total = TurnStats(recomputed=whole.recomputed, missed=whole.missed)
    for name in (entry.name for entry in fields(TurnStats)):
        values = [getattr(row, name) for row in rows]
        if all(isinstance(value, (int, float)) for value in values):
            setattr(total, name, sum(values))
    total.blocks_from = dict(sum((Counter(row.blocks_from) for row in rows), Counter()))
    total.ttft_seconds, total.seconds = whole.ttft_seconds, whole.seconds  # rows run at the same time
    for row in rows:
        total.recomputed, total.missed = total.recomputed or row.recomputed, total.missed or row.missed
        total.diverged = total.diverged or row.diverged
        total.rounded_by = total.rounded_by or row.rounded_by
    return total
