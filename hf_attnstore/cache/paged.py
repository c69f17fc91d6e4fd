"""A word where transformers' own continuous batching goes on with KV that other weights computed.

Its manager keeps blocks of prompts by their ids alone, over a pause in which weights may change. They are not ours to
drop; but an attached model sees its forwards.
"""

import logging
import weakref
from collections.abc import Mapping
from typing import Any

from .identity.fingerprint import Fingerprint

logger = logging.getLogger("hf_attnstore")

_KIND = "PagedAttentionCache"
_seen: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()
"""What computed last for a manager's cache."""
_looked_after: "weakref.WeakSet[Any]" = weakref.WeakSet()


def look_after(cache: Any) -> None:
    """Somebody else sees to it that a manager's cache goes on with nothing of other weights."""
    _looked_after.add(cache)


def notice(fingerprint: Fingerprint, kwargs: Mapping[str, Any]) -> None:
    """A forward of an attached model without a cache of ours begins."""
    cache = next((value for value in kwargs.values() if type(value).__name__ == _KIND), None)
    if cache is None or cache in _looked_after:
        return
    if kwargs.get("max_length_q") == 1 and cache in _seen and fingerprint.glance():  # nobody begins with old pages here
        return
    try:
        now = fingerprint.current()
    except Exception:  # who can't be identified is not compared
        return
    before = _seen.get(cache, now)
    _seen[cache] = now
    if before != now:
        logger.warning(
            "the model's weights or settings changed (%s, now %s) while transformers' continuous batching runs: it "
            "goes on with blocks that were computed before. Stop its manager and begin another one after such a change",
            before[:12],
            now[:12],
        )
