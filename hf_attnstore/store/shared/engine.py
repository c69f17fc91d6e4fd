"""What a shared tier asks of an engine: values of bytes under names, and deadlines that hold.

An engine is a class under `Engine`, found by the scheme of the URL: those that come with the package, and those that
packages announce as entry points in the group `hf_attnstore.engines`. It is used from several threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from typing import NamedTuple, cast

from ...errors import SharedTierError
from ..blocks.block import Bytes
from .deadline import Deadline
from .url import SharedURL

TAG_BYTES = 32
"""With which values begin that are compared before they are set: what is in them, and who may change it (`leases`)."""
GROUP = "hf_attnstore.engines"
_OWN = {
    **dict.fromkeys(("valkey", "valkeys", "redis", "rediss"), "hf_attnstore.store.shared.valkey:ValkeyEngine"),
    "s3": "hf_attnstore.store.shared.s3:S3Engine",
    "mooncake": "hf_attnstore.store.shared.mooncake:MooncakeEngine",
}


class EngineError(OSError):
    """An engine did not do what it was asked, or its answer is not known: it is away, too slow, or refuses.

    Its text has no secret in it. That it is an OSError is what readers of blocks expect.
    """

    def __init__(self, message: str) -> None:
        super().__init__(0, message)
        self.strerror = message


class FullError(EngineError):
    """There is no room for what was to be written; the engine is well."""


class Taken(NamedTuple):
    """A hold on a record that somebody wants."""

    holder: bytes
    kin: int
    """So many bytes of a holder say which others may be taken over at once."""
    milliseconds: int
    known: bytes
    """The tag of what is known of the record."""


class Put(Enum):
    """What became of a value."""

    STORED = "stored"
    FULL = "full"
    """There is no room for it, or it is too large for the engine."""


class Edges(NamedTuple):
    """A value's size, and its first and last bytes."""

    size: int
    head: bytes
    tail: bytes


class Stream(ABC):
    """Ranges of values, one after the other, asked for ahead of their use. For one thread at a time."""

    @abstractmethod
    def ask(self, name: str, offset: int, nbytes: int, deadline: Deadline) -> None:
        """Asks for the range that comes after those asked for before. Returns at once, or nearly.

        Raises:
            EngineError: see `Engine`.
        """

    @abstractmethod
    def take(self, buffers: Sequence[Bytes], deadline: Deadline) -> int:
        """The first range that was asked for and not taken yet, into buffers that together take all of it.

        Returns:
            Its bytes: fewer than were asked for where the value ends before, 0 where it is not there.

        Raises:
            EngineError: see `Engine`. Nothing is written into the buffers any more.
        """

    @abstractmethod
    def close(self, *, reuse: bool) -> None:
        """Ends it.

        Args:
            reuse: all that was asked for was taken, without an error.
        """


@dataclass
class About:
    """What an engine says of itself, for people."""

    what: str
    capacity: int = 0
    """Bytes that it has room for; 0 where there is no limit."""
    used: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    unsafe: list[str] = field(default_factory=list)
    """What is to be known of it before it is relied on."""


