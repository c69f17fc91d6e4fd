"""What the store does when something goes wrong: crashes, damage, full disks, other processes."""

import errno
import logging
import os
import random
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support import fresh
from support.store_blocks import LAYERS, load, make_block, make_chain, same, save

from hf_attnstore import (
    AttentionStore,
    AttentionStoreError,
    LoadError,
    SessionBusyError,
    SessionNameError,
    SessionNotFoundError,
    StoreClosedError,
    StoreFormatError,
)
from hf_attnstore.lab.bench.slow_disk import SlowDisk
from hf_attnstore.store.blocks.vault import Vault
from hf_attnstore.store.disk.block_files import BlockFiles
from hf_attnstore.store.disk.surroundings import Surroundings
from hf_attnstore.store.transfer.stages import Piece, Stage

HERE = Path(__file__).parent


def block_files(root: Path) -> list[Path]:
    return sorted((root / "blocks").glob("*/*/*.safetensors"))


def folder_bytes(root: Path) -> int:
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def test_blocks_come_back_equal_from_memory_and_from_disk_after_reopening(tmp_path: Path) -> None:
    chain = make_chain(list(range(50)), 16)
    with AttentionStore(tmp_path, block_size=16) as store:
        save(store, chain, "a")
        assert same(chain, load(store, chain))
        store.drop_memory()
        assert store.stats()["memory_blocks"] == 0
        assert same(chain, load(store, chain))
    with AttentionStore(tmp_path, block_size=16) as store:
        assert same(chain, load(store, chain))
        assert store.tokens("a") == list(range(50))


