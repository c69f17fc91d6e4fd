"""Several turns at once: threads, sessions, locks, a slow disk, a small memory, and stores closed in between."""

from __future__ import annotations

import copy
import gc
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import fresh
from support.tiny_models import BLOCK, make_model, tokens
from support.turns import assert_reused, follow_up, turn
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from hf_attnstore import AttentionStore, AttentionStoreCache, SessionBusyError, StoreClosedError, attach, detach
from hf_attnstore.cache.hooks import Attachment
from hf_attnstore.lab.bench.slow_disk import SlowDisk
from hf_attnstore.store.blocks.stored import StoredBlock
from hf_attnstore.store.disk.surroundings import Surroundings


class Holds(BaseStreamer):
    """Holds a generate up at a token until it is let go."""

    def __init__(self, at: int = 1) -> None:
        self.at, self.count = at, 0
        self.reached, self.go_on = threading.Event(), threading.Event()

    def put(self, value: torch.Tensor) -> None:
        if self.count == self.at:
            self.reached.set()
            assert self.go_on.wait(60)
        self.count += 1

    def end(self) -> None: ...


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_two_threads_with_one_model_and_two_sessions_do_not_meet(family: str, store: AttentionStore) -> None:
    model, plain = make_model(family), make_model(family)

    def talk(name: str, run: Callable[[torch.Tensor, int], torch.Tensor]) -> list[torch.Tensor]:
        sequence, heard = tokens(0), []
        for number in range(6):
            prompt = follow_up(sequence, 11 + 5 * (number % 3), seed=100 * ord(name) + number)
            sequence = run(prompt, number)
            heard.append(sequence)
        return heard

    def with_store(name: str) -> list[torch.Tensor]:
        def run(prompt: torch.Tensor, number: int) -> torch.Tensor:
            cache = AttentionStoreCache(model, name, store)
            sequence = turn(model, prompt, cache).sequences
            assert cache.prefilled_tokens == 11 + 5 * (number % 3) + bool(number)
            return sequence

        return talk(name, run)

    alone = {name: talk(name, lambda prompt, _: turn(plain, prompt, None).sequences) for name in "abcd"}
    with ThreadPoolExecutor(4) as pool:
        together = dict(zip("abcd", pool.map(with_store, "abcd"), strict=True))
    for name in "abcd":
        assert all(torch.equal(a, b) for a, b in zip(alone[name], together[name], strict=True))
        assert store.tokens(name) == alone[name][-1][0, :-1].tolist()


def test_threads_that_attach_at_once_attach_once(store: AttentionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    install = Attachment._install

    def slowly(self: Attachment, *arguments: Any) -> None:
        time.sleep(0.02)
        install(self, *arguments)

    monkeypatch.setattr(Attachment, "_install", slowly)
    for _ in range(3):
        model = make_model()
        barrier = threading.Barrier(4)

        def make(name: str, model: Any = model, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            AttentionStoreCache(model, name, store)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make, "abcd"))
        assert len(model._forward_pre_hooks) == 1
        detach(model)
        assert not model._forward_pre_hooks


def test_a_second_generate_on_a_session_fails_at_once(store: AttentionStore) -> None:
    model = make_model()
    holds = Holds()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(turn, model, tokens(30), AttentionStoreCache(model, "alice", store), streamer=holds)
        assert holds.reached.wait(60)
        with pytest.raises(SessionBusyError, match="alice"):
            turn(model, tokens(20, 2), AttentionStoreCache(model, "alice", store))
        turn(model, tokens(20, 2), AttentionStoreCache(model, "bob", store))
        turn(model, tokens(20, 2), AttentionStoreCache(model, "alice", store, save=False))
        holds.go_on.set()
        sequence = first.result(60).sequences
    assert store.tokens("alice") == sequence[0, :-1].tolist()


def test_a_second_generate_on_a_session_waits_if_asked_to(store: AttentionStore) -> None:
    model = make_model()
    holds = Holds()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(turn, model, tokens(30), AttentionStoreCache(model, "alice", store), streamer=holds)
        assert holds.reached.wait(60)
        waiting = AttentionStoreCache(model, "alice", store, wait=60)
        second = pool.submit(turn, model, tokens(34), waiting)
        time.sleep(0.1)
        assert not second.done()
        holds.go_on.set()
        first.result(60)
        assert torch.equal(second.result(60).sequences, turn(make_model(), tokens(34), None).sequences)
    assert store.tokens("alice") == second.result().sequences[0, :-1].tolist()


def test_one_object_in_two_threads_is_refused_and_the_first_is_unharmed(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, store=store)
    holds = Holds()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(turn, model, tokens(30), cache, streamer=holds)
        assert holds.reached.wait(60)
        with pytest.raises(SessionBusyError, match="one object per thread"):
            turn(model, tokens(20, 2), cache)
        holds.go_on.set()
        assert torch.equal(first.result(60).sequences, turn(make_model(), tokens(30), None).sequences)


