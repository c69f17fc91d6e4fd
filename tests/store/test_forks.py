"""Stores and processes that fork, threads that close, and who uses a store after that."""

from __future__ import annotations

import contextlib
import gc
import inspect
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import fresh
from support.store_blocks import load, make_chain, on_disk_only, same, save

from hf_attnstore import AttentionStore, AttentionStoreError, SessionBusyError, StoreClosedError, repair_store

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")

FORK_SECONDS = 60


def in_child(work: Callable[[], None]) -> str:
    """Runs something in a fork of this process. Returns what it raised, in words; "hangs" if it does not end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "nothing"
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    until = time.monotonic() + FORK_SECONDS
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            os.close(reading)
            return "hangs"
        time.sleep(0.01)
    with os.fdopen(reading, "rb") as stream:
        return stream.read().decode()


USES: dict[str, Callable[[AttentionStore], object]] = {
    "namespaces": lambda s: s.namespaces(),
    "with_codec": lambda s: s.with_codec("raw"),
    "with_windows_apart": lambda s: s.with_windows_apart(),
    "let_windows_go": lambda s: s.let_windows_go([b"k" * 32], "alice"),
    "there": lambda s: s.there([b"k"]),
    "read": lambda s: s.read(b"k" * 32),
    "bytes_only_in": lambda s: s.bytes_only_in("alice"),
    "model_name": lambda s: s.model_name("0" * 40),
    "set_model_name": lambda s: s.set_model_name("0" * 40, "a model"),
    "clear_namespace": lambda s: s.clear_namespace(),
    "session_codec": lambda s: s.session_codec("alice"),
    "flush": lambda store: store.flush(),
    "sessions": lambda store: store.sessions(),
    "session": lambda store: store.session("alice"),
    "bytes_together": lambda store: store.bytes_together("alice"),
    "session_count": lambda store: store.session_count(),
    "delete": lambda store: store.delete("alice"),
    "fork": lambda store: store.fork("alice", "bob"),
    "rename": lambda store: store.rename("alice", "bob"),
    "metadata": lambda store: store.metadata("alice"),
    "set_metadata": lambda store: store.set_metadata("alice", {}),
    "export_session": lambda store: store.export_session("alice", store.path / "x"),
    "import_session": lambda store: store.import_session(store.path / "x"),
    "verify": lambda store: store.verify(),
    "collect_garbage": lambda store: store.collect_garbage(),
    "session_fingerprint": lambda store: store.session_fingerprint("alice"),
    "lock_session": lambda store: store.lock_session("alice", 0),
    "commit": lambda store: store.commit("alice", "f", None),  # type: ignore[arg-type]
    "manifest": lambda store: store.manifest("alice"),
    "tokens": lambda store: store.tokens("alice"),
    "schedule": lambda store: store.schedule(["alice"]),
    "expect": lambda store: store.expect("alice"),
    "residence": lambda store: store.residence("alice"),
    "latest_manifest": lambda store: store.latest_manifest("alice"),
    "used": lambda store: store.used([b"k"], 1, short=False),
    "has": lambda store: store.has(b"k"),
    "known": lambda store: store.known([b"k"]),
    "nearest": lambda store: store.nearest(b"k", [1]),
    "follower": lambda store: store.follower(b"k"),
    "session_with": lambda store: store.session_with(b"k"),
    "describe": lambda store: store.describe(b"k"),
    "describe_checkpoint": lambda store: store.describe_checkpoint(b"k"),
    "describe_block": lambda store: store.describe_block(b"k"),
    "latest_checkpoint": lambda store: store.latest_checkpoint([], []),
    "load": lambda store: store.load([]),
    "resident": lambda store: store.resident(b"k"),
    "bring": lambda store: next(store.bring([b"k"])),
    "copy_beginning": lambda store: store.copy_beginning(range(16), "f", store),
    "shared_upkeep": lambda store: store.shared_upkeep(),
    "put": lambda store: store.put(make_chain([1], 16)[0]),
    "touch": lambda store: store.touch([b"k"]),
    "promote": lambda store: store.promote([b"k"]),
    "in_namespace": lambda store: store.in_namespace("x"),
    "drop_memory": lambda store: store.drop_memory(),
    "note": lambda store: store.note("f"),
    "set_note": lambda store: store.set_note("f", {}),
    "stats": lambda store: store.stats(),
    "totals": lambda store: store.totals(),
}
"""Every public method that needs an open store."""

HARMLESS = {
    "begin_computing", "check_name", "check_namespace", "close", "count_turn", "end_computing", "keep_in_memory",
    "register", "release", "reserve", "root", "stop_recording", "tier_of", "after_fork_in_child",
    "check_not_left_behind", "fetching", "give_way", "one_step",
}  # fmt: skip
"""Those that need none: they reckon, or are there to clean up."""


def test_every_public_method_is_tried() -> None:
    methods = {n for n, _ in inspect.getmembers(AttentionStore, inspect.isfunction) if not n.startswith("_")}
    assert methods == set(USES) | HARMLESS


@pytest.mark.parametrize("use", USES)
def test_who_uses_a_closed_store_is_told(use: str, tmp_path: Path) -> None:
    store = AttentionStore(tmp_path, block_size=16)
    save(store, make_chain([1, 2, 3], 16), "alice")
    store.close()
    store.close()
    with pytest.raises(StoreClosedError, match="is closed; open it again"):
        USES[use](store)


def test_a_forked_child_is_told_by_every_method_and_never_hangs(tmp_path: Path) -> None:
    """Also where other threads hold the locks at that moment, and the writer has work."""
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        chain = make_chain(list(range(320)), 16)
        save(store, chain, "alice")
        store.flush()
        view = store.in_namespace("x")
        held = [
            store._saver_lock, store._closing, store._plans.lock, store._memory._changed, store._right_of_way._changed,
            store._accounts._lock, store.device_tier._lock, store._locks._changed, store._disk._lock._threads,
        ]  # fmt: skip
        ready, over = threading.Event(), threading.Event()

        def hold() -> None:
            with contextlib.ExitStack() as stack:
                for lock in held:
                    stack.enter_context(lock)  # type: ignore[arg-type]
                ready.set()
                over.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        ready.wait()
        for _ in range(3):
            store._writer.submit(over.wait)
        said: list[str] = []

        def child() -> None:
            for seen in (store, view):
                for use in USES.values():
                    try:
                        use(seen)
                        said.append("nothing")
                    except StoreClosedError as error:
                        said.append(str(error))
                seen.reserve(16)
                seen.release(16)
                seen.begin_computing(1)
                seen.end_computing(1)
                seen.close()
            assert len(said) == 2 * len(USES), said
            assert all("from which this one was forked" in one for one in said), said

        try:
            found = in_child(child)
        finally:
            over.set()
            thread.join()
        assert found == "nothing"
        # and the parent goes on
        assert store.tokens("alice") == list(range(320))
        assert store.verify().problems == []


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_forked_child_can_have_a_store_of_its_own(same_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with AttentionStore(path, block_size=16) as store:
        chain = on_disk_only(store, list(range(64)), 16)
        path = path if same_folder else tmp_path / "b"

        def child() -> None:
            with AttentionStore(path, block_size=16) as own:
                if same_folder:
                    assert same(chain, load(own, chain))
                save(own, make_chain(list(range(100, 164)), 16), "bob")
            assert store.closed

        for _ in range(3):
            assert in_child(child) == "nothing"
        save(store, make_chain(list(range(200, 264)), 16), "carol")
        store.flush()
        there = {info.name for info in store.sessions()}
        assert there == ({"alice", "bob", "carol"} if same_folder else {"alice", "carol"})
        assert store.tokens("carol") == list(range(200, 264))
        assert store.verify().problems == []
        assert same(chain, load(store, chain))


def test_a_child_that_lives_on_keeps_none_of_the_parents_locks(tmp_path: Path) -> None:
    store = AttentionStore(tmp_path / "store", block_size=16)
    lock = store.lock_session("alice", 0)
    with store._disk.writing():  # in the middle of a change
        reading, writing = os.pipe()
        living, lives = os.pipe()
        pid = os.fork()
        if pid == 0:
            del lock
            gc.collect()
            os.write(lives, b"x")
            os.read(reading, 1)
            os._exit(0)
    try:
        os.read(living, 1)
        # what the child dropped is still the parent's
        with AttentionStore(store.path) as other:
            with pytest.raises(SessionBusyError):
                other.lock_session("alice", 0)
            lock.release()
            other.lock_session("alice", 0).release()
        save(store, make_chain([1, 2, 3], 16), "bob")
        store.close()
        assert repair_store(store.path).problems == []  # nobody else has it open
    finally:
        os.write(writing, b"x")
        os.waitpid(pid, 0)


def test_a_child_that_ends_as_usual_writes_nothing_and_does_not_hang(tmp_path: Path) -> None:
    script = (
        "import os, sys; from hf_attnstore import AttentionStore\n"
        "store = AttentionStore(sys.argv[1], block_size=16)\n"
        "store.set_metadata('alice', {})\n"
        "pid = os.fork()\n"
        "if pid: os.waitpid(pid, 0); store.set_metadata('bob', {})\n"
        "print([s.name for s in store.sessions()] if pid else 'child')\n"
    )
    run = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "store")]
    done = fresh.run(run, timeout=FORK_SECONDS, check=True)
    assert done.stdout.split("\n")[:2] == ["child", "['bob', 'alice']"]
    assert "could not be closed" not in done.stderr


def _use(path: str) -> list[int]:
    with AttentionStore(path) as store:
        return store.tokens("alice")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_every_kind_open_a_store_of_their_own(method: str, tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        save(store, make_chain([1, 2, 3], 16), "alice")
        store.flush()
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(_use, [str(store.path)] * 4) == [[1, 2, 3]] * 4
        save(store, make_chain([4, 5], 16), "bob")
        assert store.tokens("bob") == [4, 5]


def test_an_open_store_says_why_it_cannot_be_pickled(store: AttentionStore) -> None:
    with pytest.raises(AttentionStoreError, match="hand over the path"):
        pickle.dumps(store)


# closing


def test_threads_that_close_a_store_at_once_close_it_once(tmp_path: Path) -> None:
    for _ in range(5):
        store = AttentionStore(tmp_path / "store", block_size=16)
        views = [store, store.in_namespace("x"), store, store.in_namespace("y"), store, store]
        save(store, make_chain([1, 2, 3], 16), "alice")
        failed: list[BaseException] = []
        together = threading.Barrier(len(views))

        def close(
            view: AttentionStore, together: threading.Barrier = together, failed: list[BaseException] = failed
        ) -> None:
            together.wait()
            try:
                view.close()
                assert view.closed
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=close, args=(view,)) for view in views]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        with AttentionStore(tmp_path / "store") as again:
            assert again.tokens("alice") == [1, 2, 3]


def test_closing_touches_no_descriptor_of_anybody_else(tmp_path: Path) -> None:
    store = AttentionStore(tmp_path / "store", block_size=16)
    number = store._open_lock._fd
    store.close()
    mine = os.open(os.devnull, os.O_RDONLY)
    moved = os.dup2(mine, number)  # somebody else has that number now
    try:
        store.close()
        store._open_lock.release()
        os.fstat(moved)
    finally:
        os.close(moved)
        if mine != moved:
            os.close(mine)


def test_a_store_can_be_closed_from_its_own_threads(tmp_path: Path) -> None:
    """As a destructor does that happens to run there."""
    for threads in ("_writer", "_readers", "_fetcher"):
        store = AttentionStore(tmp_path / "store", block_size=16)
        save(store, make_chain([1, 2, 3], 16), "alice")
        getattr(store, threads).submit(store.close)
        until = time.monotonic() + FORK_SECONDS
        while store._open_lock._fd >= 0 and time.monotonic() < until:
            time.sleep(0.005)
        assert store.closed
        assert repair_store(store.path).problems == []


def test_threads_open_and_close_the_same_folder(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for turn in range(8):
                with AttentionStore(tmp_path / "store", block_size=16) as store:
                    chain = make_chain([number, turn, 7], 16)
                    save(store, chain, f"{number}")
                    assert store.tokens(f"{number}") == [number, turn, 7]
                    assert same(chain, load(store, chain))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert repair_store(tmp_path / "store").problems == []


def test_a_store_is_closed_while_it_loads(tmp_path: Path) -> None:
    store = AttentionStore(tmp_path / "store", block_size=16)
    chain = on_disk_only(store, list(range(64)), 16)
    from support.store_blocks import stages_of

    stages = stages_of(chain)
    running = store.load(stages)
    running.wait(0)
    store.close()
    running.wait(1)  # its files are open, and what was begun is finished
    running.finish()
    found: Any = [target for stage in stages[:2] for target in stage.all_targets()]
    assert found
    assert all(target.any() for target in found)
