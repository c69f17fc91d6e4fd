"""The commands that look after a store: what they show, change, and say when something is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support import fresh
from support.store_blocks import load, make_chain, same, save
from typer.testing import CliRunner, Result

from hf_attnstore import AttentionStore
from hf_attnstore.cli import app as cli
from hf_attnstore.sizes import format_bytes
from hf_attnstore.ui.identity import namespace_of

KEY = bytes(range(32))


def attnstore(*arguments: str | Path, typed: str = "", **env: str) -> Result:
    environment = {"COLUMNS": "200", **env}
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=typed, env=environment)


def run(*arguments: str | Path, **options: Any) -> str:
    result = attnstore(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of three sessions."""
    root = tmp_path / "store"
    with AttentionStore(root, block_size=16) as store:
        save(store, make_chain(list(range(40)), 16), "alice")
        save(store, make_chain([*range(16), *range(100, 110)], 16), "bob")
        save(store, make_chain(list(range(200, 216)), 16), "carol [x]")
        store.flush()
        store.set_metadata("alice", {"title": "a talk"})
        store.count_turn(30, 40, 1000, 0.001, 0.0005)
        store.count_turn(0, 40, 0, 0, 0, "other model")
    return root


def block_files(root: Path) -> list[Path]:
    return sorted(root.glob("blocks/*/*/*.safetensors"))


def test_ls_pages_and_prints_json(folder: Path) -> None:
    output = run("ls", "--store", folder)
    assert all(name in output for name in ("alice", "bob", "carol [x]"))
    page = run_json("ls", "--store", folder, "--limit", "2", "--offset", "1")
    assert page["total"] == 3
    assert len(page["sessions"]) == 2
    facts = {"name", "tokens", "bytes", "created", "last_used", "fingerprint", "length", "namespace", "model"}
    assert facts == set(page["sessions"][0])
    assert "--offset 2 goes on" in run("ls", "--store", folder, "--limit", "2")
    assert "no sessions" in run("ls", "--store", folder, "--namespace", "somebody")


def test_ls_says_whose_they_are_and_what_they_share(folder: Path) -> None:
    with AttentionStore(folder) as store:
        save(store.in_namespace("team"), make_chain(list(range(40)), 16), "dora")
        save(store.in_namespace(namespace_of({}, "ada")), make_chain(list(range(40)), 16), "eve")
        fingerprint = store.session("alice").fingerprint
        store.set_model_name(fingerprint, "SmolLM2 (LlamaForCausalLM)")
        together, alone = store.bytes_together(), store.bytes_together("alice", "bob", "carol [x]")
        assert together == alone < sum(info.bytes for info in store.sessions())
    output = run("ls", "--store", folder)
    assert "SmolLM2 (LlamaForCausalLM)" in output
    assert f"3 conversations, {format_bytes(together)} together" in output
    assert "dora" not in output
    everything = run("ls", "--store", folder, "--all")
    assert all(name in everything for name in ("alice", "dora", "eve", "team", "5 conversations"))
    assert "eve" in run("ls", "--store", folder, "--account", "ada")
    assert run_json("ls", "--store", folder, "--all")["total"] == 5
    of_ada = ("--store", folder, "--account", "ada")
    run("rename", "eve", "fay", *of_ada)
    run("fork", "fay", "gus", *of_ada)
    run("rm", "gus", "--yes", *of_ada)
    assert [info["name"] for info in run_json("ls", *of_ada)["sessions"]] == ["fay"]


def test_show_has_what_was_said(folder: Path) -> None:
    said = [{"role": "user", "content": "[so] it is"}, {"role": "assistant", "content": "It is."}]
    with AttentionStore(folder) as store:
        store.set_metadata("bob", {"chat": {"messages": said}})
    assert run("show", "bob", "--messages", "--store", folder) == "user: [so] it is\nassistant: It is.\n"
    assert "no messages are kept" in run("show", "alice", "--messages", "--store", folder)


def test_rm_says_what_it_really_sets_free(folder: Path) -> None:
    def freed(*names: str) -> int:
        said = run("rm", *names, "--store", folder, "--dry-run")
        with AttentionStore(folder) as store:
            free = store.bytes_only_in(*names)
        assert f"sets {format_bytes(free)} free" in said
        return free

    one, other, both = freed("alice"), freed("bob"), freed("alice", "bob")
    assert one + other < both, "the block that both have goes with the second of them"
    before = sum(path.stat().st_size for path in block_files(folder))
    run("rm", "alice", "bob", "--store", folder, "--yes")
    assert before - sum(path.stat().st_size for path in block_files(folder)) == both


def test_verify_and_repair_name_the_conversations_and_what_was_lost(folder: Path) -> None:
    with AttentionStore(folder) as store:
        second = store.manifest("alice").spans[1].block.hex()
    (path,) = [path for path in block_files(folder) if path.stem == second]
    path.unlink()
    lost = "alice: KV of the first 16 of 40 tokens is whole"
    found = attnstore("verify", "--store", folder)
    assert found.exit_code == 1
    assert lost in found.stdout
    assert "bob: KV" not in found.stdout
    repaired = run_json("repair", "--store", folder)
    assert repaired["affected"] == [{"namespace": "", "name": "alice", "whole": 16, "tokens": 40}]
    assert run_json("verify", "--store", folder)["affected"] == []


