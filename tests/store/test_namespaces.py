"""One open store seen from several namespaces: nothing of one is in the other, and the caps hold for both together."""

import gc
from pathlib import Path

import pytest
import torch
from support.tiny_models import make_model
from support.turns import follow_up, tokens, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, SessionNameError, SessionNotFoundError, StoreClosedError


def test_equal_conversations_in_two_namespaces_of_one_store_share_nothing(store: AttentionStore) -> None:
    model, other = make_model(), make_model()
    ann, bob = store.in_namespace("ann"), store.in_namespace("bob")
    sequence = turn(model, tokens(70), AttentionStoreCache(model, "talk", ann)).sequences
    cache = AttentionStoreCache(model, "talk", bob)
    turn(model, tokens(70), cache)
    assert (cache.reused_tokens, cache.prefilled_tokens) == (0, 70)

    prompt = follow_up(sequence, 5, 1)
    cache = AttentionStoreCache(model, "talk", ann)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
    assert (cache.reused_tokens, cache.prefilled_tokens) == (sequence.shape[1] - 1, 6)

    assert [info.name for info in ann.sessions()] == [info.name for info in bob.sessions()] == ["talk"]
    assert store.sessions() == []
    bob.delete("talk")
    with pytest.raises(SessionNotFoundError):
        bob.session("talk")
    assert ann.session("talk").tokens > 70
    with pytest.raises(SessionNotFoundError):
        store.metadata("talk")


def test_a_session_that_is_about_to_be_committed_is_not_seen_from_another_namespace(store: AttentionStore) -> None:
    model = make_model()
    ann, bob = store.in_namespace("ann"), store.in_namespace("bob")
    computing = object()
    store.begin_computing(computing)  # so that the writer stands back, and the commit waits
    try:
        turn(model, tokens(40), AttentionStoreCache(model, "talk", ann))
        assert ann.session_fingerprint("talk") is not None
        assert ann.latest_manifest("talk") is not None
        assert bob.session_fingerprint("talk") is None
        assert bob.latest_manifest("talk") is None
    finally:
        store.end_computing(computing)


def test_the_memory_cap_holds_for_all_namespaces_together(tmp_path: Path) -> None:
    model = make_model()
    with AttentionStore(tmp_path, memory="64KiB", block_size=16) as store:
        views = [store.in_namespace(f"user {number}") for number in range(4)]
        for number, view in enumerate(views):
            turn(model, tokens(100, seed=number), AttentionStoreCache(model, "talk", view))
            assert view.stats()["memory_bytes"] <= 64 * 1024
        store.flush()
        used = {view.stats()["memory_bytes"] for view in [store, *views]}
        assert len(used) == 1
        assert store.stats()["evicted_from_memory"] == views[0].stats()["evicted_from_memory"] > 0
        assert store.stats()["sessions"] == 4


def test_the_same_namespace_is_the_same_object_and_closing_closes_all(tmp_path: Path) -> None:
    store = AttentionStore(tmp_path, block_size=16, namespace="first")
    view = store.in_namespace("second")
    assert store.in_namespace("second") is view
    assert view.in_namespace("first") is store
    assert view.in_namespace("").namespace == ""
    with pytest.raises(SessionNameError):
        store.in_namespace("x" * 5000)
    view.set_metadata("talk", {"title": "kept"})
    view.close()
    assert store.closed
    with pytest.raises(StoreClosedError):
        store.in_namespace("third")
    with AttentionStore(tmp_path, namespace="second") as again:
        assert again.metadata("talk") == {"title": "kept"}


def test_a_view_outlives_the_object_that_it_was_made_of(tmp_path: Path) -> None:
    view = AttentionStore(tmp_path, block_size=16).in_namespace("second")
    gc.collect()
    view.set_metadata("talk", {"title": "kept"})
    assert view.metadata("talk") == {"title": "kept"}
    view.close()


def test_the_device_tier_keeps_namespaces_apart(tmp_path: Path) -> None:
    model = make_model()
    with AttentionStore(tmp_path, block_size=16, on_device="1GiB") as store:
        ann, bob = store.in_namespace("ann"), store.in_namespace("bob")
        for seed, session in enumerate(("talk", None)):
            turn(model, tokens(70, seed=seed), AttentionStoreCache(model, session, ann))
            cache = AttentionStoreCache(model, session, bob)
            turn(model, tokens(70, seed=seed), cache)
            assert (cache.reused_tokens, cache.prefilled_tokens) == (0, 70)
        assert store.stats()["device_sessions"] == 4
        ann.rename("talk", "other")
        bob.delete("talk")
        assert store.stats()["device_sessions"] == 3
        cache = AttentionStoreCache(model, "other", ann)
        sequence = turn(model, tokens(70, seed=0), cache).sequences
        assert (cache.reused_tokens, cache.stats.loaded_bytes) == (69, 0)
        assert torch.equal(sequence, turn(make_model(), tokens(70, seed=0), None).sequences)


def test_what_is_expected_in_several_namespaces_is_fetched_for_all_of_them(tmp_path: Path) -> None:
    model = make_model()
    with AttentionStore(tmp_path, block_size=16) as store:
        ann, bob = store.in_namespace("ann"), store.in_namespace("bob")
        for view, seed in ((ann, 0), (bob, 1)):
            turn(model, tokens(100, seed=seed), AttentionStoreCache(model, "talk", view))
            turn(model, tokens(100, seed=seed + 2), AttentionStoreCache(model, "other", view))
        store.drop_memory()
        assert ann.residence("talk")["memory"] == bob.residence("talk")["memory"] == 0
        ann.expect("talk")
        bob.schedule(["other"])
        bob.expect("talk")
        assert (list(ann.upcoming), list(bob.upcoming), list(store.upcoming)) == (["talk"], ["other", "talk"], [])
        store._fetcher.drain()
        for view, name in ((ann, "talk"), (bob, "talk"), (bob, "other")):
            assert view.residence(name)["memory"] > 0
        assert ann.residence("other")["memory"] == 0
        bob.schedule([])
        assert list(bob.upcoming) == ["talk"]
        turn(model, tokens(100), AttentionStoreCache(model, "talk", ann))
        assert (list(ann.upcoming), list(bob.upcoming)) == ([], ["talk"])
