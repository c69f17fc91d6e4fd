"""What the page cache has is read before the consumer computes, by all threads that can help."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import store_blocks
from support.store_blocks import on_disk_only, stages_of

from hf_attnstore import AttentionStore
from hf_attnstore.errors import LoadError
from hf_attnstore.lab.bench.slow_disk import SlowDisk
from hf_attnstore.store.blocks.block import Block
from hf_attnstore.store.blocks.stored import StoredBlock
from hf_attnstore.store.disk.surroundings import Surroundings
from hf_attnstore.store.processes.threads import IOThreads
from hf_attnstore.store.transfer import load as transfer
from hf_attnstore.store.transfer.load import Load
from hf_attnstore.store.transfer.stages import Stage

LONG = 30.0
HELPERS = 2


@pytest.fixture
def disk() -> SlowDisk:
    return SlowDisk()


@pytest.fixture
def store(tmp_path: Path, disk: SlowDisk) -> Iterator[AttentionStore]:
    """With as many I/O threads as are to help, however few cores there are."""
    given = Surroundings(disk=disk)
    with AttentionStore(tmp_path / "store", block_size=16, io_threads=HELPERS, surroundings=given) as opened:
        yield opened


@pytest.fixture
def chain(store: AttentionStore, at_once: None) -> list[Block]:
    """Five blocks, on disk only."""
    return on_disk_only(store, list(range(19)), 4)


def in_place(stages: list[Stage], chain: list[Block]) -> bool:
    return all(
        torch.equal(target, torch.cat([block.tensors[name] for block in chain], dim=1))
        for stage in stages
        for name, target in stage.targets.items()
    )


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Who reads what, and what is to happen before: "here" in the thread of the test, "there" in one that helps."""
    here, read = threading.current_thread(), StoredBlock.read
    happening: dict[str, Any] = {"threads": [], "here": lambda: None, "there": lambda: None}

    def watched(self: StoredBlock, wanted: Any) -> int:
        where = "here" if threading.current_thread() is here else "there"
        happening["threads"].append(where)
        before: Callable[[], object] = happening[where]
        before()
        return read(self, wanted)

    monkeypatch.setattr(StoredBlock, "read", watched)
    return happening


def test_all_that_can_help_read_and_everything_is_there(
    store: AttentionStore, chain: list[Block], reading: dict[str, Any]
) -> None:
    together = threading.Barrier(1 + HELPERS)
    once = threading.local()

    def meet() -> None:
        if not hasattr(once, "met"):
            once.met = True
            together.wait(LONG)  # not before all have come

    reading["here"] = reading["there"] = meet
    stages = stages_of(chain)
    running = store.load(stages)
    try:
        assert running.preload() > 0
        assert in_place(stages, chain)
        assert len(reading["threads"]) == len(chain) * store_blocks.LAYERS
        nbytes = sum(stage.nbytes for stage in stages)
        assert running.stats.bytes == running.stats.bytes_from["disk"] == nbytes
        assert running.stats.blocks_from == {"disk": len(chain)}
        assert 0 < running.stats.seconds == pytest.approx(running.stats.seconds_from["disk"])
        for target in stages[0].targets.values():
            target += 1  # it is the consumer's now
        for number in range(store_blocks.LAYERS):
            running.wait(number)
        assert len(reading["threads"]) == len(chain) * store_blocks.LAYERS
        assert running.stats.bytes == nbytes
        assert not in_place(stages, chain)
    finally:
        running.finish()


def test_what_memory_has_is_put_in_place_with_the_rest(
    store: AttentionStore, chain: list[Block], reading: dict[str, Any]
) -> None:
    store.promote([block.meta.key for block in chain[1:3]])
    store.flush()
    assert store.stats()["memory_blocks"] == 2
    reading["threads"].clear()
    stages = stages_of(chain)
    running = store.load(stages)
    try:
        assert running.preload() > 0
        assert in_place(stages, chain)
        assert len(reading["threads"]) == 3 * store_blocks.LAYERS
        assert running.stats.blocks_from == {"memory": 2, "disk": 3}
        token_bytes = sum(stage.token_bytes for stage in stages)
        assert running.stats.bytes_from == {"memory": 8 * token_bytes, "disk": 11 * token_bytes}
    finally:
        running.finish()


