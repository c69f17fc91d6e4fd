"""Spans: where the KV of a run of tokens is."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..store.blocks.keys import Key


class Span(NamedTuple):
    """Tokens `[start, stop)` of a block. `first` is the position of the span's first token in the conversation."""

    block: Key
    start: int
    stop: int
    first: int
    block_tokens: int
    """Number of tokens in the whole block."""
    shift: int = 0
    """`first` minus the position for which the span's keys were made."""

    @property
    def last(self) -> int:
        """One past the position of the span's last token."""
        return self.first + self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether the span is all of its block."""
        return self.start == 0 and self.stop == self.block_tokens


def total_tokens(spans: Sequence[Span]) -> int:
    """Number of tokens that the spans hold; they follow each other without gaps."""
    return spans[-1].last if spans else 0


def crop(spans: Iterable[Span], tokens: int) -> list[Span]:
    """The spans of the first `tokens` tokens."""
    kept = []
    for span in spans:
        if span.first >= tokens:
            break
        kept.append(span if span.last <= tokens else span._replace(stop=span.start + tokens - span.first))
    return kept


def overlapping(spans: Iterable[Span], first: int, last: int) -> Iterator[Span]:
    """The parts of the spans that hold positions `[first, last)`."""
    for span in spans:
        low, high = max(span.first, first), min(span.last, last)
        if low < high:
            offset = span.start - span.first
            whole = low == span.first and high == span.last
            yield span if whole else span._replace(start=low + offset, stop=high + offset, first=low)
