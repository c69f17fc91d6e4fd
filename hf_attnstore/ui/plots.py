"""Small pictures in SVG, made of numbers: drawn in well under a millisecond, so that no plot holds up a token.

They take their colours from the page, and scale with the room that there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..sizes import format_bytes, format_seconds

WIDTH = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 6, 8, 18
TRACKS = ("compute", "wait", "load", "fetch", "save", "write")


def times_plot(with_store: Sequence[float | None], without: Sequence[tuple[float, bool] | None]) -> str:
    """Time to first token by turn, in seconds: with the store, and without it as (seconds, whether measured)."""
    height = 140
    highest = max([*(t for t in with_store if t is not None), *(t[0] for t in without if t is not None)], default=0.0)
    if highest <= 0:
        return _empty("the first turn shows here")
    top = _round_up(highest)
    count = max(len(with_store), len(without))

    def place(number: int, seconds: float) -> tuple[float, float]:
        share = (number + 0.5) / count
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT), height - _BOTTOM - seconds / top * (height - _TOP - _BOTTOM)

    parts = []
    for step in (0.0, 0.5, 1.0):
        y = height - _BOTTOM - step * (height - _TOP - _BOTTOM)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 5, y + 3, format_seconds(top * step) if step else "0", "end"))
    every = max(1, -(-count // 8))
    for number in range(0, count, every):
        parts.append(_text(place(number, 0)[0], height - 5, str(number + 1), "middle"))
    other = [(n, t) for n, t in enumerate(without) if t is not None]
    parts.append(_line("without", [place(n, t[0]) for n, t in other]))
    for number, (seconds, measured) in other:
        label = (
            f"turn {number + 1} without the store: {format_seconds(seconds)}, {'measured' if measured else 'estimated'}"
        )
        parts.append(_dot("without" + ("" if measured else " estimated"), place(number, seconds), label))
    mine = [(n, t) for n, t in enumerate(with_store) if t is not None]
    parts.append(_line("with", [place(n, t) for n, t in mine]))
    for number, seconds in mine:
        parts.append(_dot("with", place(number, seconds), f"turn {number + 1}: {format_seconds(seconds)}"))
    return _svg(height, parts, "time to first token by turn")


def tiers_plot(tiers: Sequence[tuple[str, int, int]]) -> str:
    """Bars of (name, bytes, cap in bytes)."""
    parts = []
    for number, (name, used, cap) in enumerate(tiers):
        y = 30 * number
        share = min(1.0, used / cap) if cap else 0.0
        parts.append(_text(0, y + 10, name, "start"))
        parts.append(_text(WIDTH, y + 10, f"{format_bytes(used)} of {format_bytes(cap)}", "end"))
        parts.append(f'<rect class="room" x="0" y="{y + 15}" width="{WIDTH}" height="7" rx="3"/>')
        if used:
            width = max(2.0, share * WIDTH)
            parts.append(f'<rect class="with" x="0" y="{y + 15}" width="{width:.1f}" height="7" rx="3"/>')
    return _svg(30 * len(tiers), parts, "bytes by tier")


def timeline_plot(events: Sequence[tuple[str, str, float, float]]) -> str:
    """What happened when: events of (track, name, begin, end) in seconds, a line for each track."""
    if not events:
        return _empty("the next turn shows here")
    begin, end = min(e[2] for e in events), max(e[3] for e in events)
    length = max(end - begin, 1e-6)
    present = {e[0] for e in events}
    tracks = [t for t in TRACKS if t in present] + sorted(present - set(TRACKS))
    left, row = 54, 16
    parts = []
    for number, track in enumerate(tracks):
        parts.append(_text(0, row * number + 11, track, "start"))
        parts.append(f'<rect class="room" x="{left}" y="{row * number + 2}" width="{WIDTH - left}" height="11"/>')
    for track, name, first, last in events:
        x = left + (first - begin) / length * (WIDTH - left)
        width = max(0.6, (last - first) / length * (WIDTH - left))
        y = row * tracks.index(track) + 2
        kind = track if track in TRACKS else "compute"
        label = escape(f"{track}: {name + ', ' if name else ''}{format_seconds(last - first)}")
        box = f'class="track-{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="11"'
        parts.append(f"<rect {box}><title>{label}</title></rect>")
    bottom = row * len(tracks) + 12
    parts.append(_text(left, bottom, "0", "start"))
    parts.append(_text(WIDTH, bottom, format_seconds(length), "end"))
    return _svg(bottom + 4, parts, "timeline of the last turn")


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}" class="plot">'
        + "".join(parts)
        + "</svg>"
    )


def _empty(words: str) -> str:
    return f'<p class="nothing">{escape(words)}</p>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    if len(points) < 2:
        return ""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{joined}"/>'


def _dot(kind: str, point: tuple[float, float], label: str) -> str:
    return (
        f'<circle class="{kind}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3"><title>{escape(label)}</title></circle>'
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20 …"""
    size = 1e-6
    while True:
        for step in (1, 2, 5):
            if step * size >= value:
                return step * size
        size *= 10
