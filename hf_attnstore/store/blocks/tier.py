"""What a tier is: a place that blocks are found, opened and put in, by key."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from ...errors import LoadError
from .block import Block, Match
from .keys import Key
from .stored import StoredBlock
from .vault import Vault

Source = Block | StoredBlock
"""What a block is loaded from: host memory, or ranges of bytes."""


class Tier(ABC):
    """A place for blocks. Safe to use from several threads.

    Looking things up never raises: what can't be asked for is not there. Only the first six methods have to be there
    in each; the others find what begins like a text, for tiers with an index.
    """

    name: str
    """In accounts, and in what is learned of its speed."""
    vault: Vault
    """What blocks are written with, set by the store."""
    shared = False
    """Whether others than this store use what is in it: then what a session here lets go of stays."""
    whole = False
    """Whether loads for host memory bring its blocks whole into the memory tier before anything is computed, rather
    than layer by layer: where a load hides little and bringing them there afterwards would take another transfer."""

    @abstractmethod
    def find(self, keys: Sequence[Key]) -> set[Key]:
        """Which of these blocks are here, as far as is known."""

    @abstractmethod
    def sources(self, keys: Sequence[Key]) -> Mapping[Key, Callable[[], Source]]:
        """What opens those of these blocks that are here, or raises LoadError. Whoever opens one closes it, and tells
        `failed` where that can't be done."""

    @abstractmethod
    def put(self, block: Block, supersedes: Key | None = None) -> bool:
        """Takes a block, unless it is here; may take its time. False where it does not want it.

        Args:
            supersedes: a short block whose tokens this one begins with, and which is of no use any more.

        Raises:
            AttentionStoreError: it failed.
        """

    @abstractmethod
    def delete(self, keys: Sequence[Key]) -> None:
        """Lets go of blocks, if they are here."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Bytes that there is room for; 0 where nothing is kept."""

    @property
    @abstractmethod
    def used(self) -> int:
        """Bytes of them that are taken."""

    def lacks(self, key: Key) -> bool:
        """Whether a block that something was put in after is not here, as it should be."""
        return not self.find([key])

    def flush(self) -> None:  # noqa: B027 most have it when `put` returns
        """Waits until what was put in is there, as long as there is hope."""

    def touch(self, keys: Sequence[Key]) -> None:  # noqa: B027 who evicts nothing need not know
        """Marks blocks as used now."""

    def sizes(self, keys: Sequence[Key]) -> dict[Key, int]:
        """Bytes of those of these blocks that are here."""
        return dict.fromkeys(self.find(keys), 0)

    def failed(self, key: Key, error: LoadError) -> None:
        """A block from here, or from a tier below, could not be used: it is not to be found here again, for a while or
        for good."""
        if not error.transient:
            self.delete([key])

    def close(self) -> None:  # noqa: B027 some hold nothing
        """Nothing is asked of it any more."""

    # by content

    def nearest(self, parent: Key, tokens: bytes, beyond: int) -> Match | None:
        """The block after `parent` that shares the longest beginning with `tokens`, of more than `beyond` tokens."""
        return None

    def follower(self, parent: Key, block_size: int) -> Key | None:
        """A block after `parent`, whichever, of at most `block_size` tokens."""
        return None

    def followed(self, parents: Sequence[Key]) -> set[Key]:
        """Which of these have a block after them."""
        return set()

    def longest_beginning(self, parent: Key, tokens: bytes) -> tuple[Key, int] | None:
        """The longest block after `parent` with all of which `tokens` begins, and how many tokens it has."""
        return None

    def describe(self, key: Key, fingerprint: str = "") -> tuple[int, bytes] | None:
        """The position for which a block's first keys were made, and its ids; None if it is not here, or of another
        model than that of `fingerprint`."""
        opens = self.sources([key]).get(key)
        if opens is None:
            return None
        try:
            source = opens()
            if isinstance(source, Block):
                meta = source.meta
            else:
                with source:
                    meta = source.read_meta()
        except LoadError as error:
            self.failed(key, error)
            return None
        return (meta.start, meta.tokens) if fingerprint in ("", meta.fingerprint) else None
