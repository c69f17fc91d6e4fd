"""Eviction policies: pure classes behind one interface, by name."""

from ....errors import AttentionStoreError
from .base import MOST_GROUPS, Place, Policy, Use
from .classic import FIFO, LRU, Hyperbolic
from .predictive import Predictive

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (LRU, FIFO, Hyperbolic, Predictive)}
"""All policies by name."""

DEFAULT = Predictive.name
"""The one that finds most on traces of real conversations (docs/results/hierarchy.md)."""


def make_policy(name: str) -> Policy:
    """A new policy of the kind `name`.

    Raises:
        AttentionStoreError: there is no such policy.
    """
    try:
        return POLICIES[name]()
    except (KeyError, TypeError):
        raise AttentionStoreError(f"there is no policy {name!r}; there are {', '.join(sorted(POLICIES))}") from None


__all__ = ["DEFAULT", "LRU", "MOST_GROUPS", "POLICIES", "Place", "Policy", "Use", "make_policy"]