def test_a_generate_within_a_generate_on_the_same_object_is_refused(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)

    class Calls(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            with pytest.raises(SessionBusyError):
                turn(model, tokens(5, 3), cache)
            inner.append(turn(model, tokens(20, 3), AttentionStoreCache(model, "bob", store)).sequences)

        def end(self) -> None: ...

    inner: list[torch.Tensor] = []
    ours = turn(model, tokens(30), cache, streamer=Calls()).sequences
    assert torch.equal(ours, turn(make_model(), tokens(30), None).sequences)
    assert len(inner) == 7
    assert all(torch.equal(one, inner[0]) for one in inner)


def test_flush_from_other_threads_does_not_disturb_manual_loops(store: AttentionStore) -> None:
    model = make_model()
    stop = threading.Event()
    errors: list[BaseException] = []

    def flushes() -> None:
        while not stop.is_set():
            try:
                store.flush()
            except BaseException as error:
                errors.append(error)
                return

    thread = threading.Thread(target=flushes)
    thread.start()
    try:
        ids = tokens(240)
        cache, plain = AttentionStoreCache(model, "alice", store), DynamicCache(config=model.config)
        with torch.no_grad():
            for start in range(0, 240, 3):
                new = ids[:, start : start + 3]
                ours = model(input_ids=new, past_key_values=cache).logits
                assert torch.equal(ours, model(input_ids=new, past_key_values=plain).logits)
    finally:
        stop.set()
        thread.join()
    assert not errors
    store.flush()
    assert store.tokens("alice") == ids[0].tolist()
    assert_files_equal(store, "alice", plain)


def assert_files_equal(store: AttentionStore, session: str, reference: DynamicCache) -> None:
    """Every block file of the session has, bit for bit, the KV that a DynamicCache has for its tokens."""
    position = 0
    for span in store.manifest(session).spans:
        (path,) = store.path.glob(f"blocks/*/*/{span.block.hex()}.safetensors")
        held = load_file(path)
        count = span.stop - span.start
        for number, layer in enumerate(reference.layers):
            for name, whole in (("keys", layer.keys), ("values", layer.values)):
                stored = held[f"layers.{number}.{name}"][:, :count]
                assert torch.equal(stored, whole[0, :, position : position + count]), (number, name, position)
        position += count
    assert position == reference.get_seq_length()


SLOWLY = Surroundings(disk=SlowDisk(300_000))
"""A block takes about 0.03 s."""


@pytest.fixture
def slow_store(tmp_path: Path) -> Iterator[AttentionStore]:
    with AttentionStore(tmp_path / "store", block_size=BLOCK, surroundings=SLOWLY) as store:
        yield store


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek-v3"])
def test_what_is_saved_during_a_long_decode_is_what_was_computed(family: str, slow_store: AttentionStore) -> None:
    store = slow_store
    model, other = make_model(family), make_model(family)
    cache, plain = AttentionStoreCache(model, "alice", store), DynamicCache(config=other.config)
    ours = turn(model, tokens(30), cache, max_new_tokens=200)
    theirs = turn(other, tokens(30), plain, max_new_tokens=200)
    assert torch.equal(ours.sequences, theirs.sequences)
    store.flush()
    assert_files_equal(store, "alice", plain)


@pytest.mark.parametrize("seed", range(3))
def test_growing_and_cropping_while_blocks_are_written_corrupts_nothing(seed: int, slow_store: AttentionStore) -> None:
    store = slow_store
    model = make_model()
    chooses = random.Random(seed)
    cache, plain = AttentionStoreCache(model, "alice", store), DynamicCache(config=model.config)
    ids: list[int] = []
    with torch.no_grad():
        for step in range(60):
            if ids and chooses.random() < 0.25:
                remove = chooses.randint(0, min(len(ids) - 1, 40))
                cache.crop(-remove)
                plain.crop(-remove)
                del ids[len(ids) - remove :]
            new = tokens(chooses.choice([1, 1, 5, 17, 33]), seed=1000 * seed + step)
            assert torch.equal(
                model(input_ids=new, past_key_values=cache).logits, model(input_ids=new, past_key_values=plain).logits
            )
            ids += new[0].tolist()
            if chooses.random() < 0.1:
                cache.save()
    store.flush()
    assert store.tokens("alice") == ids
    assert_files_equal(store, "alice", plain)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_a_tiny_memory_cap_holds_and_everything_stays_right(family: str, tmp_path: Path) -> None:
    model, plain = make_model(family), make_model(family)
    cap = 40_000  # two or three blocks
    with AttentionStore(tmp_path / "store", memory=cap, block_size=BLOCK, surroundings=SLOWLY) as store:
        samples: list[float] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                samples.append(store.stats()["memory_bytes"])

        watcher = threading.Thread(target=watch)
        watcher.start()

        def talk(name: str) -> None:
            sequence = tokens(0)
            for number in range(3):
                prompt = follow_up(sequence, 60, seed=100 * ord(name) + number)
                cache = AttentionStoreCache(model, name, store)
                sequence = turn(model, prompt, cache, max_new_tokens=40).sequences
                assert torch.equal(sequence, turn(plain, prompt, None, max_new_tokens=40).sequences)
                assert cache.prefilled_tokens + cache.reused_tokens == prompt.shape[1]

        try:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(talk, "ab"))
        finally:
            stop.set()
            watcher.join()
        assert 0 < max(samples) <= cap
        store.drop_memory()
        assert store.stats()["memory_bytes"] == 0  # nothing stays reserved
        assert min(len(store.tokens(name)) for name in "ab") > 0


