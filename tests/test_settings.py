"""What is set by the environment and a file: which goes first, what is refused, and what a store makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.store_blocks import make_chain, save
from typer.testing import CliRunner

from hf_attnstore import AttentionStore, AttentionStoreError, SettingsError
from hf_attnstore.cache.costs.gate import wanted
from hf_attnstore.cli.app import app
from hf_attnstore.settings import SETTINGS, Set, config_file, find, value_of
from hf_attnstore.store.disk.surroundings import Clock, Surroundings
from hf_attnstore.store.expiry import EVERY


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file with settings may be; nothing else is set."""
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.delenv("ATTNSTORE_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_file() == tmp_path / "attnstore.toml"
    return config_file()


def test_the_environment_goes_before_the_file_and_that_before_the_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find("memory") == Set("2GiB", "default")
    file.write_text('memory = "3GiB"\nolder_than = 30\n')
    assert find("memory") == Set("3GiB", str(file))
    assert value_of("older_than") == "30"
    monkeypatch.setenv("ATTNSTORE_MEMORY", "4GiB")
    assert find("memory") == Set("4GiB", "ATTNSTORE_MEMORY")
    monkeypatch.setenv("ATTNSTORE_MEMORY", "")
    assert value_of("memory") == "3GiB"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memory: 3GiB", "no TOML file"),
        ('memroy = "3GiB"', "sets 'memroy', which is no setting: there are store, memory"),
        ("memory = [1]", "memory is a text or a number"),
        ("gate = false", "gate is a text or a number"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_and_says_why(text: str, says: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError, match=says):
        AttentionStore()


def test_a_file_that_is_named_has_to_be_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSTORE_CONFIG", str(file.with_name("other.toml")))
    with pytest.raises(SettingsError, match="can't be read: No such file"):
        value_of("memory")
    file.with_name("other.toml").write_text('disk = "7MiB"')
    assert value_of("disk") == "7MiB"


def caps(store: AttentionStore) -> list[int | float]:
    return [store.stats()[f"{tier}_capacity"] for tier in ("memory", "disk", "device")]


def test_a_store_is_opened_as_set_unless_told_otherwise(file: Path, tmp_path: Path) -> None:
    file.write_text(f'store = "{tmp_path / "kept"}"\nmemory = "8MiB"\ndisk = 16777216\non_device = "5MiB"\n')
    with AttentionStore() as store:
        assert store.path == tmp_path / "kept"
        assert caps(store) == [8 << 20, 16 << 20, 5 << 20]
    with AttentionStore(tmp_path / "other", memory=0, disk="1GiB", on_device=0) as store:
        assert caps(store) == [0, 1 << 30, 0]


@pytest.mark.parametrize("setting", ['durability = "always"', 'policy = "best"', 'memory = "much"', 'older_than = "x"'])
def test_a_value_that_can_not_be_is_refused_by_the_store(setting: str, file: Path, tmp_path: Path) -> None:
    file.write_text(setting)
    with pytest.raises(AttentionStoreError):
        AttentionStore(tmp_path / "store")


def test_the_gate_is_a_setting(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted(None)
    file.write_text('gate = "off"')
    assert not wanted(None)
    assert wanted(True)
    monkeypatch.setenv("ATTNSTORE_GATE", "on")
    assert wanted(None)


class Later(Clock):
    """The machine's clock, set forward by so many seconds."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


def names(store: AttentionStore) -> list[str]:
    store._fetcher.drain()
    return sorted(info.name for info in store.sessions())


def test_sessions_without_a_turn_for_so_many_days_go_in_all_namespaces(tmp_path: Path, file: Path) -> None:
    clock = Later()
    ours: dict[str, object] = {"block_size": 16, "surroundings": Surroundings(clock=clock)}
    with AttentionStore(tmp_path / "store", **ours) as store:  # type: ignore[arg-type]
        save(store, make_chain(list(range(40)), 16), "alice")
        save(store.in_namespace("ada"), make_chain(list(range(40)), 16), "bob")
    clock.ahead = 29 * 86400
    file.write_text("older_than = 30")
    with AttentionStore(tmp_path / "store", **ours) as store:  # type: ignore[arg-type]
        assert names(store) == ["alice"]
        clock.ahead = 31 * 86400
        lock = store.lock_session("alice", 0)
        save(store, make_chain(list(range(50, 90)), 16), "carol")  # a turn, by which it is looked again
        assert names(store) == ["alice", "carol"], "a turn is running on it"
        lock.release()
        assert names(store.in_namespace("ada")) == []
        save(store, make_chain(list(range(50, 90)), 16), "carol")
        assert names(store) == ["alice", "carol"], "not so soon again"
        clock.ahead += EVERY + 1
        with_none = {**ours, "older_than": float("inf")}
        AttentionStore(tmp_path / "store", **with_none).close()  # type: ignore[arg-type]
        assert "alice" in names(store)
        save(store, make_chain(list(range(50, 90)), 16), "carol")
        assert "alice" not in names(store)


def test_the_command_says_what_is_set_and_by_whom(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSTORE_STORE", str(tmp_path / "mine"))
    file.write_text('memory = "3GiB"')
    output = CliRunner().invoke(app, ["config"], env={"COLUMNS": "600"}).stdout
    assert re.search(rf"store .* {tmp_path}/mine .* ATTNSTORE_STORE ", output)
    assert re.search(rf"memory .* 3GiB .* {file} ", output)
    assert re.search(r"disk .* 50GiB .* default ", output)
    found = json.loads(CliRunner().invoke(app, ["config", "--json"]).stdout)
    assert found["memory"] == {"value": "3GiB", "origin": str(file)}
    assert found.keys() == {setting.name for setting in SETTINGS}
    file.write_text("memory")
    wrong = CliRunner().invoke(app, ["config"])
    assert wrong.exit_code == 1
    assert "is no TOML file" in wrong.stderr
