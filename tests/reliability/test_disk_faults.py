"""Disks that are full, failing, read-only or gone: generating goes on, one warning tells, and saving comes back."""

import errno
import logging
import os
import resource
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import save_tiny_chat_model
from support.store_blocks import load, make_chain, same, save
from support.tiny_models import make_model
from support.turns import follow_up, tokens, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, AttentionStoreError, ChatSession, LoadError
from hf_attnstore.chat.model import load_chat_model
from hf_attnstore.store.disk.surroundings import Clock, Surroundings
from hf_attnstore.store.index.database import Database
from hf_attnstore.store.records.files import tree_bytes

_NOBODY = 65534


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 2 MiB."""
    point = tmp_path / "disk"
    point.mkdir()
    done = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(point)], capture_output=True, text=True, check=False
        )
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip("mounting a file system needs more rights than this user has")
    yield point
    subprocess.run(["umount", "--lazy", str(point)], check=True)


def fill(filler: Path) -> None:
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_full_file_system_costs_the_saving_and_nothing_else(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with AttentionStore(small_disk / "store", block_size=64) as store:
        first = make_chain(list(range(64)), 64)
        save(store, first, "kept")
        store.flush()
        filler = small_disk / "filler"
        fill(filler)
        with caplog.at_level(logging.WARNING):
            for number in range(5):
                save(store, make_chain([1000 * number + i for i in range(64 * 8)], 64), f"lost {number}")
            store.flush()
        assert len(warnings(caplog)) == 1
        assert store.stats()["write_errors"] > 0
        store.drop_memory()
        assert same(first, load(store, first))
        with AttentionStore(small_disk / "store") as other:
            assert same(first, load(other, first)), "a store can be opened on a full disk"
            assert other.tokens("kept") == list(range(64))
        filler.unlink()
        after = make_chain(list(range(5000, 5064)), 64)
        save(store, after, "after")
        store.drop_memory()
        assert same(after, load(store, after))
        assert {"kept", "after"} <= {info.name for info in store.sessions()}
        assert store.verify().problems == []
    with AttentionStore(small_disk / "store") as store:
        assert same(after, load(store, after))
        assert not store._disk.index.wrong_accounts()


def test_generating_goes_on_while_the_file_system_is_full(small_disk: Path) -> None:
    model, other = make_model(), make_model()
    with AttentionStore(small_disk / "store", block_size=16) as store:
        prompt = tokens(40)
        for number in range(12):
            if number == 3:
                (small_disk / "filler").write_bytes(bytes(max(shutil.disk_usage(small_disk).free - 8192, 0)))
            if number == 8:
                (small_disk / "filler").unlink()
            cache = AttentionStoreCache(model, "alice", store)
            ours = turn(model, prompt, cache).sequences
            assert torch.equal(ours, turn(other, prompt, None).sequences)
            prompt = follow_up(ours, 5, number)
        store.drop_memory()
        again = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, prompt, again).sequences, turn(other, prompt, None).sequences)
        assert again.reused_tokens > 100, "what was computed after there was room again was kept"


@pytest.fixture
def as_mortal() -> Iterator[Path]:
    """A folder of a user to whom permissions matter, and that user."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, _NOBODY, _NOBODY)
        os.seteuid(_NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o700)
    shutil.rmtree(folder)


def set_modes(root: Path, mode: int) -> None:
    for path in [folder for folder, _, _ in os.walk(root)]:
        os.chmod(path, mode)


