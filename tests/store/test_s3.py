"""S3 as an engine of a shared tier: a real SeaweedFS on the loopback, and servers that are not what they should be."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.seaweed import Seaweed
from support.store_blocks import make_chain, save
from typer.testing import CliRunner

from hf_attnstore.cli.app import app
from hf_attnstore.errors import SharedTierError
from hf_attnstore.lab.demo.seaweed import SECRET
from hf_attnstore.store import AttentionStore
from hf_attnstore.store.shared.deadline import Deadline
from hf_attnstore.store.shared.engine import TAG_BYTES, Edges, Engine, EngineError, Put, open_engine
from hf_attnstore.store.shared.url import SharedURL

pytest.importorskip("obstore", reason="needs the obstore package")


@pytest.fixture
def engine(seaweed: Seaweed) -> Iterator[Engine]:
    seaweed.empty()
    engine = open_engine(SharedURL(seaweed.url.replace("?", f"/folder-{os.getpid()}?")))
    yield engine
    engine.close()


def soon() -> Deadline:
    return Deadline(30)


def test_values_are_put_found_and_read_by_ranges_in_any_order(engine: Engine) -> None:
    data = os.urandom(3 << 20)
    parts = [memoryview(data)[:1000], memoryview(data)[1000:]]
    assert engine.put("a:b:1", parts, soon()) is Put.STORED
    assert engine.put("a:b:empty", [], soon()) is Put.STORED
    assert engine.sizes(["a:b:1", "a:b:2", "a:b:empty"], soon()) == [len(data), 0, 0]
    found = engine.edges(["a:b:1", "a:b:2", "a:b:empty"], 100, 10, soon())
    assert found == [Edges(len(data), data[:100], data[-10:]), Edges(0, b"", b""), Edges(0, b"", b"")]
    stream, ranges = engine.open_stream(soon()), [(0, 10), (10, 5000), (100_000, 2 << 20), (5, 7), (3 << 20, 100)]
    for offset, nbytes in ranges:
        stream.ask("a:b:1", offset, nbytes, soon())
    stream.ask("a:b:2", 0, 100, soon())
    for offset, nbytes in ranges:
        buffers = [bytearray(nbytes // 3), bytearray(nbytes - nbytes // 3)]
        assert stream.take([memoryview(b) for b in buffers], soon()) == len(data[offset : offset + nbytes])
        assert b"".join(buffers)[: len(data[offset : offset + nbytes])] == data[offset : offset + nbytes]
    assert stream.take([memoryview(bytearray(100))], soon()) == 0
    stream.close(reuse=True)
    assert sorted(engine.names("a:", soon())) == ["a:b:1", "a:b:empty"]
    engine.delete(["a:b:1", "a:b:2", "a:b:empty"], soon())
    assert engine.names("a:", soon()) == []


def test_values_are_read_layer_by_layer_over_one_request_for_each(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {f"b:{number}": os.urandom(64_000) for number in range(70)}  # more than are kept open
    for name, value in data.items():
        engine.put(name, [memoryview(value)], soon())
    bucket, asked = engine._bucket, []  # type: ignore[attr-defined]
    ask = bucket.ask
    monkeypatch.setattr(bucket, "ask", lambda *arguments: asked.append(1) or ask(*arguments))
    stream, found = engine.open_stream(soon()), dict.fromkeys(data, b"")
    for layer in range(4):
        for name in data:
            stream.ask(name, 16_000 * layer, 16_000, soon())
        for name in data:
            buffer = bytearray(16_000)
            stream.take([memoryview(buffer)], soon())
            found[name] += buffer
    stream.close(reuse=True)
    assert found == data
    assert len(asked) == 64 + 4 * 6


@pytest.mark.parametrize("count", [1, 10, 11, 100, 1000])
def test_how_much_of_a_chain_is_there_takes_ten_requests_at_most(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(SharedURL("s3://ann:secret@bucket"))
    names = [str(number) for number in range(count)]
    for there in {0, 1, count // 3, count // 2, count - 1, count}:
        asked: list[str] = []

        def sizes(some: Sequence[str], deadline: Deadline, there: int = there, asked: list[str] = asked) -> list[int]:
            asked += some
            return [7 * (int(name) < there) for name in some]

        monkeypatch.setattr(engine, "sizes", sizes)
        assert engine.leading(names, soon()) == [7] * there + [0] * (count - there)
        assert len(asked) <= 10


def test_entries_of_a_name_are_kept_side_by_side_and_the_oldest_go(engine: Engine) -> None:
    for number in range(66):
        engine.note("f", b"%d" % number, b"entry", soon())
    engine.note("f", b"3", b"another", soon())
    engine.drop_note("f", b"4", soon())
    (nothing, found) = engine.noted(["nothing", "f"], soon())
    assert nothing == {}
    assert set(found) == {b"%d" % number for number in (2, 3, *range(5, 66))}
    assert found[b"3"] == b"another"
    for member in found:
        engine.drop_note("f", member, soon())
    assert engine.names("f", soon()) == engine.names("", soon()) == []


def test_what_nobody_needs_is_removed_by_gc(seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seaweed.empty()
    url = seaweed.url + "&timeout=30&lookup=30"
    monkeypatch.setenv("ATTNSTORE_SHARED", url)
    with AttentionStore(tmp_path / "one", block_size=16, shared=url) as store:
        save(store, make_chain(list(range(16 * 12)), 16), "alice")
        save(store, make_chain(list(range(500, 520)), 16), "bob")
        store.flush()
        store.delete("bob")
        store.flush()
    assert len(seaweed.keys("attnstore:b:")) == 14
    result = CliRunner().invoke(app, ["gc", "--shared", "--unowned", "--store", str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    assert len(seaweed.keys("attnstore:b:")) == 12
    assert len(seaweed.keys("attnstore:f:")) == 12


def test_of_many_who_replace_a_record_at_once_one_does(engine: Engine) -> None:
    tags = [bytes([number]) * TAG_BYTES for number in range(9)]
    done: list[int] = []

    def replace(old: bytes, number: int) -> None:
        if engine.replace("s", old, tags[number] + b"record", "n", b"m", tags[number], soon()):
            done.append(number)

    for old in (b"", "the winner"):
        threads = [
            threading.Thread(target=replace, args=[tags[done[0]] if old else b"", number])
            for number in range(8)
            if number not in done
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(done) == 2
    assert engine.value("s", soon()) == tags[done[1]] + b"record"
    assert not engine.replace("s", tags[8], b"", "n", b"m", b"", soon())


def test_a_record_is_replaced_though_another_write_of_it_is_on_its_way(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_attnstore.store.shared.bucket import Bucket

    one, two = bytes(TAG_BYTES - 1) + b"1", bytes(TAG_BYTES - 1) + b"2"
    assert engine.replace("s", b"", one, "", b"", b"", soon())
    refusals, put_if = iter([False] * 3), Bucket.put_if
    monkeypatch.setattr(Bucket, "put_if", lambda *args: next(refusals, True) and put_if(*args))
    assert engine.replace("s", one, two, "", b"", b"", soon())
    assert engine.value("s", soon()) == two
    assert not engine.replace("s", one, two, "", b"", b"", soon())
    monkeypatch.setattr(Bucket, "put_if", lambda *args: False)
    assert not engine.replace("s", two, one, "", b"", b"", soon())


@pytest.mark.parametrize(("kind", "can"), [("ignores", False), ("unquoted", True), ("creates only", False)])
def test_whether_a_server_compares_is_tried_and_not_believed(
    kind: str, can: bool, engine: Engine, seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from hf_attnstore.store.shared.bucket import Bucket

    put = Bucket.put

    def as_the_server(self: Bucket, name: str, parts: Any, deadline: Deadline, headers: Any = None) -> bool:
        headers = headers or {}
        said = headers.get("If-Match", "")
        if kind == "ignores" or (kind == "creates only" and said):
            return put(self, name, parts, deadline)
        if kind == "unquoted" and said:
            return put(self, name, parts, deadline, {"If-Match": "no" if '"' in said else f'"{said}"'})
        return put(self, name, parts, deadline, headers)

    monkeypatch.setattr(Bucket, "put", as_the_server)
    assert engine.about(soon()).facts["compares before it sets"].startswith("yes") == can
    url = seaweed.url + "&timeout=30&lookup=30"
    with (
        AttentionStore(tmp_path / "one", block_size=16, shared=url) as one,
        AttentionStore(tmp_path / "two", block_size=16, shared=url) as two,
    ):
        save(one, make_chain(list(range(40)), 16), "alice")
        one.flush()
        assert [info.name for info in two.sessions()] == ["alice"] * can
        assert two.known([block.meta.key for block in make_chain(list(range(40)), 16)]) == 3
    assert len([r for r in log.records if "names of sessions are not" in r.getMessage()]) == 2 * (not can)


def test_a_block_that_is_gone_from_a_chain_is_noticed_when_it_is_opened_and_put_there_again(
    seaweed: Seaweed, tmp_path: Path
) -> None:
    seaweed.empty()
    url, chain = seaweed.url + "&timeout=30&lookup=30", make_chain(list(range(16 * 15)), 16)
    keys = [block.meta.key for block in chain]
    with AttentionStore(tmp_path / "one", block_size=16, shared=url) as store:
        save(store, chain)
    seaweed.engine.delete([f"attnstore:b:{keys[2].hex()}"], soon())
    with AttentionStore(tmp_path / "two", block_size=16, shared=url, disk=0) as store:
        assert store.known(keys) == 15  # it is supposed that there are no gaps
        assert keys[2] not in store._shared.sources(keys)
        assert store.known(keys) == 2
        save(store, chain)
        store.flush()
    with AttentionStore(tmp_path / "three", block_size=16, shared=url, disk=0) as store:
        assert len(store._shared.sources(keys)) == 15


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("s3cr3tpass", "s3cret"), "SignatureDoesNotMatch"),
        (("ann:", "bob:"), "InvalidAccessKeyId"),
        (("conversations", "elsewhere"), "NoSuchBucket"),
        (("127.0.0.1:", "127.0.0.1:1"), "refused"),
    ],
)
def test_ping_says_in_one_line_and_without_the_secret_what_is_wrong(
    change: tuple[str, str], why: str, seaweed: Seaweed
) -> None:
    url = seaweed.url.replace(*change) if why != "refused" else seaweed.at(1)
    result = CliRunner().invoke(app, ["ping", url])
    assert result.exit_code == 1
    assert why in result.output
    assert "s3cr" not in result.output


def test_ping_says_what_the_server_is_and_can_do_and_leaves_nothing_there(seaweed: Seaweed) -> None:
    seaweed.empty()
    result = CliRunner().invoke(app, ["ping", seaweed.url])
    assert result.exit_code == 0, result.output
    for said in ("SeaweedFS", "MiB/s", "1,000 blocks in", "compares before it sets", "not encrypted", "evicts nothing"):
        assert said in result.output
    assert seaweed.keys() == []


def test_credentials_may_come_from_the_environment_and_a_file(
    seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    bare = seaweed.url.replace(f"ann:{SECRET}@", "")
    in_file = seaweed.url.replace(f":{SECRET}@", "@") + f"&password_file={tmp_path / 'secret'}"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ann")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for url in (bare, in_file):
        engine = open_engine(SharedURL(url))
        assert engine.sizes(["nothing"], soon()) == [0]
        assert SECRET not in f"{engine!r} {SharedURL(url)!r}"
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)


@pytest.mark.parametrize("url", ["s3://bucket:9000", "s3://bucket?ca=/nowhere", "s3://bucket?region=x&x=1"])
def test_a_url_that_is_none_of_s3_is_an_error(url: str, tmp_path: Path) -> None:
    with pytest.raises(SharedTierError):
        AttentionStore(tmp_path, shared=url.replace("s3://", "s3://ann:s3cr3t@")).close()


def test_a_server_that_says_nothing_is_waited_for_as_long_as_may_be_and_no_buffer_is_written_afterwards() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = open_engine(SharedURL(Seaweed.at(None, silent.getsockname()[1])))  # type: ignore[arg-type]
        began = time.monotonic()
        for ask in (
            lambda: engine.sizes(["a"], Deadline(0.2)),
            lambda: engine.put("a", [memoryview(bytes(8 << 20))], Deadline(0.2)),
            lambda: engine.delete(["a"], Deadline(0.2)),
            lambda: engine.names("a:", Deadline(0.2)),
        ):
            with pytest.raises(EngineError, match="no answer in time"):
                ask()
        assert time.monotonic() - began < 60
