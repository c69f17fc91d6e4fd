"""The index's own file: what is not as it was written is made anew, and what stands in the way of its log."""

import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.store_blocks import make_chain, save

from hf_attnstore import AttentionStore
from hf_attnstore.store.index.database import Database
from hf_attnstore.store.records.files import tree_bytes

SIZE = 16
CAP = 1_300_000


def tokens(n: int) -> list[int]:
    return [n * 1000 + i for i in range(128)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"id INTEGER PRIMARY KEY, handle", b"id INTEGER PSIMARY KEY, handle"),
        (b"id INTEGER PRIMARY KEY CHECK", b"id INTEGER$PRIMARY KEY CHECK"),
        (b"session_bytes INTEGER", b"session_cytes INTEGER"),
        (b"bytes = bytes - OLD.bytes", b"bytes = bytes + OLD.bytes"),
    ],
)
def test_an_index_with_other_tables_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old: bytes, new: bytes
) -> None:
    with AttentionStore(tmp_path / "store", block_size=SIZE) as store:
        save(store, make_chain(tokens(1), SIZE), "alice")
    path = tmp_path / "store" / "index.sqlite"
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new))
    with caplog.at_level(logging.WARNING), AttentionStore(tmp_path / "store", block_size=SIZE) as store:
        assert [(info.name, info.tokens) for info in store.sessions()] == [("alice", 128)]
    assert "is rebuilt" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), AttentionStore(tmp_path / "store", block_size=SIZE):
        assert caplog.text == ""


@pytest.mark.parametrize("place", [18, 19])
def test_an_index_that_claims_to_be_of_a_later_sqlite_is_made_anew(tmp_path: Path, place: int) -> None:
    with AttentionStore(tmp_path / "store", block_size=SIZE) as store:
        save(store, make_chain(tokens(1), SIZE), "alice")
    path = tmp_path / "store" / "index.sqlite"
    content = bytearray(path.read_bytes())
    content[place] = 6
    path.write_bytes(content)
    with AttentionStore(tmp_path / "store", block_size=SIZE) as store:
        assert [(info.name, info.tokens) for info in store.sessions()] == [("alice", 128)]


@contextmanager
def somebody_reads(root: Path) -> Iterator[None]:
    """What is read stays as it is meanwhile, and with it the log that came after."""
    with closing(sqlite3.connect(root / "index.sqlite", isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT COUNT(*) FROM blocks").fetchall()
        yield
        connection.execute("COMMIT")


def test_a_reader_that_stays_costs_neither_the_cap_nor_the_blocks(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with AttentionStore(root, block_size=SIZE, disk=CAP) as store:
        for n in range(60):
            save(store, make_chain(tokens(n), SIZE), f"s{n}")
        store.flush()
        before = store.stats()["disk_blocks"]
        with somebody_reads(root):
            for n in range(100, 108):
                save(store, make_chain(tokens(n), SIZE), f"s{n}")
                store.flush()
                assert tree_bytes(root) <= CAP
        assert store.stats()["disk_blocks"] >= before / 2
        save(store, make_chain(tokens(200), SIZE), "afterwards")
        store.flush()
        assert "afterwards" in {info.name for info in store.sessions()}
        assert tree_bytes(root) <= CAP


def test_a_store_that_is_opened_leaves_the_locks_of_another_in_the_process_alone(tmp_path: Path) -> None:
    """POSIX locks are the process's: closing any descriptor of a file lets go of all of them."""
    locks = Path("/proc/locks")
    if not locks.exists():
        pytest.skip("the system does not list its locks")
    root = tmp_path / "store"
    with AttentionStore(root, block_size=SIZE, namespace="a") as first:
        save(first, make_chain(tokens(1), SIZE), "alice")
        first.flush()
        inode = str((root / "index.sqlite").stat().st_ino)

        def held() -> int:
            return sum(inode in line.split()[5] for line in locks.read_text().splitlines())

        before = held()
        with AttentionStore(root, block_size=SIZE, namespace="b") as second:
            assert before > 0
            assert held() >= before
            save(second, make_chain(tokens(2), SIZE), "bob")
        assert held() >= before


def test_several_may_make_a_database_at_once(tmp_path: Path) -> None:
    """SQLite lets one of them set its mode, and refuses the others at once."""
    schema = "CREATE TABLE IF NOT EXISTS things(name TEXT);"
    failures: list[BaseException] = []
    for number in range(30):
        together = threading.Barrier(6)

        def make(path: Path = tmp_path / f"{number}.sqlite", together: threading.Barrier = together) -> None:
            together.wait()
            try:
                Database(path, schema, sync=False, on_damage=lambda: None).close()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=make) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