@pytest.mark.parametrize("memory", [1000, 0])
def test_a_memory_cap_below_one_block_saves_nothing_stays_right_and_says_so(
    tmp_path: Path, memory: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("gemma3")
    with AttentionStore(tmp_path / "store", memory=memory, block_size=BLOCK) as store:
        cache = AttentionStoreCache(model, "alice", store)
        sequence = turn(model, tokens(60), cache).sequences
        prompt = follow_up(sequence, 5, 2)
        ours = turn(model, prompt, cache).sequences
        assert torch.equal(ours, turn(make_model("gemma3"), prompt, None).sequences)
        assert_reused(cache, prompt, 65)
        assert store.stats()["memory_bytes"] == 0
        assert store.tokens("alice") == []
        assert store.stats()["not_saved_blocks"] > 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "it is not kept" in warning
    assert warning.endswith("give it more with memory=")


def test_a_store_of_the_device_alone_needs_no_memory_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    with AttentionStore(tmp_path / "store", memory=0, disk=0, on_device="64MiB", block_size=BLOCK) as store:
        sequence = turn(model, tokens(60), AttentionStoreCache(model, "alice", store)).sequences
        cache = AttentionStoreCache(model, "alice", store)
        turn(model, follow_up(sequence, 5, 2), cache)
        assert set(cache.stats.blocks_from) == {"device"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_memory_only_store_reuses_and_forgets(tmp_path: Path) -> None:
    model = make_model()
    with AttentionStore(tmp_path / "store", disk=0, block_size=BLOCK) as store:
        sequence = turn(model, tokens(60), AttentionStoreCache(model, "alice", store)).sequences
        prompt = follow_up(sequence, 5, 2)
        cache = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, prompt, cache).sequences, turn(make_model(), prompt, None).sequences)
        assert_reused(cache, prompt, 65)


