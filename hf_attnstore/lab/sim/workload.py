"""What a simulation runs: conversations, their turns, and when these come."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace


@dataclass(slots=True)
class Turn:
    """One request of a conversation.

    Attributes:
        new: tokens of the prompt that the conversation did not have before.
        output: tokens of the answer.
        think: seconds from the end of the turn before to this one.
        at: second at which it comes at the earliest; for traces that say when requests came.
        shared: tokens of what the conversation had that the prompt begins with; None: all of it.
        ids: names of the prompt's blocks, for traces that give them.
        took: seconds that the answer took where the trace was taken.
    """

    new: int
    output: int
    think: float = 0.0
    at: float = 0.0
    shared: int | None = None
    ids: Sequence[Hashable] | None = None
    took: float = 0.0


@dataclass(slots=True)
class Conversation:
    """Turns that follow each other; the first comes at second `start`."""

    name: Hashable
    start: float
    turns: list[Turn]


@dataclass
class Workload:
    """Conversations by the time of their first turn.

    Attributes:
        block_tokens: tokens of a block where the trace says how many; None: whatever the store takes.
        keeps_answers: whether the KV of answers is kept, or is part of the next prompt's new tokens.
    """

    name: str
    conversations: list[Conversation]
    block_tokens: int | None = None
    keeps_answers: bool = True
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def turns(self) -> int:
        """How many turns there are."""
        return sum(len(conversation.turns) for conversation in self.conversations)

    def at_rate(self, factor: float) -> Workload:
        """The same turns, coming `factor` times as fast: starts and arrivals, not the time people take to think."""
        if factor == 1:
            return self
        conversations = [
            Conversation(c.name, c.start / factor, [replace(turn, at=turn.at / factor) for turn in c.turns])
            for c in self.conversations
        ]
        return replace(self, conversations=conversations)

    def thinking(self, factor: float) -> Workload:
        """The same turns, with people who take `factor` times as long to think."""
        if factor == 1:
            return self
        conversations = [
            Conversation(c.name, c.start, [replace(turn, think=turn.think * factor) for turn in c.turns])
            for c in self.conversations
        ]
        return replace(self, conversations=conversations)

    def in_order(self) -> list[tuple[float, int, int]]:
        """Time, conversation and turn by number, in the order in which turns came, or would with instant answers."""
        found = []
        for number, conversation in enumerate(self.conversations):
            now, took = conversation.start, 0.0
            for place, turn in enumerate(conversation.turns):
                now = max(now + took + (turn.think if place else 0.0), turn.at)
                took = turn.took
                found.append((now, number, place))
        found.sort()
        return found
