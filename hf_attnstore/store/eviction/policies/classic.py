"""Policies from the literature."""

from .base import Place, Policy


class LRU(Policy):
    """What was used least recently goes first."""

    name = "lru"

    def place(self, before: Place | None, group: int, now: float, *, short: bool = False) -> Place:
        return Place(0, now)


class FIFO(Policy):
    """What came first goes first, whatever its use."""

    name = "fifo"

    def place(self, before: Place | None, group: int, now: float, *, short: bool = False) -> Place:
        return before if before is not None else Place(0, now)

    def left(self, place: Place, follower: Place) -> Place:
        return place


class Hyperbolic(Policy):
    """What has been used least often for the time it has been here goes first.

    Hyperbolic caching (Blankstein, Sen, Freedman; USENIX ATC 2017). Blocks are grouped by the number of their uses, so
    that the oldest of a group is the one with the lowest priority, and no sampling is needed. More than 16 uses
    count as 16.
    """

    name = "hyperbolic"
    groups = 16

    def place(self, before: Place | None, group: int, now: float, *, short: bool = False) -> Place:
        if before is None:
            return Place(0, now)
        return Place(min(before.group + 1, self.groups - 1), before.stamp)

    def left(self, place: Place, follower: Place) -> Place:
        return Place(max(place.group, follower.group), place.stamp)

    def worth(self, place: Place, now: float) -> float:
        return (place.group + 1) / max(now - place.stamp, 1e-9)
