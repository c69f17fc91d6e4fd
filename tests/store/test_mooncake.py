"""Mooncake Store as an engine of a shared tier: a real master and a machine with memory, on the loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ports import free_port
from support.store_blocks import load, make_chain, same, save

from hf_attnstore.store import AttentionStore
from hf_attnstore.store.shared.deadline import Deadline
from hf_attnstore.store.shared.engine import Edges, Engine, EngineError, Put, open_engine
from hf_attnstore.store.shared.url import SharedURL

pytest.importorskip(
    "mooncake.store", reason="needs mooncake-transfer-engine-non-cuda, libibverbs1", exc_type=ImportError
)

NODE = """import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert not store.setup("127.0.0.1", "P2PHANDSHAKE", 256 << 20, 16 << 20, "tcp", "", sys.argv[1])
print("ready", flush=True)
time.sleep(3600)
"""


class Mooncake:
    """A master, and a machine that gives memory."""

    def __init__(self, folder: Path) -> None:
        ports = [free_port(), free_port()]
        self.url = f"mooncake://127.0.0.1:{ports[0]}?staging=16MiB"
        master = Path(sys.executable).parent / "mooncake_master"
        at = ["-rpc_address", "127.0.0.1", "-rpc_port", str(ports[0]), "-metrics_port", str(ports[1])]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._master = subprocess.Popen([str(master), *at], **quiet)
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", ports[0]), 1).close()
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.05)
        command = [sys.executable, "-c", NODE, f"127.0.0.1:{ports[0]}"]
        self.node = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.node.stdout is not None
        while "ready" not in (line := self.node.stdout.readline()):
            assert line

    def kill(self) -> None:
        for process in (self.node, self._master):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def mooncake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mooncake]:
    started = Mooncake(tmp_path_factory.mktemp("mooncake"))
    yield started
    started.kill()


@pytest.fixture
def engine(mooncake: Mooncake) -> Iterator[Engine]:
    engine = open_engine(SharedURL(mooncake.url))
    yield engine
    engine.close()


def soon() -> Deadline:
    return Deadline(60)


def test_values_are_put_found_read_by_ranges_replaced_and_removed(engine: Engine) -> None:
    data = os.urandom(3 << 20)
    assert engine.put("a:1", [memoryview(data)[:1000], memoryview(data)[1000:]], soon()) is Put.STORED
    assert engine.sizes(["a:1", "a:2"], soon()) == [1, 0]
    found = engine.edges(["a:1", "a:2"], 100, 10, soon())
    assert found == [Edges(len(data), data[:100], data[-10:]), Edges(0, b"", b"")]
    stream = engine.open_stream(soon())
    for offset, nbytes in ((5, 1000), (1 << 20, 2 << 20), (len(data) - 3, 10)):
        stream.ask("a:1", offset, nbytes, soon())
        buffers = [bytearray(nbytes // 3), bytearray(nbytes - nbytes // 3)]
        there = data[offset : offset + nbytes]
        assert stream.take([memoryview(b) for b in buffers], soon()) == len(there)
        assert b"".join(buffers)[: len(there)] == there
    stream.ask("a:2", 0, 10, soon())
    assert stream.take([memoryview(bytearray(10))], soon()) == 0
    assert engine.put("a:1", [memoryview(b"another")], soon()) is Put.STORED
    assert engine.edges(["a:1"], 100, 3, soon()) == [Edges(7, b"another", b"her")]
    assert engine.put("large", [memoryview(bytes(17 << 20))], soon()) is Put.FULL
    engine.delete(["a:1", "a:2"], soon())
    assert engine.sizes(["a:1"], soon()) == [0]


def test_blocks_are_shared_and_names_are_not_which_is_said(
    mooncake: Mooncake, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    chain, url = make_chain(list(range(100)), 16), f"{mooncake.url}&timeout=60&lookup=60"
    with (
        AttentionStore(tmp_path / "one", block_size=16, shared=url) as one,
        AttentionStore(tmp_path / "two", block_size=16, shared=url) as two,
    ):
        save(one, chain, "alice")
        one.flush()
        assert two.known([block.meta.key for block in chain]) == len(chain)
        assert same(chain, load(two, chain))
        assert two.stats()["shared_read_bytes"] > sum(block.nbytes for block in chain)
        assert two.sessions() == []
    assert len([r for r in log.records if "names of sessions are not" in r.getMessage()]) == 2


def test_a_machine_that_stops_is_waited_for_as_long_as_may_be_and_nothing_is_written_afterwards(
    mooncake: Mooncake, engine: Engine
) -> None:
    data = os.urandom(8 << 20)
    engine.put("b", [memoryview(data)], soon())
    stream, buffer = engine.open_stream(soon()), bytearray(len(data))
    mooncake.node.send_signal(signal.SIGSTOP)
    try:
        stream.ask("b", 0, len(data), soon())
        began = time.monotonic()
        with pytest.raises(EngineError, match="no answer in time"):
            stream.take([memoryview(buffer)], Deadline(0.2))
        assert time.monotonic() - began < 60
        before = bytes(buffer)
    finally:
        mooncake.node.send_signal(signal.SIGCONT)
    until = time.monotonic() + 60
    while True:
        stream.ask("b", 0, len(data), soon())
        again = bytearray(len(data))
        try:
            came = stream.take([memoryview(again)], Deadline(10))
        except EngineError:
            came = 0
        if came == len(data):
            break
        assert time.monotonic() < until
        engine.put("b", [memoryview(data)], soon())
        time.sleep(0.1)
    assert again == data
    assert buffer == before


def test_a_master_that_is_not_there_is_not_waited_for(mooncake: Mooncake) -> None:
    began = time.monotonic()
    nobody = open_engine(SharedURL("mooncake://127.0.0.1:1"))
    with pytest.raises(EngineError, match="refused"):
        nobody.sizes(["a"], soon())
    assert time.monotonic() - began < 60
    nobody.close()
