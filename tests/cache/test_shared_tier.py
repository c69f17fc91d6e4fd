"""Two stores in different folders, as on two machines, with one shared tier below: a real Valkey on the loopback."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import tiny_model, tiny_tokenizer
from support.engines import Valkey, empty_server
from support.faulty import Fault, FaultyProxy
from support.tiny_models import BLOCK, make_model, tokens
from support.turns import Reference, assert_reused, assert_same, expected_load, follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, ChatSession
from hf_attnstore.errors import EncryptionKeyError
from hf_attnstore.store.shared import tier


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """Of a server with nothing in it; a parameter is the fixture that has it."""
    return empty_server(request)


@pytest.fixture(autouse=True)
def blocks_are_larger_than_what_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier, "HEAD", 1000)


def machine(folder: Path, url: str, **settings: object) -> AttentionStore:
    return AttentionStore(folder, block_size=BLOCK, shared=url, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "url"),
    [("llama-gqa", "server"), ("llama-gqa", "seaweed"), ("gemma3", "server"), ("deepseek-v3", "server")],
    indirect=["url"],
)
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


@pytest.mark.parametrize("url", ["server", "seaweed"], indirect=True)
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
        assert server.keys("attnstore:b:*") == server.keys("attnstore:f:*") == []


def test_what_did_not_go_up_while_the_engine_was_away_goes_up_with_the_next_turn(tmp_path: Path) -> None:
    server, model = Valkey(tmp_path), make_model()
    try:
        server.kill()
        prompt = converse(tmp_path / "one", server.patient_url)
        server.start()
        with machine(tmp_path / "one", server.patient_url) as store:
            store.drop_memory()
            second = turn(model, prompt, AttentionStoreCache(model, "alice", store)).sequences
        prompt = follow_up(second, 9, 3)
        with machine(tmp_path / "two", server.patient_url) as store:
            cache = AttentionStoreCache(model, "alice", store)
            assert torch.equal(turn(model, prompt, cache).sequences, turn(make_model(), prompt, None).sequences)
            assert_reused(cache, prompt, 101)
            assert cache.stats.blocks_from == {"shared": 7}
    finally:
        server.kill()


@pytest.mark.parametrize("what", ["gone", "cut", "longer", "flipped", "another's", "no block"])
def test_a_value_that_is_not_the_block_it_should_be_is_computed_again_and_put_right(
    what: str, tmp_path: Path, url: str, server: Valkey, log: pytest.LogCaptureFixture
) -> None:
    prompt = converse(tmp_path / "one", url)
    with machine(tmp_path / "one", url) as store:
        keys = [span.block for span in store.manifest("alice").spans]
    name, other = (f"attnstore:b:{key.hex()}" for key in keys[2:4])
    size = int(server.ask("STRLEN", name)[1:])
    if what == "gone":
        server.ask("DEL", name)
    elif what == "another's":
        server.ask("COPY", other, name, "REPLACE")
    elif what == "no block":
        server.ask("SET", name, "x" * size)
    elif what == "longer":
        server.ask("APPEND", name, "x")
    elif what == "cut":
        server.ask("SET", name, server.value(name)[:-1])
    else:
        byte = server.value(name)[size // 2]
        server.ask("SETRANGE", name, str(size // 2), bytes([byte ^ 1]))
    with machine(tmp_path / "two", url) as store:
        cache = assert_goes_on(store, prompt, 2 * BLOCK)
        assert cache.stats.blocks_from["memory" if what == "flipped" else "shared"] == 2
    assert len([r for r in log.records if "can't be used" in r.getMessage()]) == (what != "gone")
    with machine(tmp_path / "three", url) as store:
        cache = AttentionStoreCache(make_model(), "alice", store)
        assert cache.match(prompt) == 95  # all but the last token


def test_an_engine_that_stops_in_the_middle_costs_the_deadline_once_and_nothing_else(
    tmp_path: Path, server: Valkey, url: str, log: pytest.LogCaptureFixture
) -> None:
    prompt = converse(tmp_path / "one", url)
    proxy = FaultyProxy(server.port)
    try:
        with machine(tmp_path / "two", f"{proxy.url}?timeout=0.3&lookup=30") as store:
            asked: list[int] = []
            store._shared.engine.edges = counted(store._shared.engine.edges, asked)
            proxy.set(Fault("stop", after=14_000))
            assert_goes_on(store, prompt, 0)
            assert len(asked) == 2  # what the first block consists of, and all of them; not again in that turn
            assert not store._shared.breaker.well
            proxy.set(Fault("none"))
            until = time.monotonic() + 60
            while not store._shared.breaker.well:
                assert time.monotonic() < until
                time.sleep(0.02)
            assert AttentionStoreCache(make_model(), "alice", store).match(prompt) == 95
        assert len([record for record in log.records if "does not answer" in record.getMessage()]) == 1
    finally:
        proxy.close()


def counted(ask: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def asks(*arguments: Any) -> Any:
        calls.append(1)
        return ask(*arguments)

    return asks


@pytest.mark.parametrize("phase", ["before the turn", "while it loads", "while it saves"])
def test_an_engine_that_is_killed_takes_no_token_with_it(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Valkey(tmp_path)
    try:
        prompt = converse(tmp_path / "one", server.patient_url)
        with machine(tmp_path / "two", server.patient_url) as store:
            engine = store._shared.engine
            if phase == "before the turn":
                assert store.known([b"x" * 32]) == 0  # connected
                server.kill()
            else:
                name = "open_stream" if phase == "while it loads" else "put"
                monkeypatch.setattr(engine, name, first(server.kill, getattr(engine, name)))
            assert_goes_on(store, prompt, 75 if phase == "while it saves" else 0)
            store.flush()
        with machine(tmp_path / "two", server.patient_url) as store:
            assert AttentionStoreCache(make_model(), "alice", store).match(prompt) == 95
    finally:
        server.kill()


def first(happens: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any) -> Any:
        happens()
        return then(*arguments)

    return both


def test_a_full_engine_that_evicts_nothing_refuses_and_the_local_store_goes_on(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    server = Valkey(tmp_path, "--maxmemory-policy", "noeviction")
    try:
        server.ask("SET", "taken", "x" * 1_500_000)
        server.ask("CONFIG", "SET", "maxmemory", "1mb")
        prompt = converse(tmp_path / "one", server.patient_url)
        with machine(tmp_path / "one", server.patient_url) as store:
            assert_goes_on(store, prompt, 75)
            store.flush()
            assert store.stats()["shared_refused_blocks"] > 1
            assert store.stats()["shared_errors"] == 0
        assert server.keys("attnstore:b:*") == []
        assert len([record for record in log.records if "has no room" in record.getMessage()]) == 2  # in two processes
    finally:
        server.kill()


def test_a_turn_marks_what_it_used_though_all_of_it_was_in_memory(tmp_path: Path, url: str, server: Valkey) -> None:
    model = make_model()
    with machine(tmp_path, f"{url}&ttl=1000") as store:
        prompt = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
        store.flush()
        names = [f"attnstore:b:{span.block.hex()}" for span in store.manifest("alice").spans]
        for name in names:
            server.ask("EXPIRE", name, "60")
        turn(model, follow_up(prompt, 20, 2), AttentionStoreCache(model, "alice", store))
        store.flush()
        assert all(int(server.ask("TTL", name)[1:]) > 900 for name in names[:4])
        assert store.stats()["shared_used"] > 1e6


def test_what_waits_to_go_up_is_bounded_and_the_oldest_is_left_out(tmp_path: Path) -> None:
    model = make_model()
    with machine(tmp_path, "valkey://127.0.0.1:1?queue=20KiB") as store:  # nobody is there
        turn(model, tokens(200), AttentionStoreCache(model, "alice", store))
        store.flush()
        assert store._shared._uploads.nbytes <= 20 << 10
        assert store.stats()["shared_dropped_blocks"] == 13 - 3


def test_a_chat_goes_on_on_another_machine_as_if_it_had_stayed(tmp_path: Path, url: str) -> None:
    tokenizer, greedy = tiny_tokenizer(), {"max_new_tokens": 8, "do_sample": False}
    model = tiny_model(tokenizer)
    said = ["the old prince said nothing", "then the other officer answered", "and the mother rose"]
    with machine(tmp_path / "stays", "") as store:
        chat = ChatSession(model, tokenizer, store, "alice")
        stayed = [(chat.send(text, **greedy), chat.stats.reused_tokens) for text in said]
    with machine(tmp_path / "one", url) as one, machine(tmp_path / "two", url) as two:
        for number, text in enumerate(said):
            store = (one, two)[number % 2]
            chat = ChatSession(model, tokenizer, store, "alice")
            assert (chat.send(text, **greedy), chat.stats.reused_tokens) == stayed[number]
            assert [message["content"] for message in chat.history[::2]] == said[: number + 1]
    assert stayed[2][1] > 30
