"""Computing the KV of a conversation beforehand: a turn that generates nothing and can be stopped."""

from collections.abc import Callable

import numpy as np
import torch

from ...errors import LoadError
from ..cache import AttentionStoreCache
from ..hooks import feed
from ..model.structure import device_of

CHUNK = 256
"""Tokens fed at once: after so many at most, a prefill that is to stop does."""


def prefill(cache: AttentionStoreCache, ids: np.ndarray, go_on: Callable[[], bool]) -> bool:
    """Computes and keeps what the store does not have of the conversation `ids` `[tokens]`, as a turn of its own.

    `cache.stats` says how many tokens were computed. Nothing is handed over before the end, and then only if the model
    is still the one that it was: nobody who changes a model expects it to be computing.

    Args:
        go_on: asked before each chunk, with the session held. On False the turn ends with what there is by then.

    Returns:
        Whether all of it was computed.

    Raises:
        SessionBusyError: another turn runs on the session, or on the cache.
        ContextWindowError: it does not fit into the window.
    """
    cache.begin_turn(ids, limit=len(ids), checked=True)
    try:
        cache.hold_back()
        if cache.store is not None and cache.session is not None:
            cache.store.give_way(cache.session)
        if cache.unidentified or not cache.continues_in_parts:
            return False
        return _feed(cache, cache.prompt_in_view(ids), go_on)
    except LoadError as error:
        cache.abandon(error)
        return False
    finally:
        cache.end_turn()


def _feed(cache: AttentionStoreCache, shown: np.ndarray, go_on: Callable[[], bool]) -> bool:
    device = device_of(cache.model)
    position = cache.get_seq_length()
    while position < len(shown):
        if not go_on():
            return False
        chunk = torch.from_numpy(shown[None, position : position + CHUNK].copy()).to(device)
        feed(cache.model, cache, chunk)
        if not cache.is_of_its_model():
            cache.drop_turn("the model was changed while it computed in the background")
        if cache.unidentified:
            return False
        position += chunk.shape[1]
    return True