def test_a_block_file_opens_with_the_safetensors_library(tmp_path: Path) -> None:
    (block,) = make_chain([7, 8, 9], 16)
    with AttentionStore(tmp_path, block_size=16) as store:
        save(store, [block])
    (path,) = block_files(tmp_path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {*block.tensors, "token_ids"}
        assert all((file.get_tensor(name) == tensor).all() for name, tensor in block.tensors.items())
        assert file.get_tensor("token_ids").tolist() == [7, 8, 9]
        assert file.metadata()["key"] == block.meta.key.hex()


def test_a_layer_of_a_block_is_one_contiguous_range(tmp_path: Path) -> None:
    (block,) = make_chain([1, 2, 3], 16)
    tier = BlockFiles(tmp_path, Vault())
    tier.make_folders()
    tier.write(block)
    with tier.open(block.meta.fingerprint, block.meta.key) as file:
        position = None
        for layer in range(LAYERS):
            for name in ("keys", "values"):
                stored = file.layout.tensors[f"layers.{layer}.{name}"]
                assert position in (None, stored.offset)
                position = stored.offset + stored.spec.nbytes


def test_files_and_folders_are_private_whatever_the_umask(tmp_path: Path) -> None:
    root = tmp_path / "store"
    before = os.umask(0)
    try:
        with AttentionStore(root, block_size=16) as store:
            save(store, make_chain([1, 2], 16), "a")
            store.lock_session("a", 0).release()
            store.flush()
            for folder, _, names in os.walk(root):
                assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700, folder
                for name in names:
                    assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600, name
    finally:
        os.umask(before)


@pytest.mark.parametrize("damage", ["missing", "truncated", "emptied", "flipped", "swapped"])
def test_a_damaged_file_is_refused_set_aside_and_forgotten(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    chain = make_chain(list(range(40)), 16)
    with AttentionStore(tmp_path, block_size=16) as store:
        save(store, chain, "a")
        store.drop_memory()
        path = next(p for p in block_files(tmp_path) if p.stem == chain[1].meta.key.hex())
        content = bytearray(path.read_bytes())
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(content[:-7])
        elif damage == "emptied":
            path.write_bytes(b"")
        elif damage == "flipped":
            content[-200] ^= 4
            path.write_bytes(content)
        else:
            other = next(p for p in block_files(tmp_path) if p.stem == chain[0].meta.key.hex())
            path.write_bytes(other.read_bytes())
        with caplog.at_level(logging.WARNING), pytest.raises(LoadError):
            load(store, chain)
        assert "recomputed" in caplog.text
        assert not store.has(chain[1].meta.key)
        assert not path.exists()
        assert (tmp_path / "quarantine" / path.name).exists() == (damage != "missing")
        assert store.stats()["rejected"] == 1
        assert same(chain[:1], load(store, chain[:1]))


def test_every_single_bit_flip_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Sampled evenly over the whole file, each byte of the header included."""
    (block,) = make_chain([5, 6, 7, 8], 16)
    tier = BlockFiles(tmp_path, Vault())
    tier.make_folders()
    tier.write(block)
    path = tier.path(block.meta.fingerprint, block.meta.key)
    content = path.read_bytes()
    harmless = 0
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= 1 << (position % 8)
        path.write_bytes(altered)
        try:
            with tier.open(block.meta.fingerprint, block.meta.key) as file:
                meta = file.read_meta()
                wanted = [t for name, t in file.layout.tensors.items() if name != "token_ids"]
                read = {t.spec.name: bytearray(t.spec.nbytes) for t in wanted}
                file.read([(t, [np.frombuffer(read[t.spec.name], dtype=np.uint8)]) for t in wanted])
        except LoadError:
            continue
        harmless += 1
        assert meta.tokens == block.meta.tokens
        assert meta.parent == block.meta.parent
        assert set(read) == set(block.tensors), position
        for name, tensor in block.tensors.items():
            assert bytes(read[name]) == tensor.numpy().tobytes()
    assert harmless < 120  # namespace-like fields and spaces, nothing that reaches a model


def test_bytes_on_disk_never_exceed_the_cap_and_ends_of_chains_go_first(tmp_path: Path) -> None:
    cap = 1_000_000
    peak = 0
    stop = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, folder_bytes(tmp_path))
            time.sleep(0.001)

    with AttentionStore(tmp_path, block_size=64, disk=cap, memory="1MiB") as store:
        watcher = threading.Thread(target=sample)
        watcher.start()
        chains = [make_chain([1000 * n + i for i in range(640)], 64) for n in range(12)]
        for n, chain in enumerate(chains):
            save(store, chain, f"session {n}")
            store.flush()
        stop.set()
        watcher.join()
        store.drop_memory()
        assert store.stats()["evicted_blocks"] > 0
        assert 0 < peak <= cap
        for chain in chains:
            present = [store.has(block.meta.key) for block in chain]
            assert present == sorted(present, reverse=True), "a block outlived its ancestor"
        assert all(store.has(block.meta.key) for block in chains[-1])
        for info in store.sessions():
            assert info.tokens == 64 * sum(store.has(b.meta.key) for b in chains[int(info.name.split()[1])])


def test_what_does_not_fit_at_all_leaves_only_whole_beginnings(tmp_path: Path) -> None:
    with AttentionStore(tmp_path, block_size=64, disk=700_000) as store:
        chain = make_chain(list(range(64 * 40)), 64)
        save(store, chain, "a")
        store.drop_memory()
        present = [store.has(block.meta.key) for block in chain]
        assert 0 < sum(present) < len(chain)
        assert present == sorted(present, reverse=True)
        assert store.sessions()[0].tokens == 64 * sum(present)
        assert folder_bytes(tmp_path) <= 700_000


def test_memory_cap_holds_while_the_disk_is_slow(tmp_path: Path) -> None:
    chain = make_chain(list(range(64 * 30)), 64)
    cap = 4 * chain[0].nbytes
    slowly = Surroundings(disk=SlowDisk(2_000_000))  # a block takes 0.005 s
    with AttentionStore(tmp_path, block_size=64, memory=cap, surroundings=slowly) as store:
        seen = []
        stop = threading.Event()

        def sample() -> None:
            while not stop.is_set():
                seen.append(store.stats()["memory_bytes"])
                time.sleep(0.001)

        watcher = threading.Thread(target=sample)
        watcher.start()
        save(store, chain, "a")
        store.flush()
        stop.set()
        watcher.join()
        assert 0 < max(seen) <= cap
        assert same(chain, load(store, chain))


def test_a_full_disk_costs_nothing_but_the_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = make_chain(list(range(64)), 16)
    writev = os.writev

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with AttentionStore(tmp_path, block_size=16) as store:
        monkeypatch.setattr(os, "writev", full)
        with caplog.at_level(logging.WARNING):
            save(store, chain, "a")
            store.flush()
        assert caplog.text.count("No space left") == 1, "one warning, however many blocks"
        assert store.stats()["write_errors"] == len(chain) + 1, "every block tries the first anew; and the session"
        assert block_files(tmp_path) == []
        assert not list((tmp_path / "blocks").rglob("*.partial"))
        assert same(chain, load(store, chain)), "memory still serves what the disk did not take"
        assert store.sessions() == [], "what is not on disk is not promised"
        monkeypatch.setattr(os, "writev", writev)
        other = make_chain(list(range(100, 164)), 16)
        save(store, other, "b")
        store.drop_memory()
        assert same(other, load(store, other)), "saving goes on when there is room again"


def test_a_failed_rename_leaves_nothing_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = make_chain(list(range(16)), 16)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with AttentionStore(tmp_path, block_size=16) as store:
        monkeypatch.setattr(os, "rename", fails)
        save(store, chain, "a")
        store.drop_memory()
        assert not store.has(chain[0].meta.key)
        assert block_files(tmp_path) == []
        assert not list((tmp_path / "blocks").rglob("*.partial"))


def test_disk_zero_keeps_blocks_in_memory_only(tmp_path: Path) -> None:
    chain = make_chain(list(range(32)), 16)
    with AttentionStore(tmp_path, block_size=16, disk=0) as store:
        save(store, chain, "a")
        store.flush()
        assert same(chain, load(store, chain))
        assert block_files(tmp_path) == []


WRITER = """
import sys
from support.store_blocks import make_chain, save
from hf_attnstore import AttentionStore
store = AttentionStore(sys.argv[1], block_size=16)
print("ready", flush=True)
for n in range(10_000):
    save(store, make_chain([n * 1000 + i for i in range(100)], 16), f"session {n % 7}")
    if n % 5 == 0:
        store.flush()
"""


def test_a_killed_writer_leaves_a_store_that_serves_every_committed_session(tmp_path: Path) -> None:
    dice = random.Random(0)
    served = 0
    for _ in range(6):
        process = fresh.Process([sys.executable, "-c", WRITER, tmp_path])
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(dice.uniform(0.02, 0.3))
        process.kill()
        with AttentionStore(tmp_path, block_size=16) as store:
            for info in store.sessions():
                ids = store.tokens(info.name)
                assert ids == list(range(ids[0], ids[0] + 100)), "a manifest was visible before its blocks"
                chain = make_chain(ids, 16)
                assert same(chain, load(store, chain))
                served += 1
            rows = {p.stem for p in block_files(tmp_path)}
            usage = store._disk.index.usage()
            assert usage.blocks == len(rows)
            assert usage.bytes == sum(p.stat().st_size for p in block_files(tmp_path))
            assert usage.pending == 0
    assert served > 6


HOLDER = """
import sys, time
from hf_attnstore import AttentionStore
store = AttentionStore(sys.argv[1], block_size=16)
lock = store.lock_session("a", 0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_session_held_by_another_process_is_busy_until_that_process_dies(tmp_path: Path) -> None:
    process = fresh.Process([sys.executable, "-c", HOLDER, tmp_path])
    assert process.stdout is not None
    process.stdout.readline()
    with AttentionStore(tmp_path, block_size=16) as store:
        with pytest.raises(SessionBusyError, match="another turn"):
            store.lock_session("a", 0)
        store.lock_session("b", 0).release()
        process.kill()
        store.lock_session("a", wait=5).release()


def test_two_stores_on_one_folder_share_blocks_and_see_each_others_sessions(tmp_path: Path) -> None:
    shared = list(range(32))
    with AttentionStore(tmp_path, block_size=16) as one, AttentionStore(tmp_path, block_size=16) as two:
        mine, theirs = make_chain([*shared, 100, 101], 16), make_chain([*shared, 200], 16)
        save(one, mine, "mine")
        one.flush()
        save(two, theirs, "theirs")
        two.flush()
        assert {s.name for s in one.sessions()} == {"mine", "theirs"}
        assert len(block_files(tmp_path)) == 4, "two shared blocks and two ends"
        assert same(theirs, load(one, theirs))


def test_delete_removes_what_only_that_session_used_and_earlier_branches_too(tmp_path: Path) -> None:
    shared = list(range(16))
    with AttentionStore(tmp_path, block_size=16) as store:
        mine = make_chain([*shared, *range(100, 120)], 16)
        branch = make_chain([*shared, *range(300, 320)], 16)
        theirs = make_chain([*shared, *range(200, 210)], 16)
        save(store, mine, "mine")
        save(store, branch, "mine")
        save(store, theirs, "theirs")
        store.delete("mine")
        assert [s.name for s in store.sessions()] == ["theirs"]
        assert {p.stem for p in block_files(tmp_path)} == {b.meta.key.hex() for b in theirs}
        assert not any(store.has(b.meta.key) for b in [*mine[1:], *branch[1:]])
        with pytest.raises(SessionNotFoundError, match="no session 'mine'"):
            store.delete("mine")


def test_a_fork_copies_nothing_and_outlives_its_source(tmp_path: Path) -> None:
    chain = make_chain(list(range(40)), 16)
    with AttentionStore(tmp_path, block_size=16) as store:
        save(store, chain, "source")
        store.set_metadata("source", {"title": "a talk"})
        store.flush()
        before = block_files(tmp_path)
        store.fork("source", "copy")
        assert block_files(tmp_path) == before
        assert store.metadata("copy") == {"title": "a talk"}
        with pytest.raises(AttentionStoreError, match="exists already"):
            store.fork("source", "copy")
        store.delete("source")
        store.drop_memory()
        assert same(chain, load(store, chain))
        assert store.tokens("copy") == list(range(40))


def test_a_longer_block_takes_the_place_of_the_short_one_for_everybody(tmp_path: Path) -> None:
    with AttentionStore(tmp_path, block_size=16) as store:
        short = make_chain([1, 2, 3], 16)
        save(store, short, "a")
        store.flush()
        store.fork("a", "b")
        long = make_chain([1, 2, 3, 4, 5], 16)
        assert store.reserve(long[0].nbytes)
        store.put(long[0], supersedes=short[0].meta.key)
        store.flush()
        assert [p.stem for p in block_files(tmp_path)] == [long[0].meta.key.hex()]
        assert store.tokens("a") == store.tokens("b") == [1, 2, 3]
        stranger = make_block(long[0].meta.parent, [9, 9, 9, 9], 0)
        assert store.reserve(stranger.nbytes)
        store.put(stranger, supersedes=long[0].meta.key)
        store.flush()
        assert len(block_files(tmp_path)) == 2, "a block that does not begin alike supersedes nothing"


def test_namespaces_never_meet(tmp_path: Path) -> None:
    with (
        AttentionStore(tmp_path, block_size=16, namespace="x") as one,
        AttentionStore(tmp_path, block_size=16, namespace="y") as two,
    ):
        save(one, make_chain([1, 2, 3], 16, namespace="x"), "a")
        one.flush()
        assert two.sessions() == []
        assert make_chain([1, 2, 3], 16, namespace="x")[0].meta.key != make_chain([1, 2, 3], 16, "y")[0].meta.key
        two.lock_session("a", 0).release()


NAMES = ["../../etc/passwd", "a/b\\c", "..", "日本語 🎏", 'it\'s "quoted"; --', "a\0b", "x" * 1024]


@pytest.mark.parametrize("name", NAMES)
def test_any_text_can_name_a_session_and_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    root = tmp_path / "store"
    with AttentionStore(root, block_size=16) as store:
        save(store, make_chain([1, 2], 16), name)
        store.lock_session(name, 0).release()
        assert [s.name for s in store.sessions()] == [name]
        store.fork(name, "other")
        store.delete(name)
        assert [s.name for s in store.sessions()] == ["other"]
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    assert {p.suffix for p in root.rglob("*") if p.is_file()} <= {
        ".json",
        ".sqlite",
        ".safetensors",
        ".lock",
        ".session",
    }


@pytest.mark.parametrize("name", ["x\x1f1", "x\x1f", "\x1f", "x\x1f1\x1f2", "x\x1fy"])
def test_the_character_that_parts_of_sessions_have_in_their_names_is_refused_wherever_a_name_is_given(
    name: str, tmp_path: Path
) -> None:
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        save(store, make_chain([1, 2], 16), "x")
        store.export_session("x", tmp_path / "x.safetensors")
        for give in (
            lambda: store.set_metadata(name, {}),
            lambda: store.fork("x", name),
            lambda: store.rename("x", name),
            lambda: store.import_session(tmp_path / "x.safetensors", name),
            lambda: store.schedule([name]),
            lambda: store.expect(name),
            lambda: store.check_name(name),
        ):
            with pytest.raises(SessionNameError, match=r"U\+001F"):
                give()
        assert [s.name for s in store.sessions()] == ["x"]


def test_control_characters_in_names_mean_nothing(tmp_path: Path) -> None:
    """Every other one, each a session of its own, listed and deleted alone."""
    names = [f"x{chr(code)}1" for code in (*range(0x1F), *range(0x7F, 0xA0), 0x2028, 0x202E, 0xFEFF)]
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        for name in ("x", *names):
            store.set_metadata(name, {"name": name})
        store.delete("x")
        assert {s.name for s in store.sessions()} == set(names)
        assert all(store.metadata(name) == {"name": name} for name in names)


@pytest.mark.parametrize("name", ["", "x" * 1025, "a" * 10_000, "\ud800", 7])
def test_a_name_that_cannot_be_kept_is_refused_clearly(tmp_path: Path, name: object) -> None:
    with AttentionStore(tmp_path, block_size=16) as store, pytest.raises(SessionNameError):
        store.set_metadata(name, {})  # type: ignore[arg-type]


def test_a_store_says_clearly_why_it_cannot_be_opened(tmp_path: Path) -> None:
    AttentionStore(tmp_path / "good", block_size=16).close()
    with pytest.raises(StoreFormatError, match="block_size=16"):
        AttentionStore(tmp_path / "good", block_size=32)
    manifest = tmp_path / "good" / "store.json"
    manifest.write_text('{"format": 99, "block_size": 16}')
    with pytest.raises(StoreFormatError, match="format 99"):
        AttentionStore(tmp_path / "good", block_size=16)
    manifest.write_text("{")
    with pytest.raises(StoreFormatError, match="damaged"):
        AttentionStore(tmp_path / "good", block_size=16)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(StoreFormatError, match="not empty"):
        AttentionStore(tmp_path / "foreign")
    (tmp_path / "file").touch()
    with pytest.raises(AttentionStoreError):
        AttentionStore(tmp_path / "file")
    for size in ("many", -1, "-1GiB", 1.5, True):
        with pytest.raises(AttentionStoreError):
            AttentionStore(tmp_path / "sizes", memory=size)  # type: ignore[arg-type]


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = AttentionStore(tmp_path, block_size=16)
    store.close()
    store.close()
    for use in (store.sessions, store.flush, store.stats):
        with pytest.raises(StoreClosedError, match="closed"):
            use()


def test_a_file_deleted_while_it_is_being_read_is_still_read_right(tmp_path: Path) -> None:
    chain = make_chain(list(range(32)), 16)
    with AttentionStore(tmp_path, block_size=16) as store:
        save(store, chain)
        store.drop_memory()
        block = chain[1]
        targets = {name: tensor.clone().zero_() for name, tensor in block.tensors.items()}
        piece = Piece(block.meta.key, 0, 16)
        running = store.load([Stage([piece], {name: target}) for name, target in targets.items()])
        running.wait(0)
        for path in block_files(tmp_path):
            path.unlink()
        for stage in range(1, 4):
            running.wait(stage)
        running.finish()
        assert same([block], [targets])


def test_loading_many_times_leaks_no_file_descriptors(tmp_path: Path) -> None:
    chain = make_chain(list(range(64)), 16)
    with AttentionStore(tmp_path, block_size=16) as store:
        save(store, chain, "a")
        store.drop_memory()
        load(store, chain)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            load(store, chain)
            store.describe(chain[0].meta.key)
        assert len(os.listdir("/proc/self/fd")) < before + 25  # what runs in the background has files open for a moment


def test_nothing_in_the_package_pickles() -> None:
    package = HERE.parents[1] / "hf_attnstore"
    paths = list(package.rglob("*.py"))
    assert len(paths) > 100
    for path in paths:
        if "bench" not in path.parts:  # the benchmark compares with torch.save, as people do it today
            text = path.read_text()
            assert "import pickle" not in text
            assert "pickle." not in text.replace("be pickled", "")
            assert "torch.save(" not in text
            assert "torch.load(" not in text


def test_over_the_cap_there_is_one_warning_however_much_small_fits_between(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="hf_attnstore")
    with AttentionStore(tmp_path, disk="600KiB", block_size=8192) as store:
        for turn in range(4):
            small, large = make_chain([turn] * 20, 8192), make_chain([100 + turn] * 8192, 8192)
            assert large[0].nbytes > 600 << 10 > small[0].nbytes
            save(store, small, f"small {turn}")
            save(store, large)
            store.flush()
        assert store.session_count() == 4
    assert [record.message for record in caplog.records if "is full" in record.message] == [
        f"the store {tmp_path} is full, new KV is not kept on disk (cap 600.0 KiB)"
    ]
