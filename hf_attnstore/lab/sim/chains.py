"""The blocks of a conversation as it grows: what a session's manifest says, without any KV."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from .workload import Turn


@dataclass(slots=True)
class Prompt:
    """What a turn's prompt is to the store.

    Attributes:
        tokens: those the model sees.
        history: those of them that the conversation had before.
        blocks: blocks that hold them, in order; whole ones, and perhaps a short one at the end.
        short: tokens of the last block if that is short, else 0.
    """

    tokens: int
    history: int
    blocks: list[Hashable]
    short: int


def common_blocks(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """How many blocks two chains have in common, from the first on."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class Chain:
    """A conversation's blocks.

    A short last block is replaced by a longer one when the conversation goes on. On a truncation the oldest blocks go
    out of view; the others keep their names (positions are decoupled), or get new ones if `moved` is False.

    Args:
        block_tokens: tokens of a block.
        names: where new blocks get their names from; shared by all chains.
        window: tokens that the model sees at once; the oldest half of it goes when it overflows. None: no limit.
        moved: whether the keys of tokens that stay in view are still of use after a truncation.
        answers: whether the KV of answers is kept.
    """

    __slots__ = (
        "_answers", "_block_tokens", "_moved", "_names", "_window", "before", "blocks", "named", "short", "start",
        "tokens", "truncations",
    )  # fmt: skip

    def __init__(
        self,
        block_tokens: int,
        names: Iterator[int] | None = None,
        window: int | None = None,
        *,
        moved: bool = True,
        answers: bool = True,
    ) -> None:
        self._block_tokens = block_tokens
        self._answers = answers
        self._names = names if names is not None else itertools.count()
        self._window = window
        self._moved = moved
        self.blocks: list[Hashable] = []
        self.start = 0
        """Blocks that are out of view."""
        self.before: Hashable | None = None
        """The last whole one of them."""
        self.short = 0
        """Tokens of the last block if that is short, else 0."""
        self.tokens = 0
        """Tokens in view."""
        self.truncations = 0
        self.named = False
        """Whether the blocks' names are the workload's, which then says nothing of whose turns they are."""

    @property
    def whole(self) -> list[Hashable]:
        """The whole blocks in view."""
        return self.blocks[:-1] if self.short else self.blocks

    def prompt(self, turn: Turn) -> Prompt:
        """Takes in a turn's prompt."""
        if turn.ids is not None:
            return self._named(turn, list(turn.ids))
        new = turn.new
        if turn.shared is not None:
            if turn.shared < self.tokens:
                self._cut(turn.shared)
            new += max(0, turn.shared - self.tokens)
        window = self._window
        if window is not None and self.tokens + new + turn.output > window:
            new = min(new, window // 2)
            self._truncate(new + turn.output)
        found = Prompt(self.tokens + new, self.tokens, list(self.blocks), self.short)
        self._grow(new)
        return found

    def answer(self, turn: Turn) -> None:
        """Takes in a turn's answer."""
        if turn.ids is None and self._answers:
            self._grow(turn.output)

    def _named(self, turn: Turn, ids: list[Hashable]) -> Prompt:
        self.named = True
        self.tokens = turn.new + (turn.shared or 0)
        self.blocks = ids
        self.short = self.tokens % self._block_tokens if len(ids) * self._block_tokens > self.tokens else 0
        return Prompt(self.tokens, turn.shared or 0, list(ids), self.short)

    def _cut(self, tokens: int) -> None:
        """Forgets all but the first `tokens`; of a block that is cut nothing is reused."""
        keep = tokens // self._block_tokens
        if keep < len(self.blocks):
            del self.blocks[keep:]
            self.short = 0
            self.tokens = keep * self._block_tokens

    def _truncate(self, coming: int) -> None:
        """Drops the oldest half of the window, in whole blocks, until what is coming fits."""
        assert self._window is not None
        step = max(1, self._window // 2 // self._block_tokens)
        drop = 0
        while self.tokens - drop * self._block_tokens + coming > self._window and drop < len(self.blocks):
            drop = min(drop + step, len(self.blocks))
        if not drop:
            return
        self.truncations += 1
        whole = self.whole[:drop]
        if whole:
            self.before = whole[-1]
        if drop == len(self.blocks):
            self.tokens = 0
            self.short = 0
        else:
            self.tokens -= drop * self._block_tokens
        del self.blocks[:drop]
        self.start += drop
        if not self._moved:  # keys with positions in them are of no use any more
            self.blocks = [next(self._names) for _ in self.blocks]

    def _grow(self, tokens: int) -> None:
        if tokens <= 0:
            return
        if self.short:
            self.blocks.pop()
            tokens += self.short
            self.tokens -= self.short
        count = -(-tokens // self._block_tokens)
        self.blocks.extend(next(self._names) for _ in range(count))
        self.tokens += tokens
        self.short = tokens % self._block_tokens
