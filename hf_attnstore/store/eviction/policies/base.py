"""What an eviction policy is: a few pure decisions over metadata."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

MOST_GROUPS = 16


class Place(NamedTuple):
    """Where a block stands: in a group, and within it behind all that have a smaller stamp."""

    group: int
    stamp: float


class Use(NamedTuple):
    """One turn on a conversation, as a policy sees it. Keys are of any hashable kind."""

    now: float
    """Seconds, on whatever clock the tier goes by."""
    chain: Sequence[Hashable]
    """Keys of the conversation's whole blocks, those that the turn made included, in order."""
    tokens: int
    """Its tokens, those that the turn added included."""
    short: Hashable | None = None
    """Key of its last block, if that is a short one."""
    known: Sequence[Hashable] = ()
    """Keys of short blocks that the turn went on from."""
    matched: Place | None = None
    """Where the last block stands that the turn reused, if nothing else followed it: the end of a conversation."""
    holds: Callable[[Hashable], bool] = lambda key: True
    """Whether a block is still there, in any tier."""
    conversation: Hashable | None = None
    """Whose turn it is, where that is known: a conversation that was truncated has another chain."""


class Policy(ABC):
    """Says where blocks stand in a few groups, each ordered by stamp, and which group gives a block up next.

    Every use of a conversation is told once (`group`); then its last block gets its place (`place`), and what comes
    before that when it is the last (`left`). The block that goes is the first of the group whose first block is worth
    least. So a decision looks at one block a group, whatever the number of blocks, and an index on (group, stamp) is
    all that a table on disk needs.
    """

    name: ClassVar[str]
    groups: ClassVar[int] = 1
    """How many; at most `MOST_GROUPS`."""
    newcomers: ClassVar[int] = 0
    """The group of blocks whose turn is not over."""

    def group(self, use: Use) -> int:
        """Takes notice of a turn; returns the group that its blocks belong to."""
        return 0

    @abstractmethod
    def place(self, before: Place | None, group: int, now: float, *, short: bool = False) -> Place:
        """Where a block stands after a turn of `group`.

        Args:
            before: where it stood; None for a new one.
            short: it is the short end of the conversation.
        """

    def admits(self, newcomer: Place, victim: Place, now: float) -> bool:
        """Whether a new block is worth the room of one that would go for it, out of the lowest tier."""
        return True

    def left(self, place: Place, follower: Place) -> Place:
        """Where a block stands when the last one after it goes, which stood at another place: whoever used that used
        this one, too."""
        return follower if follower.stamp > place.stamp else place

    def worth(self, place: Place, now: float) -> float:
        """How much the first block of a group is worth keeping: who is worth least goes first, at equal worth who has
        the smallest stamp."""
        return place.stamp

    def learned(self) -> dict[str, Any]:
        """What the policy found out, as a JSON-able dict, for the next process."""
        return {}

    def recall(self, learned: Mapping[str, Any]) -> None:  # noqa: B027 most policies learn nothing
        """Takes over what `learned` gave, of whatever version; what it does not understand it leaves."""