def test_threads_that_have_no_time_are_not_waited_for(
    store: AttentionStore, chain: list[Block], reading: dict[str, Any]
) -> None:
    busy = threading.Event()
    for _ in range(store._readers.count):
        store._readers.submit(lambda: busy.wait(LONG) and None)
    stages = stages_of(chain)
    running = store.load(stages)
    try:
        assert running.preload() > 0
        assert in_place(stages, chain)
        assert set(reading["threads"]) == {"here"}
        assert not busy.is_set()
    finally:
        busy.set()
        running.finish()


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_damaged_block_ends_it_whoever_finds_it(
    where: str, store: AttentionStore, chain: list[Block], reading: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in store.path.glob("blocks/*/*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first byte of the first layer
        path.write_bytes(bytes(data))
    found = threading.Event()
    reject = store._reject
    monkeypatch.setattr(store, "_reject", lambda *failed: (reject(*failed), found.set()))
    reading["there" if where == "here" else "here"] = lambda: found.wait(LONG)  # the other one is not the first
    running = store.load(stages_of(chain))
    try:
        with pytest.raises(LoadError, match="checksum"):
            running.preload()
        with pytest.raises(LoadError, match="checksum"):
            running.wait(0)
        assert where in reading["threads"]
        assert len(reading["threads"]) <= 1 + HELPERS, "nobody begins with another one"
    finally:
        running.finish()
    store.flush()
    aside = [path.name for path in (store.path / "quarantine").iterdir()]
    assert len(aside) == store.stats()["rejected"] > 0
    assert set(aside) <= {f"{block.meta.key.hex()}.safetensors" for block in chain}


def test_an_interrupt_leaves_nobody_reading(store: AttentionStore, chain: list[Block], reading: dict[str, Any]) -> None:
    helping, interrupted = threading.Event(), threading.Event()

    def interrupt() -> None:
        assert helping.wait(LONG)
        threading.Timer(0.2, interrupted.set).start()  # not before this thread has let go of the rest
        raise KeyboardInterrupt

    def help_out() -> None:
        helping.set()
        assert interrupted.wait(LONG)

    reading["here"], reading["there"] = interrupt, help_out
    stages = stages_of(chain)
    running = store.load(stages)
    with pytest.raises(KeyboardInterrupt):
        running.preload()
    read = len(reading["threads"])
    running.finish()
    store._readers.close()
    assert len(reading["threads"]) == read <= 1 + HELPERS  # what somebody was at, and nothing more


@pytest.mark.parametrize("why", ["not in the page cache", "little", "a slow disk", "for I/O threads", "in memory"])
def test_it_is_left_to_the_stages_where_it_brings_nothing(
    why: str,
    store: AttentionStore,
    disk: SlowDisk,
    chain: list[Block],
    reading: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = stages_of(chain)
    if why == "in memory":
        store.promote([block.meta.key for block in chain])
        store.flush()
    elif why == "a slow disk":
        monkeypatch.undo()
        monkeypatch.setattr(transfer, "WORTH_SHARING", 1)
        disk.bytes_per_second = 1e12
    reading["threads"].clear()
    running = store.load(stages)
    try:
        if why == "not in the page cache":
            monkeypatch.setattr(
                StoredBlock, "in_page_cache", property(lambda self: chain[1].meta.key.hex() not in self.path)
            )
        elif why == "little":
            monkeypatch.setattr(transfer, "WORTH_SHARING", 1 << 20)
        elif why == "for I/O threads":
            running.use_threads()
        assert running.preload() == 0
        assert not reading["threads"]
        assert not any(target.any() for stage in stages for target in stage.targets.values())
        for number in range(store_blocks.LAYERS):
            running.wait(number)
        assert in_place(stages, chain)
    finally:
        running.finish()


def test_work_is_shared_among_those_who_are_free() -> None:
    threads = IOThreads(2, "test")
    try:
        numbers, done = iter(range(1000)), []
        threads.share(lambda: done.extend(iter(lambda: next(numbers, None), None)), helpers=5)
        assert sorted(done) == list(range(1000))
        alone = []
        threads.share(lambda: alone.append(threading.current_thread()), helpers=0)
        assert alone == [threading.current_thread()]
    finally:
        threads.close()
    late: list[int] = []
    threads.share(lambda: late.append(1), helpers=2)  # no thread is left: whoever asks does it
    assert late


def test_a_load_is_preloaded_once(store: AttentionStore, chain: list[Block]) -> None:
    running: Load = store.load(stages_of(chain))
    try:
        running.preload()
        running.request(store_blocks.LAYERS)  # asks for nothing that is there
        assert running.wait(1) < LONG
    finally:
        running.finish()