def test_a_store_of_a_newer_version_says_to_upgrade(folder: Path) -> None:
    settings = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**settings, "format": settings["format"] + 1}))
    said = attnstore("ls", "--store", folder).stderr
    assert "pip install --upgrade hf-attnstore" in said
    assert "delete" not in said


def test_show_tells_what_a_session_consists_of(folder: Path) -> None:
    found = run_json("show", "alice", "--store", folder)
    assert found["tokens"] == found["length"] == 40
    assert [span["stop"] for span in found["spans"]] == [16, 16, 8]
    assert found["metadata"] == {"title": "a talk"}
    output = run("show", "carol [x]", "--store", folder)
    assert "carol [x]" in output
    assert "16" in output
    wrong = attnstore("show", "nobody", "--store", folder)
    assert wrong.exit_code == 1
    assert "no session 'nobody'" in wrong.stderr
    assert "Traceback" not in wrong.output


def test_rm_asks_shows_and_deletes(folder: Path) -> None:
    before = block_files(folder)
    assert "40 tokens" in run("rm", "alice", "--store", folder, "--dry-run")
    assert attnstore("rm", "alice", "--store", folder, typed="n\n").exit_code == 1
    assert attnstore("rm", "alice", "nobody", "--store", folder, "--yes").exit_code == 1, "all or nothing"
    assert block_files(folder) == before
    run("rm", "alice", "--store", folder, typed="y\n")
    assert len(block_files(folder)) == len(before) - 2, "what bob shares stays"
    run("rm", "bob", "carol [x]", "--store", folder, "--yes", "--secure")
    assert block_files(folder) == []
    assert run_json("ls", "--store", folder)["total"] == 0


def test_rename_and_fork(folder: Path) -> None:
    run("rename", "alice", "anna", "--store", folder)
    run("fork", "anna", "copy", "--store", folder)
    names = {session["name"] for session in run_json("ls", "--store", folder)["sessions"]}
    assert names == {"anna", "copy", "bob", "carol [x]"}
    assert run_json("show", "anna", "--store", folder)["metadata"] == {"title": "a talk"}
    for command in ("rename", "fork"):
        result = attnstore(command, "anna", "bob", "--store", folder)
        assert result.exit_code == 1
        assert "exists already" in result.stderr
    assert run_json("verify", "--store", folder)["problems"] == []


def test_a_tool_does_not_evict_what_a_larger_cap_had_room_for(folder: Path) -> None:
    before = block_files(folder)
    for number in range(20):
        run("fork", "alice", f"copy {number}", "--store", folder)
    assert block_files(folder) == before


def test_verify_finds_and_repair_mends(folder: Path) -> None:
    assert "all is well" in run("verify", "--store", folder)
    damaged, lost = block_files(folder)[:2]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    lost.unlink()
    result = attnstore("verify", "--store", folder, "--json")
    assert result.exit_code == 1
    kinds = {problem["kind"] for problem in json.loads(result.stdout)["problems"]}
    assert kinds == {"damaged block", "missing block"}
    assert damaged.exists(), "verify changes nothing"
    assert attnstore("repair", "--store", folder, "--dry-run").exit_code == 1
    assert damaged.exists()
    assert "repaired" in run("repair", "--store", folder)
    assert not damaged.exists()
    assert (folder / "quarantine" / damaged.name).exists()
    assert run_json("verify", "--store", folder)["problems"] == []
    assert run_json("ls", "--store", folder)["total"] == 3


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_lost_index_is_made_anew_from_the_files(how: str, folder: Path) -> None:
    before = {name: run_json("show", name, "--store", folder) for name in ("alice", "bob", "carol [x]")}
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    if how == "replaced":
        with AttentionStore(folder.parent / "other", block_size=16):
            pass
        (folder.parent / "other" / "index.sqlite").rename(folder / "index.sqlite")
        result = attnstore("verify", "--store", folder)
        assert result.exit_code == 1, "the files are there, the index knows nothing of them"
        assert "unknown file" in result.output
        assert "repaired" in run("repair", "--store", folder)
    assert "all is well" in run("verify", "--store", folder), "opening alone made it anew"
    after = {name: run_json("show", name, "--store", folder) for name in before}
    assert after == before
    with AttentionStore(folder) as store:
        chain = make_chain(list(range(40)), 16)
        assert same(chain, load(store, chain))


def test_a_block_that_turns_out_whole_comes_back_from_quarantine(folder: Path) -> None:
    path = block_files(folder)[0]
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    run("repair", "--store", folder)
    aside = folder / "quarantine" / path.name
    aside.write_bytes(content)
    run("repair", "--store", folder)
    assert path.exists()
    assert not aside.exists()
    assert run_json("verify", "--store", folder)["problems"] == []


