"""What requests of continuous batching are told from outside, and tell: by their ids."""

from ...store.store import AttentionStore
from ..stats import TurnStats


class Told:
    """Of one manager's requests. Safe to use from any thread."""

    def __init__(self) -> None:
        self._stores: dict[str, AttentionStore] = {}
        self._stats: dict[str, TurnStats] = {}

    def expect(self, request_id: str, store: AttentionStore) -> TurnStats:
        """A request that is about to be added belongs to this view of the store: to its namespace.

        Returns:
            What is known of it, and is filled in when it begins.
        """
        self._stores[request_id] = store
        return self._stats.setdefault(request_id, TurnStats())

    def store_of(self, request_id: str) -> AttentionStore | None:
        """The view that a request belongs to, where somebody said so."""
        return self._stores.get(request_id)

    def stats_of(self, request_id: str) -> TurnStats:
        """What is known of a request."""
        return self._stats.get(request_id) or TurnStats()

    def forget(self, request_id: str) -> None:
        """A request is over."""
        self._stores.pop(request_id, None)
        self._stats.pop(request_id, None)
