"""Bytes of several sessions: what they share is on disk once, and counted once."""

import pytest
from support.tiny_models import make_model
from support.turns import tokens, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, SessionNotFoundError


def test_blocks_that_sessions_share_are_counted_once(store: AttentionStore) -> None:
    model = make_model()
    prompt = tokens(70)
    for name in ("a", "b"):
        prompt[0, 65:] = 1 + len(name) + ord(name)  # four blocks of 16 in common, then an end of its own
        turn(model, prompt, AttentionStoreCache(model, name, store))
    store.flush()
    a, b = store.session("a"), store.session("b")
    sizes = sorted(path.stat().st_size for path in store.path.glob("blocks/**/*.safetensors"))
    together = store.bytes_together("a", "b")
    assert together == sum(sizes) < a.bytes + b.bytes
    assert a.bytes + b.bytes - together == sum(sorted(sizes)[-4:])  # the four full blocks
    assert store.bytes_together("a") == a.bytes
    assert store.bytes_together("a", "a") == a.bytes
    assert store.bytes_together() == together, "all of them"

    store.fork("a", "c")
    assert store.bytes_together("a", "b", "c") == together


def test_a_session_that_is_not_there_has_no_bytes(store: AttentionStore) -> None:
    with pytest.raises(SessionNotFoundError):
        store.bytes_together("nobody")