class Engine(ABC):
    """A client of an engine.

    Every method ends by its deadline, whatever the engine does, and raises `EngineError` where what it was to find out
    or to do is not known; then it may have been done. No buffer is read or written after a method has returned.

    Args:
        url: with the options that are the engine's own.

    Raises:
        SharedTierError: the URL is none that the engine understands. Nothing is connected yet.
    """

    largest = 1 << 62
    """Bytes of a value at most."""
    fresh = 5.0
    """Seconds for which it is believed that a value is where it was just seen."""
    one_by_one = False
    """Whether it takes a request for each name, and so is not asked for many while somebody waits."""

    @abstractmethod
    def __init__(self, url: SharedURL) -> None: ...

    @abstractmethod
    def put(self, name: str, parts: Sequence[Bytes], deadline: Deadline, seconds: int = 0) -> Put:
        """Stores a value, the parts one after the other, in place of any that there is.

        Args:
            seconds: after which it may go, if it is not touched; 0 for never.
        """

    @abstractmethod
    def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int]:
        """The bytes of each value; 0 where there is none."""

    def leading(self, names: Sequence[str], deadline: Deadline) -> list[int]:
        """As `sizes`, of a chain from its first on: who would have to ask for each may suppose that there are no gaps,
        and that they are about as large as others that it has asked for."""
        return self.sizes(names, deadline)

    @abstractmethod
    def edges(self, names: Sequence[str], head: int, tail: int, deadline: Deadline) -> list[Edges]:
        """Of each value at most so many of its first and of its last bytes, in one exchange. Of one that is not there
        the size is 0."""

    @abstractmethod
    def open_stream(self, deadline: Deadline) -> Stream:
        """Makes ready to read ranges."""

    @abstractmethod
    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        """Removes values, if they are there."""

    @abstractmethod
    def about(self, deadline: Deadline) -> About:
        """What it is, and what is unsafe about it."""

    def touch(self, names: Sequence[str], deadline: Deadline, seconds: int = 0) -> None:  # noqa: B027
        """Values were used, in this order: what it evicts first, and when, may go by that. `seconds` as in `put`."""

    # small entries under a name and a field, for who finds blocks by what they follow; engines may go without

    def note(  # noqa: B027
        self, name: str, member: bytes, entry: bytes, deadline: Deadline, seconds: int = 0
    ) -> None:
        """Keeps an entry among those of `name`, of which the engine keeps some dozens."""

    def noted(self, names: Sequence[str], deadline: Deadline) -> list[dict[bytes, bytes]]:
        """The entries of each name, by member."""
        return [{} for _ in names]

    def drop_note(self, name: str, member: bytes, deadline: Deadline) -> None:  # noqa: B027
        """Lets go of an entry."""

    def names(self, begin: str, deadline: Deadline) -> list[str]:
        """The names of all values that begin like this, for who looks after them; an engine may tell none."""
        return []

    # records of sessions; engines may go without

    def value(self, name: str, deadline: Deadline) -> bytes:
        """A small value; empty if there is none."""
        return b""

    def replace(
        self, name: str, old: bytes, new: bytes, listed: str, member: bytes, entry: bytes, deadline: Deadline
    ) -> bool:
        """Sets a value whose first `TAG_BYTES` bytes are its tag, if that of the value there is `old` (empty: if there
        is none), and with it, in one step or just before, an entry of a list that `noted` tells, which has no limit;
        with an empty `listed` no entry."""
        return False

    # holds on records, for an engine that has a clock; without, `value` and `replace` do

    def take(self, name: str, taken: Taken, deadline: Deadline) -> bytes | None:
        """Takes the hold on a record, whose layout `leases` tells, if it is free, over, or one of kin.

        Returns:
            The value as it is then, or its head alone if that says enough; None from an engine that has no clock.
        """
        return None

    def renew(
        self, name: str, fence: bytes, holder: bytes, milliseconds: int, state: int, deadline: Deadline
    ) -> int | None:
        """Has the hold of number and holder `fence` go on from now, or be `holder`'s.

        Returns:
            Until when, by the engine's clock; -1 if it is another's; None from an engine that has no clock.
        """
        return None

    def close(self) -> None:  # noqa: B027
        """Lets go of all connections."""

    def after_fork_in_child(self) -> None:  # noqa: B027
        """Lets go of the parent's connections without a word on them."""


def open_engine(url: SharedURL) -> Engine:
    """A client for the engine that the URL's scheme names. Nothing is connected yet.

    Raises:
        SharedTierError: there is no such engine here, or the URL is none that it understands.
    """
    dotted = _OWN.get(url.scheme)
    if dotted is None:
        from importlib.metadata import entry_points

        announced = {point.name: point.value for point in entry_points(group=GROUP)}
        dotted = announced.get(url.scheme)
        if dotted is None:
            known = ", ".join(sorted({*_OWN, *announced}))
            raise SharedTierError(f"no engine is known for {url.scheme}://, only for {known}")
    module, _, name = dotted.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SharedTierError(f"the engine for {url.scheme}:// can't be loaded: {error}") from error
    return cast(Engine, kind(url))
