"""Two stores in different folders, as on two machines, with one shared tier below: a real Valkey on the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.engines import Valkey
from support.tiny_models import BLOCK, make_model, tokens
from support.turns import Reference, assert_reused, assert_same, expected_load, follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.errors import EncryptionKeyError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.kill()


@pytest.fixture
def url(server: Valkey) -> str:
    server.ask("FLUSHALL")
    return server.url


def machine(folder: Path, url: str, **settings: object) -> AttentionStore:
    return AttentionStore(folder, block_size=BLOCK, shared=url, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "deepseek-v3"])
def test_a_conversation_that_moves_between_machines_every_turn_computes_only_what_is_new(
    family: str, tmp_path: Path, url: str
) -> None:
    model, reference = make_model(family), Reference(make_model(family))
    prompt, held = tokens(70), 0
    with machine(tmp_path / "one", url) as one, machine(tmp_path / "two", url) as two:
        for number in range(4):
            store = (one, two)[number % 2]
            cache = AttentionStoreCache(model, "alice", store)
            ours, theirs = turn(model, prompt, cache), reference.turn(prompt)
            assert_same(ours, theirs)
            assert_reused(cache, prompt, held)
            if number == 1:
                assert cache.stats.loaded_bytes == expected_load(cache, reference.cache, held)
                assert cache.stats.blocks_from == {"shared": -(-held // BLOCK)} or family == "gemma3"
            store.flush()
            held = prompt.shape[1] + 5
            prompt = follow_up(ours.sequences, 20, number)


def converse(folder: Path, url: str, **settings: object) -> torch.Tensor:
    """A first turn of 70 tokens on some machine. Returns the prompt of the next one."""
    model = make_model()
    with machine(folder, url, **settings) as store:
        ours = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
    return follow_up(ours, 20, 2)


def assert_goes_on(store: AttentionStore, prompt: torch.Tensor, held: int) -> AttentionStoreCache:
    """The second turn reuses so many tokens, and is what a kept DynamicCache with them makes of it."""
    model, reference = make_model(), Reference(make_model())
    if held:
        reference.turn(tokens(70))
        reference.cache.crop(held - 75)
    cache = AttentionStoreCache(model, "alice", store)
    assert_same(turn(model, prompt, cache), reference.turn(prompt))
    assert_reused(cache, prompt, held)
    assert cache.stats.loaded_bytes == held * 384
    return cache


def test_what_memory_has_no_room_for_comes_layer_by_layer(tmp_path: Path, url: str) -> None:
    prompt = converse(tmp_path / "one", url)
    with machine(tmp_path / "two", url, memory=BLOCK * 384 + 100) as store:
        assert_goes_on(store, prompt, 75)


def test_a_store_may_have_no_disk(tmp_path: Path, url: str) -> None:
    prompt = converse(tmp_path / "one", url, disk=0)
    with machine(tmp_path / "two", url, disk=0) as store:
        assert assert_goes_on(store, prompt, 75).stats.blocks_from == {"shared": 5}


def test_what_came_is_kept_in_memory_and_on_disk(tmp_path: Path, url: str, server: Valkey) -> None:
    prompt, model, reference = converse(tmp_path / "one", url), make_model(), Reference(make_model())
    with machine(tmp_path / "two", url) as store:
        assert_goes_on(store, prompt, 75)
        server.ask("FLUSHALL")
    reference.turn(tokens(70))
    prompt = follow_up(reference.turn(prompt).sequences, 20, 3)
    with machine(tmp_path / "two", url) as store:
        cache = AttentionStoreCache(model, "alice", store)
        assert_same(turn(model, prompt, cache), reference.turn(prompt))
        assert_reused(cache, prompt, 101)
        assert cache.stats.blocks_from == {"disk": 7}


def test_without_a_shared_tier_nothing_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("ATTNSTORE_SHARED", url)
    with AttentionStore(tmp_path / "one", shared="") as store:
        assert store._shared is None
    with AttentionStore(tmp_path / "one") as store:
        assert str(store._shared.url) == url


@pytest.mark.parametrize("keys", ["one key", "two keys"])
def test_encrypted_stores_of_one_key_share_and_those_of_others_do_not(
    keys: str, tmp_path: Path, url: str, server: Valkey
) -> None:
    prompt = converse(tmp_path / "one", url, encryption_key=b"k" * 32)
    other = b"k" * 32 if keys == "one key" else b"o" * 32
    with machine(tmp_path / "two", url, encryption_key=other) as store:
        assert_goes_on(store, prompt, 75 if keys == "one key" else 0)
    ids = tokens(70)[0, :BLOCK].numpy()
    for name in server.keys("*"):
        value = server.ask("GET" if ":b:" in name else "HGETALL", name)
        assert ids.tobytes() not in value
        assert ids.astype(">u4").tobytes() not in value


def test_an_encrypted_store_made_without_the_shared_tier_says_that_it_cannot_share(tmp_path: Path, url: str) -> None:
    AttentionStore(tmp_path, encryption_key=b"k" * 32).close()
    with pytest.raises(EncryptionKeyError, match="choose another folder"):
        AttentionStore(tmp_path, encryption_key=b"k" * 32, shared=url)


def test_namespaces_do_not_meet(tmp_path: Path, url: str) -> None:
    prompt = converse(tmp_path / "one", url, namespace="ann")
    with machine(tmp_path / "two", url, namespace="bob") as store:
        assert_goes_on(store, prompt, 0)
        assert_goes_on(store.in_namespace("ann"), prompt, 75)


def test_a_deleted_session_leaves_what_others_may_use_unless_it_is_deleted_securely(
    tmp_path: Path, url: str, server: Valkey
) -> None:
    prompt = converse(tmp_path / "one", url)
    with machine(tmp_path / "one", url) as store:
        store.delete("alice")
        store.flush()
        assert len(server.keys("attnstore:b:*")) == 5
    with machine(tmp_path / "two", url) as store:
        assert_goes_on(store, prompt, 75)
        store.flush()
        store.delete("alice", secure=True)
        assert server.keys("*") == []


def test_what_did_not_go_up_while_the_engine_was_away_goes_up_with_the_next_turn(tmp_path: Path) -> None:
    server, model = Valkey(tmp_path), make_model()
    try:
        server.kill()
        prompt = converse(tmp_path / "one", server.url)
        server.start()
        with machine(tmp_path / "one", server.url) as store:
            store.drop_memory()
            second = turn(model, prompt, AttentionStoreCache(model, "alice", store)).sequences
        prompt = follow_up(second, 9, 3)
        with machine(tmp_path / "two", server.url) as store:
            cache = AttentionStoreCache(model, "alice", store)
            assert torch.equal(turn(model, prompt, cache).sequences, turn(make_model(), prompt, None).sequences)
            assert_reused(cache, prompt, 101)
            assert cache.stats.blocks_from == {"shared": 7}
    finally:
        server.kill()
