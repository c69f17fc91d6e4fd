"""What a session consists of, as the store keeps it."""

from dataclasses import dataclass

from ..blocks.keys import Key


@dataclass(frozen=True)
class SessionInfo:
    """A session as `AttentionStore.sessions()` lists it."""

    name: str
    tokens: int
    """Tokens whose KV is in the store."""
    bytes: int
    """Bytes of the blocks it uses; blocks shared with other sessions count in each."""
    created: float
    """Seconds since the epoch."""
    last_used: float
    """Seconds since the epoch."""
    fingerprint: str = ""
    """Of the model that it was last saved with; empty if it has no KV."""
    length: int = 0
    """Tokens of the conversation, those included that were dropped or are not in the store any more."""


@dataclass(frozen=True)
class SpanRow:
    """Tokens `[start, stop)` of a block, or tokens that were dropped, as a session's manifest lists them."""

    block: Key
    """Empty for dropped tokens."""
    start: int
    stop: int
    shift: int = 0
    """How far from where its keys were made the span is now, in tokens."""
    dropped: bytes = b""
    """The ids of dropped tokens, as from `encode_tokens`."""


@dataclass(frozen=True)
class Manifest:
    """What a session consists of, in the order of the conversation."""

    spans: tuple[SpanRow, ...]
    """Up to the first that is not there any more."""
    root: Key = b""
    """The root of the chain that goes on after a truncation; empty for one that was never truncated."""
    base: int = 0
    """Tokens in the window before that chain begins."""
    length: int = 0
    """Tokens of the conversation, those included that were dropped or are not there any more."""
    beside: tuple[Key, ...] = ()
    """Blocks that the session is to own from now on though none of its tokens is in them. Only for who commits: what
    a session owns is kept apart from its manifest."""