def test_folders_that_turn_read_only_are_still_read(as_mortal: Path, caplog: pytest.LogCaptureFixture) -> None:
    chain = make_chain(list(range(64)), 16)
    root = as_mortal / "store"
    with AttentionStore(root, block_size=16) as store:
        save(store, chain, "kept")
        store.drop_memory()
        set_modes(root, 0o500)
        with caplog.at_level(logging.WARNING):
            assert same(chain, load(store, chain))
            store.lock_session("other", 0).release()
            save(store, make_chain(list(range(100, 164)), 16), "lost")
            store.flush()
            with pytest.raises(AttentionStoreError):
                store.export_session("kept", root / "export")
        assert len(warnings(caplog)) == 2, "no lock for the session, no saving"
        assert same(chain, load(store, chain))
        set_modes(root, 0o700)
        after = make_chain(list(range(200, 264)), 16)
        save(store, after, "after")
        store.drop_memory()
        assert same(after, load(store, after))
        assert store.tokens("kept") == list(range(64))
    set_modes(root, 0o500)
    with pytest.raises(AttentionStoreError, match="denied"):
        AttentionStore(root / "below")


@pytest.mark.parametrize("how", ["deleted", "replaced by an empty folder", "replaced by another store"])
def test_a_folder_that_vanishes_is_begun_anew(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, other = make_model(), make_model()
    root = tmp_path / "store"
    with AttentionStore(root, block_size=16) as store, caplog.at_level(logging.WARNING):
        prompt = tokens(40)
        sequence = turn(model, prompt, AttentionStoreCache(model, "alice", store)).sequences
        store.drop_memory()
        shutil.rmtree(root)
        if how != "deleted":
            root.mkdir(mode=0o700)
        if how == "replaced by another store":
            AttentionStore(root, block_size=16).close()
        for number in range(3):
            prompt = follow_up(sequence, 5, number)
            cache = AttentionStoreCache(model, "alice", store)
            sequence = turn(model, prompt, cache).sequences
            assert torch.equal(sequence, turn(other, prompt, None).sequences)
            store.drop_memory()
        assert cache.reused_tokens == 0 or cache.reused_tokens > 40
        fresh = tokens(40, seed=9)
        turn(model, fresh, AttentionStoreCache(model, "bob", store))
        store.drop_memory()
        assert any("deleted or replaced" in message for message in warnings(caplog))
        assert "bob" in {info.name for info in store.sessions()}
        assert store.verify().problems == []
    with AttentionStore(root, block_size=16) as store:
        again = AttentionStoreCache(model, "bob", store)
        assert torch.equal(turn(model, fresh, again).sequences, turn(other, fresh, None).sequences)
        assert again.reused_tokens == 39


def test_a_chat_goes_on_while_the_disk_is_full_and_is_kept_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load_chat_model(str(save_tiny_chat_model(tmp_path / "model")))
    real = os.writev

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with AttentionStore(tmp_path / "store", block_size=16) as store:
        chat = ChatSession(model, tokenizer, store, "alice", max_new_tokens=6)
        chat.send("the old prince")
        store.flush()
        monkeypatch.setattr(os, "writev", full)
        with caplog.at_level(logging.WARNING):
            chat.send("and then")
        assert "messages of session 'alice' are not kept" in caplog.text
        assert len(chat.history) == 4
        monkeypatch.setattr(os, "writev", real)
        chat.send("he said")
        history = chat.history
    with AttentionStore(tmp_path / "store") as store:
        again = ChatSession(model, tokenizer, store, "alice", max_new_tokens=6)
        assert again.history == history
        again.send("and now")
        assert again.stats is not None
        assert again.stats.reused_tokens > 20


FAULTS = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EDQUOT]


