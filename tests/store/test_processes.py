"""Who may do what at the same time: locks between sessions, stores, processes and machines; durability."""

import logging
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from support import fresh
from support.store_blocks import load, make_chain, same, save

from hf_attnstore import AttentionStore, AttentionStoreError, SessionBusyError, StoreFormatError, repair_store
from hf_attnstore.store.disk.disk_store import DiskStore
from hf_attnstore.store.processes.locks import StoreLock
from hf_attnstore.store.records.files import network_filesystem, tree_bytes


def start(code: str, *arguments: object) -> fresh.Process:
    """A process that runs `code` and says "ready" first."""
    process = fresh.Process([sys.executable, "-c", code, *arguments])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_store_open_on_another_machine_is_refused(tmp_path: Path) -> None:
    AttentionStore(tmp_path, block_size=16).close()
    elsewhere = StoreLock(tmp_path / "locks" / "open.lock", machine="another boot of another machine")
    try:
        with pytest.raises(StoreFormatError, match="another machine"):
            AttentionStore(tmp_path)
    finally:
        elsewhere.release()
    with AttentionStore(tmp_path), AttentionStore(tmp_path):
        pass


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/export {mount} {kind} rw 0 0
tmpfs {mount}/local\\040disk tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("kind", "below", "expected"),
    [
        ("nfs4", "", "nfs4"), ("cifs", "a/b", "cifs"), ("ext4", "", None), ("nfs4", "local disk/a", None),
        ("fuse.sshfs", "a", "fuse.sshfs"),
    ],
)  # fmt: skip
def test_network_file_systems_are_told_from_local_ones(
    kind: str, below: str, expected: str | None, tmp_path: Path
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS.format(mount=tmp_path.resolve() / "net", kind=kind))
    assert network_filesystem(tmp_path / "net" / below, mounts) == expected
    assert network_filesystem(tmp_path / "nettle", mounts) is None
    assert network_filesystem(tmp_path, tmp_path / "no such file") is None


def test_a_store_on_a_network_file_system_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_attnstore.store.disk.folder.network_filesystem", lambda path: "nfs4")
    with caplog.at_level(logging.WARNING):
        AttentionStore(tmp_path).close()
    assert "one machine at a time" in caplog.text


def test_a_session_is_held_until_what_its_turn_saved_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores on one folder stand for two processes: their locks are as far apart."""
    chain = make_chain(list(range(40)), 16)
    may_write = threading.Event()
    commit = DiskStore.commit

    def later(self: DiskStore, *arguments: object) -> None:
        may_write.wait(30)
        commit(self, *arguments)  # type: ignore[arg-type]

    with AttentionStore(tmp_path, block_size=16) as one, AttentionStore(tmp_path) as two:
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "commit", later)
            lock = one.lock_session("a", 0)
            with pytest.raises(SessionBusyError):
                two.lock_session("a", 0)
            save(one, chain, "a")
            lock.release()
            one.lock_session("a", 0).release()  # for itself, the turn is over
            threading.Timer(0.3, may_write.set).start()
            two.lock_session("a", 0).release()  # no error: the turn is over, its commit is not
            assert may_write.is_set()
            assert two.tokens("a") == list(range(40))
        assert not list((tmp_path / "locks").glob("*.draining"))


def test_a_late_commit_does_not_bring_a_deleted_session_back(tmp_path: Path) -> None:
    with AttentionStore(tmp_path, block_size=16) as one, AttentionStore(tmp_path) as two:
        for number in range(20):
            lock = one.lock_session("a", 0)
            save(one, make_chain([number * 100 + i for i in range(40)], 16), "a")
            lock.release()
            two.delete("a")
            one.flush()
            assert two.sessions() == []
            assert two.stats()["disk_blocks"] == 0


def test_threads_that_want_one_session_get_it_one_after_the_other(tmp_path: Path) -> None:
    inside = 0
    most = 0

    with AttentionStore(tmp_path, block_size=16) as store:

        def turns() -> None:
            nonlocal inside, most
            for _ in range(20):
                lock = store.lock_session("a", 30)
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1
                lock.release()

        threads = [threading.Thread(target=turns) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


HOLDER = """
import sys, time
from hf_attnstore import AttentionStore
store = AttentionStore(sys.argv[1])
with store._disk.writing():
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_write_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    with AttentionStore(tmp_path, block_size=16) as store:
        process = start(HOLDER, tmp_path)
        chain = make_chain(list(range(40)), 16)
        save(store, chain, "a")
        time.sleep(0.2)
        assert store.stats()["disk_blocks"] == 0, "the other process is in the middle of something"
        process.kill()
        store.drop_memory()
        assert same(chain, load(store, chain))