def test_a_cache_of_a_closed_store_gives_a_clear_error_everywhere(tmp_path: Path) -> None:
    model = make_model()
    store = AttentionStore(tmp_path / "store", block_size=BLOCK)
    used, fresh = AttentionStoreCache(model, "alice", store), AttentionStoreCache(model, "bob", store)
    turn(model, tokens(30), used)
    store.close()
    for cache in (used, fresh):
        with pytest.raises(StoreClosedError):
            turn(model, tokens(40), cache)
        with pytest.raises(StoreClosedError), torch.no_grad():
            model(input_ids=tokens(3), past_key_values=cache)
        with pytest.raises(StoreClosedError):
            cache.match(tokens(40))
        cache.save()
    attach(model, store)
    with pytest.raises(StoreClosedError):
        model.generate(tokens(5), max_new_tokens=2)
    with AttentionStore(tmp_path / "store", block_size=BLOCK) as again:
        cache = AttentionStoreCache(model, "alice", again)
        turn(model, tokens(40), cache)
        assert cache.reused_tokens == 30


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_store_closed_in_the_middle_of_a_generate_lets_it_finish(
    at: int, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    store = AttentionStore(tmp_path / "store", block_size=BLOCK)
    sequence = turn(model, tokens(60), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    prompt = follow_up(sequence, 20, 2)
    cache = AttentionStoreCache(model, "alice", store)
    holds = Holds(at)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(turn, model, prompt, cache, streamer=holds, max_new_tokens=30)
        assert holds.reached.wait(60)
        store.close()
        holds.go_on.set()
        ours = running.result(60).sequences
    assert torch.equal(ours, turn(make_model(), prompt, None, max_new_tokens=30).sequences)
    assert_reused(cache, prompt, 65)
    assert "closed" in log.text
    with pytest.raises(StoreClosedError):
        turn(model, prompt, cache)


def test_a_store_closed_while_a_prefill_waits_for_its_layers_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    store = AttentionStore(tmp_path / "store", block_size=BLOCK, io_threads=1)
    sequence = turn(model, tokens(60), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    reading, go_on = threading.Event(), threading.Event()
    read = StoredBlock.read

    def held_up(self: StoredBlock, wanted: Any) -> int:
        reading.set()
        assert go_on.wait(60)
        return read(self, wanted)

    monkeypatch.setattr(StoredBlock, "read", held_up)
    prompt = follow_up(sequence, 20, 2)
    cache = AttentionStoreCache(model, "alice", store)
    cache._setup.attachment.pace.measured(1e-9, 1.0)  # read ahead as little as possible
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(turn, model, prompt, cache)
        assert reading.wait(60)
        closing = pool.submit(store.close)
        go_on.set()
        closing.result(60)
        assert torch.equal(running.result(60).sequences, turn(make_model(), prompt, None).sequences)


def test_a_dropped_cache_leaves_neither_a_lock_nor_reserved_memory(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)

    def fails(*_: Any) -> None:
        raise MemoryError("no memory")

    handle = model.model.layers[1].register_forward_hook(fails)
    with pytest.raises(MemoryError), torch.no_grad():
        model(input_ids=tokens(40), past_key_values=cache)
    handle.remove()
    assert store.stats()["memory_bytes"] > 0
    with pytest.raises(SessionBusyError):
        store.delete("alice")
    del cache
    gc.collect()
    assert store.stats()["memory_bytes"] == 0
    again = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, tokens(40), again).sequences, turn(make_model(), tokens(40), None).sequences)


def test_what_a_failed_forward_had_handed_over_is_not_mixed_with_the_next_one(store: AttentionStore) -> None:
    model = make_model()
    cache, plain = AttentionStoreCache(model, "alice", store), DynamicCache(config=model.config)

    def fails(*_: Any) -> None:
        raise MemoryError("no memory")

    with torch.no_grad():
        for past in (cache, plain):
            model(input_ids=tokens(20), past_key_values=past)
        handle = model.model.layers[1].register_forward_hook(fails)
        with pytest.raises(MemoryError):
            model(input_ids=tokens(40, 2), past_key_values=cache)
        handle.remove()
        for past in (cache, plain):
            model(input_ids=tokens(40, 3), past_key_values=past)
    store.flush()
    assert store.tokens("alice") == [*tokens(20)[0].tolist(), *tokens(40, 3)[0].tolist()]
    assert_files_equal(store, "alice", plain)


def test_a_manual_turn_left_by_an_exception_is_saved_by_flush_up_to_there(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)

    def fails(*_: Any) -> None:
        raise MemoryError("no memory")

    with torch.no_grad():
        model(input_ids=tokens(20), past_key_values=cache)
        handle = model.model.layers[1].register_forward_hook(fails)
        with pytest.raises(MemoryError):
            model(input_ids=tokens(20, 2), past_key_values=cache)
        handle.remove()
        store.flush()
        assert store.tokens("alice") == tokens(20)[0].tolist()
        ours = model(input_ids=tokens(20, 3), past_key_values=cache).logits
        theirs = model(input_ids=torch.cat([tokens(20), tokens(20, 3)], dim=1)).logits[:, 20:]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert cache.token_ids == [*tokens(20)[0].tolist(), *tokens(20, 3)[0].tolist()]


def test_a_copy_of_a_cache_in_mid_conversation_is_used_in_another_thread(store: AttentionStore) -> None:
    model = make_model("gemma3")
    cache = AttentionStoreCache(model, "alice", store)
    sequence = turn(model, tokens(40), cache).sequences
    twin = copy.deepcopy(cache)
    prompts = follow_up(sequence, 9, 2), follow_up(sequence, 30, 3)
    with ThreadPoolExecutor(2) as pool:
        ours = list(pool.map(lambda pair: turn(model, *pair).sequences, zip(prompts, (cache, twin), strict=True)))
    for prompt, sequence in zip(prompts, ours, strict=True):
        assert torch.equal(sequence, turn(make_model("gemma3"), prompt, None).sequences)
    assert_reused(cache, prompts[0], 45)
    assert_reused(twin, prompts[1], 45)
    assert store.tokens("alice") == ours[0][0, :-1].tolist()


def test_a_process_that_just_ends_keeps_its_last_turn(tmp_path: Path) -> None:
    script = """
import sys
from support.tiny_models import make_model, tokens
from support.turns import turn
from hf_attnstore import AttentionStore, AttentionStoreCache
model = make_model()
turn(model, tokens(70), AttentionStoreCache(model, "alice", AttentionStore(sys.argv[1], block_size=16)))
"""
    fresh.run([sys.executable, "-c", script, tmp_path / "store"], check=True)
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        assert len(store.tokens("alice")) == 75