@pytest.mark.parametrize("code", FAULTS, ids=[errno.errorcode[code] for code in FAULTS])
@pytest.mark.parametrize("call", ["open", "writev", "rename"])
def test_any_error_of_any_call_when_writing_is_survived(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real: Callable[..., Any] = getattr(os, call)

    def fails(*arguments: Any, **options: Any) -> Any:
        writing = call != "open" or (arguments[1] & os.O_CREAT and "partial" in str(arguments[0]))
        if writing:
            raise OSError(code, os.strerror(code), str(arguments[0]))
        return real(*arguments, **options)

    chain = make_chain(list(range(64)), 16)
    with AttentionStore(tmp_path, block_size=16) as store:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(os, call, fails)
            save(store, chain, "a")
            store.flush()
            assert same(chain, load(store, chain)), "memory serves what the disk did not take"
        assert len(warnings(caplog)) == 1
        assert store.stats()["write_errors"] > 0
        assert store._disk.index.usage().bytes == 0
        store._memory.drop_clean()
        save(store, chain, "a")
        store.drop_memory()
        assert same(chain, load(store, chain))
        assert store.verify().problems == []
        assert store._disk.index.usage().pending == 0


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("call", ["open", "pread", "preadv"])
def test_an_error_when_reading_is_no_reason_to_throw_a_block_away(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = make_model(), make_model()
    with AttentionStore(tmp_path, block_size=16) as store:
        sequence = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
        prompt = follow_up(sequence, 5, 1)
        expected = turn(other, prompt, None).sequences
        store.drop_memory()
        files = tree_bytes(tmp_path / "blocks")
        real: Callable[..., Any] = getattr(os, call)

        def fails(*arguments: Any, **options: Any) -> Any:
            if call != "open" or str(arguments[0]).endswith(".safetensors"):
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(os, call, fails)
            cache = AttentionStoreCache(model, "alice", store, save=False)
            assert torch.equal(turn(model, prompt, cache).sequences, expected)
            assert cache.reused_tokens == 0
            assert "failed" in cache.stats.recomputed
            assert cache.stats.missed == "load failed"
        assert store.stats()["read_errors"] > 0
        assert store.stats()["rejected"] == 0
        assert tree_bytes(tmp_path / "blocks") == files
        assert tree_bytes(tmp_path / "quarantine") == 0
        store._disk._unreadable.clear()  # half a minute later
        again = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, prompt, again).sequences, expected)
        assert again.reused_tokens > 70


class _SetClock(Clock):
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_an_unreadable_block_is_tried_again_after_a_while(tmp_path: Path) -> None:
    chain = make_chain(list(range(16)), 16)
    key = chain[0].meta.key
    clock = _SetClock()
    with AttentionStore(tmp_path, block_size=16, surroundings=Surroundings(clock)) as store:
        save(store, chain)
        store.drop_memory()
        store._disk.failed(key, LoadError("the cable was out", transient=True))
        assert not store.has(key)
        clock.now += 60
        assert store.has(key)
        assert same(chain, load(store, chain))


def test_an_index_that_can_not_be_read_or_written_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = make_model(), make_model()

    class Failing:
        def __init__(self, real: sqlite3.Connection) -> None:
            self._real = real

        def execute(self, *_: Any) -> Any:
            raise sqlite3.OperationalError("disk I/O error")

        executemany = execute

        def close(self) -> None:
            self._real.close()

    with AttentionStore(tmp_path, block_size=16) as store:
        sequence = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
        store.drop_memory()
        database: Database = store._disk.index.database
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(database, "_reader", Failing(database._reader))
            patch.setattr(database, "_writer", Failing(database._writer))
            prompt = follow_up(sequence, 5, 1)
            for _ in range(3):
                cache = AttentionStoreCache(model, "bob", store)
                assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
            store.flush()
        messages = warnings(caplog)
        assert len([message for message in messages if "can't be read" in message]) == 1
        assert len([message for message in messages if "failed, conversations are not kept" in message]) == 1
        again = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, prompt, again).sequences, turn(other, prompt, None).sequences)
        assert again.reused_tokens > 70
        assert not (tmp_path / "index.damaged").exists(), "an error of the disk is not damage"


def test_too_many_open_files_are_survived(tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    with AttentionStore(tmp_path, block_size=16) as store:
        sequence = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
        prompt = follow_up(sequence, 5, 1)
        expected = turn(other, prompt, None).sequences
        store.drop_memory()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
            with suppress(OSError):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            assert len(held) > 50
            cache = AttentionStoreCache(model, "alice", store)
            assert torch.equal(turn(model, prompt, cache).sequences, expected)
            store._writer.drain()
        finally:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert store.stats()["rejected"] == 0
        store._disk._unreadable.clear()
        again = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, prompt, again).sequences, expected)
        assert again.reused_tokens > 70
        assert store.verify().problems == []
