"""Notes on models: kept as long as something in the store is of the model, and never without bound."""

from __future__ import annotations

import pytest
from support.store_blocks import FINGERPRINT, make_chain

from hf_attnstore import AttentionStore
from hf_attnstore.store.index import blocks as index


def names(store: AttentionStore) -> set[str]:
    store.flush()
    return {name for (name,) in store._disk.index.database.read("SELECT fingerprint FROM models")}


def other(number: int) -> str:
    return f"{number:040x}"


def test_garbage_collection_drops_notes_on_models_of_which_nothing_is_left(store: AttentionStore) -> None:
    for block in make_chain(list(range(16)), 16):
        store.put(block)
    mine = {FINGERPRINT, f"{FINGERPRINT}/continues", f"{FINGERPRINT}/costs/cpu"}
    for name in (*mine, other(1), f"{other(1)}/costs/cpu", "policy returns"):
        store.set_note(name, {"some": "thing"})
    store.flush()
    assert store.collect_garbage(dry_run=True).notes == 2
    assert names(store) >= {*mine, other(1), "policy returns"}
    assert store.collect_garbage().notes == 2
    assert names(store) == {*mine, "policy returns"}
    assert store.note(FINGERPRINT) == {"some": "thing"}


def test_notes_do_not_grow_without_bound(store: AttentionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_MANY_NOTES", 5)
    for block in make_chain(list(range(16)), 16):
        store.put(block)
    store.set_note(FINGERPRINT, {"some": "thing"})
    for number in range(20):
        store.set_note(other(number), {"some": "thing"})
    kept = names(store)
    assert len(kept) <= 6
    assert {FINGERPRINT, other(19)} <= kept
