"""What happened when in a turn: events on tracks, and their export for trace viewers.

Times are seconds of `time.perf_counter`. What happens on a device is recorded as marks on it, whose times are known
only later, when somebody asks for the events.
"""

import json
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

TRACKS = ("compute", "wait", "load", "save", "write", "fetch")
"""What events are of, from top to bottom: layers and decoding steps that compute; computing that waits for a load;
stages that are put in place; KV that is handed over to the store; files that are written; blocks that come from disk
into memory before they are asked for."""

MOST_EVENTS = 20_000

Time = float | Callable[[], float]
"""Seconds, or who knows them later."""


def seconds(time: Time) -> float:
    """A time in seconds, once it is known."""
    return time() if callable(time) else time


class Event(NamedTuple):
    """Something that took from `begin` to `end`, in seconds of `time.perf_counter`."""

    track: str
    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Timeline:
    """A recorder. Any thread may add to it; it takes a limited number of events, and counts the others.

    Args:
        most: how many events it takes.
    """

    def __init__(self, most: int = MOST_EVENTS) -> None:
        self._most = most
        self._found: list[tuple[str, str, Time, Time]] = []
        self._adding = threading.Lock()
        self.dropped = 0
        """Events that were too many."""

    def __len__(self) -> int:
        return len(self._found)

    def add(self, track: str, name: str, begin: Time, end: Time | None = None) -> None:
        """Takes down an event, which has ended just now if `end` is not given."""
        if end is None:
            end = time.perf_counter()
        with self._adding:
            if len(self._found) < self._most:
                self._found.append((track, name, begin, end))
            else:
                self.dropped += 1

    def events(self) -> tuple[Event, ...]:
        """What was recorded, in the order of beginning. Waits for devices that are not there yet."""
        with self._adding:
            found = list(self._found)
        events = [Event(track, name, seconds(begin), seconds(end)) for track, name, begin, end in found]
        return in_order(events)


class Recorders:
    """Who wants to know what goes on in the background; as a rule nobody, and then telling costs nothing. A timeline
    that nobody else keeps is forgotten."""

    def __init__(self) -> None:
        self._timelines: tuple[weakref.ref[Timeline], ...] = ()
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return sum(known() is not None for known in self._timelines)

    def include(self, timeline: Timeline) -> None:
        """Has what happens from now on recorded there too."""
        self.leave_out(timeline)
        with self._changing:
            self._timelines = (*self._timelines, weakref.ref(timeline))

    def leave_out(self, timeline: Timeline) -> None:
        """Ends what `include` began. Harmless if nothing did."""
        with self._changing:
            self._timelines = tuple(known for known in self._timelines if known() not in (timeline, None))

    def add(self, track: str, name: str, begin: float) -> None:
        """Something has just ended that began at `begin`."""
        if self._timelines:
            end = time.perf_counter()
            for known in self._timelines:
                timeline = known()
                if timeline is not None:
                    timeline.add(track, name, begin, end)


# looking at events


def in_order(events: Iterable[Event]) -> tuple[Event, ...]:
    """Events by their beginning."""
    return tuple(sorted(events, key=lambda event: (event.begin, event.end)))


Interval = tuple[float, float]


def intervals(events: Iterable[Event], *tracks: str) -> list[Interval]:
    """When something happened on any of the tracks: intervals `(begin, end)` in order, none touching another."""
    merged: list[Interval] = []
    for begin, end in sorted((event.begin, event.end) for event in events if event.track in tracks):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def without(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What is left of intervals where others are taken away; both as `intervals` gives them."""
    left = []
    for begin, end in some:
        for first, last in others:
            if last <= begin or first >= end:
                continue
            if first > begin:
                left.append((begin, first))
            begin = max(begin, last)
        if begin < end:
            left.append((begin, end))
    return left


def total(some: Iterable[Interval]) -> float:
    """Seconds of all intervals."""
    return sum(end - begin for begin, end in some)


def exposed_seconds(events: Iterable[Event]) -> float:
    """How long computing had to wait for loading."""
    return total(intervals(events, "wait"))


def hidden_seconds(events: Sequence[Event], track: str) -> float:
    """How much of what happened on a track happened while the model computed, and did not wait."""
    happened = intervals(events, track)
    computing = without(intervals(events, "compute"), intervals(events, "wait"))
    return total(happened) - total(without(happened, computing))


# traces


def lanes(events: Iterable[Event]) -> list[list[Event]]:
    """Events of one track in as many rows as it takes for none to overlap another."""
    rows: list[list[Event]] = []
    for event in in_order(events):
        row = next((row for row in rows if row[-1].end <= event.begin), None)
        if row is None:
            rows.append([event])
        else:
            row.append(event)
    return rows


def trace(events: Iterable[Event], title: str = "hf-attnstore") -> dict[str, Any]:
    """Events in the Trace Event Format, as a JSON object: complete events (`"ph": "X"`), a thread for each track.

    Times are microseconds since the first event. Perfetto (ui.perfetto.dev) and chrome://tracing show it. What overlaps
    on one track, such as files read by several threads, gets further threads.
    """
    by_track: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_track[event.track].append(event)
    begin = min((event.begin for found in by_track.values() for event in found), default=0.0)
    order = [*TRACKS, *sorted(track for track in by_track if track not in TRACKS)]
    found: list[dict[str, Any]] = [_metadata("process_name", 0, {"name": title})]
    thread = 0
    for track in order:
        for number, lane in enumerate(lanes(by_track.get(track, ()))):
            thread += 1
            found.append(_metadata("thread_name", thread, {"name": track if number == 0 else f"{track} {number + 1}"}))
            found.append(_metadata("thread_sort_index", thread, {"sort_index": thread}))
            for event in lane:
                place = {"pid": 1, "tid": thread, "ts": (event.begin - begin) * 1e6, "dur": event.seconds * 1e6}
                found.append({"ph": "X", "name": event.name, "cat": track, **place})
    return {"traceEvents": found, "displayTimeUnit": "ms"}


def trace_json(events: Iterable[Event], title: str = "hf-attnstore") -> str:
    """`trace` as the text of a file."""
    return json.dumps(trace(events, title))


def _metadata(name: str, thread: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": 1, "tid": thread, "ts": 0, "args": arguments}
