"""What requests of continuous batching are told from outside, and tell: by their ids."""

from collections.abc import Callable
from dataclasses import dataclass

from ...store.records.manifest import Manifest
from ...store.store import AttentionStore
from ..stats import TurnStats


@dataclass(frozen=True)
class Kept:
    """What of a request was handed over to the store when it ended."""

    fingerprint: str
    manifest: Manifest
    """What a session would consist of that is this request."""


@dataclass(frozen=True)
class _Told:
    store: AttentionStore
    stats: TurnStats
    when_over: Callable[[Kept | None], object] | None


class Told:
    """Of one manager's requests. Safe to use from any thread."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}

    def expect(
        self, request_id: str, store: AttentionStore, when_over: Callable[[Kept | None], object] | None = None
    ) -> TurnStats:
        """A request that is about to be added belongs to this view of the store: to its namespace.

        Args:
            when_over: called when it is over, however it ended, by the thread that computes: must not take long.

        Returns:
            What is known of it, and is filled in when it begins.
        """
        told = self._told[request_id] = _Told(store, TurnStats(), when_over)
        return told.stats

    def store_of(self, request_id: str) -> AttentionStore | None:
        """The view that a request belongs to, where somebody said so."""
        told = self._told.get(request_id) or self._told.get(parent_of(request_id))
        return told.store if told is not None else None

    def stats_of(self, request_id: str) -> TurnStats | None:
        """Where it is to be said what a request reused."""
        told = self._told.get(request_id)
        return told.stats if told is not None else None

    def over(self, request_id: str, kept: Kept | None = None) -> None:
        """A request is over."""
        told = self._told.pop(request_id, None)
        if told is not None and told.when_over is not None:
            told.when_over(kept)


def parent_of(request_id: str) -> str:
    """The request that one is another answer to, as transformers names them; empty where it is not."""
    return request_id.rpartition("__child#")[0]