def test_repair_wants_the_store_for_itself(folder: Path) -> None:
    with AttentionStore(folder):
        result = attnstore("repair", "--store", folder)
        assert result.exit_code == 1
        assert "in use" in result.stderr
        assert "all is well" in run("verify", "--store", folder), "the others work meanwhile"
    assert attnstore("repair", "--store", folder).exit_code == 0


def test_gc_removes_what_nobody_needs(folder: Path) -> None:
    orphan = block_files(folder)[0]
    stranger = orphan.with_name("ab" * 32 + ".safetensors")
    stranger.write_bytes(orphan.read_bytes())
    (folder / "quarantine" / "old").write_bytes(b"x")
    with AttentionStore(folder) as store:
        store.lock_session("once", 0).release()
        save(store, make_chain(list(range(500, 516)), 16))
    would = run_json("gc", "--store", folder, "--dry-run", "--unowned")
    assert {Path(path).name for path in would["files"]} == {stranger.name, "old"}
    assert would["unowned_blocks"] == 1
    assert stranger.exists()
    done = run_json("gc", "--store", folder, "--unowned")
    assert {**done, "bytes": 0} == {**would, "bytes": 0}
    assert not stranger.exists()
    assert not list((folder / "quarantine").iterdir())
    assert {path.name for path in (folder / "locks").iterdir()} == {"open.lock", "gate.lock", "write.lock"}
    assert run_json("verify", "--store", folder)["problems"] == []
    old = run_json("gc", "--store", folder, "--older-than", "1", "--dry-run")
    assert old["sessions"] == []
    assert sorted(run_json("gc", "--store", folder, "--older-than", "0")["sessions"]) == ["alice", "bob", "carol [x]"]
    assert block_files(folder) == []


def test_stats_show_what_all_processes_did(folder: Path) -> None:
    found = run_json("stats", "--store", folder)
    assert found["turns"] == 2
    assert found["hit_rate"] == 0.5
    assert found["missed: other model"] == 1
    assert found["disk_blocks"] == len(block_files(folder))
    assert found["load_bytes_per_second"] == pytest.approx(1e6)
    assert found["written_bytes"] == sum(path.stat().st_size for path in block_files(folder))
    assert found["write_bytes_per_second"] > 0
    output = run("stats", "--store", folder)
    assert "missed: other model" in output
    assert "50%" in output


def test_export_and_import(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "alice.safetensors"
    assert "40 tokens" in run("export", "alice", file, "--store", folder)
    assert attnstore("export", "alice", file, "--store", folder).exit_code == 1, "nothing is written over unasked"
    run("export", "alice", file, "--store", folder, "--force")
    run("import", file, "--store", folder, "--name", "again")
    run("import", file, "--store", folder, "--namespace", "somebody")
    assert run_json("show", "again", "--store", folder)["tokens"] == 40
    file.write_bytes(file.read_bytes()[:-1])
    result = attnstore("import", file, "--store", folder, "--name", "third")
    assert result.exit_code == 1
    assert "can't read" in result.stderr


def test_an_encrypted_store_takes_its_key_from_the_environment(tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "store", block_size=16, encryption_key=KEY) as store:
        save(store, [], "alice")
    result = attnstore("ls", "--store", tmp_path / "store")
    assert result.exit_code == 1
    assert "ATTNSTORE_KEY" in result.stderr
    assert "alice" in run("ls", "--store", tmp_path / "store", ATTNSTORE_KEY=KEY.hex())
    assert attnstore("ls", "--store", tmp_path / "store", ATTNSTORE_KEY="00" * 32).exit_code == 1


@pytest.mark.parametrize("command", ["ls", "stats", "verify", "gc", "repair"])
def test_there_must_be_a_store(command: str, tmp_path: Path) -> None:
    result = attnstore(command, "--store", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "there is no store" in result.stderr
    assert not (tmp_path / "nothing").exists()


def test_a_mistake_in_the_command_line_exits_with_2(folder: Path) -> None:
    assert attnstore("ls", "--store", folder, "--limit", "none").exit_code == 2
    assert attnstore("nonsense").exit_code == 2


def test_tools_run_while_another_process_writes(folder: Path) -> None:
    writer = (
        "import sys\n"
        "from support.store_blocks import make_chain, save\n"
        "from hf_attnstore import AttentionStore\n"
        "with AttentionStore(sys.argv[1]) as store:\n"
        "    print('ready', flush=True)\n"
        "    for n in range(10**6):\n"
        "        save(store, make_chain([n * 1000 + i for i in range(40)], 16), f'writer {n % 5}')\n"
        "        store.flush()\n"
    )
    process = fresh.Process([sys.executable, "-c", writer, folder])
    try:
        assert process.stdout is not None
        process.stdout.readline()
        for number in range(3):
            run("ls", "--store", folder)
            run("fork", "alice", f"copy {number}", "--store", folder)
            run("stats", "--store", folder)
            assert run_json("verify", "--store", folder)["problems"] == []
            run("gc", "--store", folder)
            run("rm", f"copy {number}", "--store", folder, "--yes")
    finally:
        process.kill()
    assert run_json("verify", "--store", folder)["problems"] == []