def test_a_repair_is_refused_while_others_have_the_store(tmp_path: Path) -> None:
    with AttentionStore(tmp_path, block_size=16), pytest.raises(AttentionStoreError, match="in use"):
        repair_store(tmp_path)
    assert repair_store(tmp_path).problems == []


WRITER = """
import random, sys
from support.store_blocks import make_chain, save
from hf_attnstore import AttentionStore
seed, cap = int(sys.argv[2]), int(sys.argv[3])
dice = random.Random(seed)
with AttentionStore(sys.argv[1], disk=cap, memory="256KiB") as store:
    print("ready", flush=True)
    for turn in range(10**6):
        first = seed * 10**6 + dice.randrange(40) * 10**4
        length = dice.randrange(20, 300)
        save(store, make_chain([first + i for i in range(length)], 32), f"{seed} {first}")
        if dice.random() < 0.1:
            store.set_metadata(f"{seed} {first}", {"text": "x" * dice.randrange(3000)})
        if dice.random() < 0.05:
            store.flush()
"""


def test_several_processes_keep_one_cap_at_every_instant(tmp_path: Path) -> None:
    """Real bytes, of all files there are: blocks, records, what is half written, index, log, quarantine."""
    root, cap = tmp_path / "store", 1_500_000
    AttentionStore(root, block_size=32, disk=cap).close()
    writers = [start(WRITER, root, seed, cap) for seed in (1, 2, 3)]
    sizes = []
    try:
        deadline = time.monotonic() + 120
        killed = 0
        # a busy machine takes longer for as much
        while (len(sizes) < 800 or killed < 3 or max(sizes) <= 0.7 * cap) and time.monotonic() < deadline:
            sizes.append(tree_bytes(root))
            if len(sizes) % 200 == 0:
                writers.pop(0).kill()
                killed += 1
                writers.append(start(WRITER, root, 3 + killed, cap))
    finally:
        for process in writers:
            process.kill()
    assert killed > 2
    assert max(sizes) <= cap
    assert max(sizes) > 0.7 * cap, "the cap was never near"
    with AttentionStore(root, disk=cap) as store:
        assert store.verify().problems == []
        assert store.stats()["disk_bytes"] == tree_bytes(root) - (root / "store.json").stat().st_size - _locks(root)


def _locks(root: Path) -> int:
    return tree_bytes(root / "locks")


# durability


@pytest.mark.parametrize("durability", ["process", "power"])
def test_power_syncs_every_file_and_its_folder_before_it_is_visible(
    durability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(fd: int) -> None:
        synced.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def spy_rename(source: str, target: str) -> None:
        synced.append(f"rename {Path(target).name}")
        rename(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    with AttentionStore(tmp_path, block_size=16, durability=durability) as store:  # type: ignore[arg-type]
        monkeypatch.setattr(os, "fsync", spy_fsync)
        monkeypatch.setattr(os, "rename", spy_rename)
        (block,) = make_chain([1, 2, 3], 16)
        save(store, [block], "a")
        store.flush()
        ((full,),) = store._disk.index.database._writer.execute("PRAGMA synchronous").fetchall()
    name = block.meta.key.hex() + ".safetensors"
    if durability == "process":
        assert not [event for event in synced if event.startswith("fsync")]
        assert full == 1
        return
    assert full == 2
    assert synced.index(f"fsync {name}") < synced.index(f"rename {name}") < synced.index(f"fsync {name[:2]}")
    record = next(event for event in synced if event.endswith(".session") and event.startswith("rename"))
    assert synced.index(f"fsync {name[:2]}") < synced.index(record.replace("rename", "fsync")) < synced.index(record)


def test_a_durability_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttentionStoreError, match='"process" or "power"'):
        AttentionStore(tmp_path, durability="forever")  # type: ignore[arg-type]
