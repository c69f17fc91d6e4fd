"""What the index knows of a block."""

from dataclasses import dataclass, replace

from ..blocks.keys import Key
from ..eviction.policies import Place


@dataclass(frozen=True)
class BlockRow:
    """What the index knows of a block on disk."""

    key: Key
    parent: Key
    continues: Key
    start: int
    count: int
    bytes: int
    fingerprint: str
    group: int
    stamp: float

    @property
    def place(self) -> Place:
        """Where it stands in the order of eviction."""
        return Place(self.group, self.stamp)

    def moved(self, place: Place) -> "BlockRow":
        """The same block at another place."""
        return replace(self, group=place.group, stamp=place.stamp)
