"""The `attnstore` command: chats that are typed, tables that are shown, errors that are one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.chat_fixtures import save_tiny_chat_model
from typer.testing import CliRunner, Result

from hf_attnstore import AttentionStore, ChatSession
from hf_attnstore.chat.model import load_chat_model
from hf_attnstore.cli import app as cli
from hf_attnstore.cli.terminal import TerminalChat


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def attnstore(*arguments: str | Path, typed: str = "") -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=typed, env={"COLUMNS": "200"})


def chat(model: Path, folder: Path, typed: str, *more: str, session: str = "alice") -> str:
    result = attnstore(
        "chat", "--session", session, "--model", model, "--store", folder, "--max-new-tokens", "8", *more, typed=typed
    )
    assert result.exit_code == 0, result.output
    return result.output


def numbers(output: str) -> list[tuple[int, int]]:
    """(reused, prefilled) of each answer that `output` shows."""
    found = re.findall(
        r"first token after [\d.]+ m?s · reused (\d+), prefilled (\d+) tokens · .*?[\d.]+ tokens/s", output
    )
    return [(int(reused), int(prefilled)) for reused, prefilled in found]


def tokens(model: Path, folder: Path, session: str) -> int:
    """How many tokens a conversation has, as a chat that takes it up sees it."""
    loaded, tokenizer = load_chat_model(model)
    with AttentionStore(folder) as store:
        return len(ChatSession(loaded, tokenizer, store, session).token_ids)


# chat


def test_chat_goes_on_in_another_run_and_shows_what_was_reused(model: Path, folder: Path) -> None:
    first = chat(model, folder, "the old prince\nand then\n/quit\n")
    assert "session alice begins" in first
    (_, all_new), (reused, new) = numbers(first)
    assert reused == all_new + 7  # the prompt and the answer, but for its last token
    assert 0 < new < all_new + 8

    said = tokens(model, folder, "alice")
    second = chat(model, folder, "so\n")
    assert "session alice goes on after 2 turns" in second
    assert [reused for reused, _ in numbers(second)] == [said - 1]


def test_chat_streams_the_answer_that_it_keeps(model: Path, folder: Path) -> None:
    output = chat(model, folder, "the old prince\n")
    with AttentionStore(folder) as store:
        answer = ChatSession(*load_chat_model(model), store, "alice").history[-1]["content"]
    assert answer
    assert answer in output


def test_chat_says_where_a_prompt_parts_from_what_is_known(model: Path, folder: Path) -> None:
    rest = "the old prince looked at the letter and said nothing to the others in the room"
    chat(model, folder, "so\n", "--system", f"Monday and {rest}")
    output = " ".join(chat(model, folder, "so\n", "--system", f"Friday and {rest}").split())
    assert re.search(r"agrees up to token \d+ of \d+; then 'Friday and' where 'alice' had 'Monday and' \(a", output)


def test_switch_begins_and_resumes_conversations(model: Path, folder: Path) -> None:
    output = chat(model, folder, "the letter\n/switch bob\nthe room\n/switch alice\nand then\n/sessions\n/quit\n")
    assert "session bob begins" in output
    assert "session alice goes on after 1 turn." in output
    assert numbers(output)[2][0] > 0
    assert re.search(r"alice ←.*\n.*bob", output)  # used last first


def test_fork_goes_on_alone(model: Path, folder: Path) -> None:
    output = chat(model, folder, "/fork early\nthe letter\n/fork other\nand then\n/fork alice\n")
    assert "nothing to fork yet" in output
    assert "session other goes on after 1 turn." in output
    assert numbers(output)[1][0] == sum(numbers(output)[0]) + 7
    assert "'alice' exists already" in output
    with AttentionStore(folder) as store:
        assert sorted(s.name for s in store.sessions()) == ["alice", "other"]
    assert tokens(model, folder, "alice") < tokens(model, folder, "other")


def test_delete_removes_a_conversation_and_says_when_there_is_none(model: Path, folder: Path) -> None:
    output = chat(model, folder, "the letter\n/delete bob\n/delete alice\n/sessions\n")
    assert "bob" in output.split("/delete")[0]
    assert "deleted alice" in output
    assert "session alice begins" in output.split("deleted alice")[1]
    with AttentionStore(folder) as store:
        assert store.sessions() == []


def test_retry_and_undo_leave_one_turn_and_none(model: Path, folder: Path) -> None:
    output = chat(model, folder, "/retry\n/undo\nthe letter\n/retry\n/history\n/undo\n/history\n")
    assert output.count("no turn to take back yet") == 2
    assert numbers(output)[1][1] == 1  # the prompt is known but for its last token
    assert output.count("user: the letter") == 1
    assert "taken back: the letter" in output


def test_help_lists_every_command_and_unknown_ones_are_said(model: Path, folder: Path) -> None:
    output = chat(model, folder, "/help\n/nonsense\n/switch\n")
    loaded, tokenizer = load_chat_model(model)
    with AttentionStore(folder) as store:
        commands = TerminalChat(loaded, tokenizer, store, "alice", None, None, {}).commands  # type: ignore[arg-type]
    for command in [*commands, "/quit"]:
        assert f"\n{command} " in output.replace("› ", "\n")
    assert "no command /nonsense" in output
    assert "/switch needs a session's name" in output


def test_message_too_long_is_an_error_and_the_chat_goes_on(model: Path, folder: Path) -> None:
    output = chat(model, folder, f"{'nothing ' * 600}\nthe letter\n")
    assert "context window of 512" in output
    assert len(numbers(output)) == 1


def test_text_that_looks_like_markup_is_shown_as_it_is(model: Path, folder: Path) -> None:
    output = chat(model, folder, "[red]the[/red] letter\n/history\n/quit\n", session="a [bold]b")
    assert "user: [red]the[/red] letter" in output
    assert "session a [bold]b begins" in output


def test_ctrl_c_ends_the_answer_and_not_the_chat(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: TerminalChat, text: str) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(TerminalChat, "_stream", interrupt)
    output = chat(model, folder, "the letter\nand then\n")
    assert "interrupted: what was said is kept" in output
    assert len(numbers(output)) == 1


# sessions


@pytest.mark.parametrize("command", ["sessions", "ls"])
def test_sessions_are_listed(command: str, model: Path, folder: Path) -> None:
    assert "there is no store in" in attnstore(command, "--store", folder).output
    AttentionStore(folder).close()
    assert "no sessions in" in attnstore(command, "--store", folder).output
    chat(model, folder, "the old prince\n")
    output = attnstore(command, "--store", folder).output
    assert "alice" in output
    with AttentionStore(folder) as store:
        assert f" {store.sessions()[0].tokens} " in output


# errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chat", "--session", "a", "--model", "/no/such/model"], "there is no folder"),
        (["chat", "--session", "", "--model", "MODEL"], "session"),
        (["demo", "--model", "/no/such/model"], "there is no folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    arguments: list[str], says: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    store = ["--store", str(folder)] if arguments[0] == "chat" else ["--output", str(folder)]
    result = attnstore(*[str(model) if a == "MODEL" else a for a in arguments], *store)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_command_works_without_the_bench_extra_and_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in sys.modules if n.startswith("hf_attnstore.lab.bench.")] + ["matplotlib"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert attnstore("--help").exit_code == 0
    small = ["--shape", "tiny", "--history", "16", "--new", "1", "--decode", "1", "--repeats", "1", "--no-rss"]
    result = attnstore("bench", *small, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "pip install 'hf-attnstore[bench]'" in result.output


def test_installed_command_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_attnstore.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "chat", "ls", "verify", "repair", "bench"):
        assert command in done.stdout


# inspect


def test_inspect_says_what_happens_to_a_model(model: Path) -> None:
    result = attnstore("inspect", "--model", model)
    assert result.exit_code == 0, result.output
    assert "2 × full_attention" in result.output
    assert "rotated to their new places" in result.output
    assert "RoPE, half-split" in result.output
    assert re.search(
        r"KV +[\d.]+ (B|KiB) a token \(float32, codec raw\), 4,096 tokens take [\d.]+ [KM]iB", result.output
    )
    assert re.search(r"fits +conversations of 4,096 tokens: [\d,]+ in disk=50GiB, [\d,]+ in memory=2GiB", result.output)
    assert re.search(r"here +512 tokens computed in [\d.]+ m?s, loaded in [\d.]+ m?s", result.output)


def test_a_chat_with_a_small_window_says_what_was_dropped(model: Path, folder: Path) -> None:
    output = chat(model, folder, "the old prince\n" * 8 + "/quit\n", "--window", "64")
    assert "tokens are out of the window, the others moved" in output
