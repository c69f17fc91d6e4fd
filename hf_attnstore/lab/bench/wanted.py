"""Figures beside what is wanted of them, as tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_attnstore.lab.markdown import markdown_table


@dataclass(frozen=True)
class Figure:
    """Something measured, and what is wanted of it."""

    what: str
    value: float
    bar: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is as wanted."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar


COLUMNS = ("what", "measured", "wanted", "")


def rows(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """A row of words for each."""
    return [
        (
            figure.what,
            f"{figure.value:,.3g}",
            f"{'≥' if figure.at_least else '≤'} {figure.bar:g}",
            "met" if figure.met else "missed",
        )
        for figure in figures
    ]


def as_markdown(figures: Sequence[Figure]) -> str:
    """A table."""
    return "\n".join(markdown_table(COLUMNS, rows(figures))) + "\n"
