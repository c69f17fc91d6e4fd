"""The demonstration: real processes, real comparison, and the exit code that follows from it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import fresh
from support.chat_fixtures import save_tiny_chat_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_attnstore.chat.model import ModelNotFoundError, load_chat_model
from hf_attnstore.cli import app as cli
from hf_attnstore.lab.demo import DemoError, DemoResult, TurnResult, run_demo, runner, script
from hf_attnstore.lab.demo.kept import KeptCache, KeptTask, run_kept
from hf_attnstore.lab.demo.turn import TurnTask, first_difference, run_turn

pytest.importorskip("matplotlib.font_manager")  # asks the system for fonts when it is first imported, by a process

MESSAGES = ("the old prince looked at the letter and said nothing to the others", "and then", "what did the mother say")
SHORT = script.Script("You answer as a voice in an old novel.", MESSAGES, answer_tokens=48, repeats=3)
SMALL_MODEL = Path(__file__).parent.parent / "examples" / "small-model"


@pytest.fixture(autouse=True)
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Popen", lambda command, *, text, **options: fresh.Process(command, **options))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny")


def quiet() -> Console:
    return Console(quiet=True)


def result_of(**changes: Any) -> TurnResult:
    plain = TurnResult(
        history_tokens=100,
        prompt_tokens=120,
        reused_tokens=99,
        prefilled_tokens=21,
        loaded_bytes=1 << 20,
        recomputed="",
        answer="yes",
        answer_tokens=5,
        same_tokens=True,
        first_difference=None,
        ttft_with=[0.01, 0.012, 0.011],
        ttft_without=[0.1, 0.12, 0.11],
        identify_seconds=0.001,
        parameters=1000,
        dtype="float32",
        device="cpu",
    )
    return replace(plain, **changes)


def test_conversation_runs_by_turns_in_new_processes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "scripts", lambda: (SHORT,))
    monkeypatch.chdir(tmp_path)
    console = Console(record=True, width=80, file=io.StringIO())
    result = run_demo(str(tiny), Path("out"), repeats=2, console=console)

    assert [turn.same_tokens for turn in result.turns] == [True] * 3
    for before, turn in zip([None, *result.turns], result.turns, strict=False):
        history = before.prompt_tokens + before.answer_tokens if before else 0
        assert turn.history_tokens == history
        assert turn.reused_tokens == max(history - 1, 0)
        assert turn.prefilled_tokens == turn.prompt_tokens - turn.reused_tokens
        assert (turn.loaded_bytes > 0) == (before is not None)
        assert len(turn.ttft_with) == len(turn.ttft_without) == 2
        assert min(*turn.ttft_with, *turn.ttft_without) > 0

    shown = console.export_text()
    for column in ("turn", "history", "reused", "prefilled", "loaded", "without", "with", "speed", "same"):
        assert column in shown
    assert shown.count("✓") == 6  # a line while it runs, and one in the table
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert report["same_tokens"] is True
    assert report["turns"] == [asdict(turn) for turn in result.turns]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.json", "demo.png"]  # no store left behind


def test_answers_that_differ_are_found(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is of what was really generated: with the plain side's sampling changed, it must see it."""
    from hf_attnstore.lab.demo import turn

    real = turn.timed_generate

    def other(*args: Any, **kwargs: Any) -> None:
        real(*args, **{**kwargs, "suppress_tokens": list(range(5, 150))})

    monkeypatch.setattr(turn, "timed_generate", other)
    (tmp_path / "store").mkdir()
    result = run_turn(
        TurnTask(
            model=str(tiny),
            store=str(tmp_path / "store"),
            scratch=str(tmp_path),
            system="a prince",
            message="the letter",
            max_new_tokens=8,
            repeats=1,
            store_first=True,
        )
    )
    assert not result.same_tokens
    assert result.first_difference is not None


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([[1, 2, 3]], None),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2]], 2),
        ([[1, 2, 3, 4], [1, 9, 3]], 1),
        ([], None),
    ],
)
def test_first_difference(answers: list[list[int]], expected: int | None) -> None:
    assert first_difference([1, 2, 3], answers) == expected


@pytest.mark.parametrize(("same", "code"), [(True, 0), (False, 1)])
def test_command_exits_with_1_when_tokens_differ(
    same: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_turn(*args: Any, **kwargs: Any) -> DemoResult:
        return DemoResult("tiny", [result_of(same_tokens=same, first_difference=None if same else 3)])

    monkeypatch.setattr("hf_attnstore.lab.demo.cli.run_demo", one_turn)
    assert CliRunner().invoke(cli.app, ["demo", "--output", str(tmp_path)]).exit_code == code


def test_turn_whose_process_fails_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "scripts", lambda: (SHORT,))
    with pytest.raises(DemoError, match=r"^turn 1: the model can.t be put on .no-such-device"):
        run_demo(str(tiny), tmp_path, device="no-such-device", console=quiet())


def test_missing_small_model_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_attnstore.chat.model.__file__", str(tmp_path / "site-packages" / "x" / "chat" / "model.py"))
    with pytest.raises(ModelNotFoundError, match="--model"):
        run_demo(None, tmp_path / "out", console=quiet())


def test_window_too_small_for_the_script_is_said_before_anything_runs(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model", window=64)
    with pytest.raises(DemoError, match="context window of 64"):
        run_demo(str(model), tmp_path / "out", console=quiet())


def test_model_without_chat_template_is_refused(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model", template=None)
    with pytest.raises(DemoError, match="no chat template"):
        run_demo(str(model), tmp_path / "out", console=quiet())


def test_budget_never_overflows_and_uses_what_short_answers_leave() -> None:
    budget = runner._Budget(window=1000, said=(300, 400, 500, 600), most=48)
    turns: list[TurnResult] = []
    for i in range(4):
        allowed = budget.answer_tokens(i, turns)
        assert allowed == 48
        turns.append(result_of(answer_tokens=allowed))
    tight = runner._Budget(window=660, said=(300, 400, 500, 600), most=48)
    assert tight.answer_tokens(0, []) == 15
    assert tight.answer_tokens(1, [result_of(answer_tokens=3)]) == 19


@pytest.mark.skipif(not (SMALL_MODEL / "config.json").is_file(), reason="the small model is not in this checkout")
def test_script_fits_the_small_model_and_nearly_fills_its_window() -> None:
    chosen, budget = runner._longest_script(str(SMALL_MODEL))
    assert chosen is script.EVENING
    assert budget.window == 1024
    assert len(chosen.messages) >= 8
    assert budget.said[0] > 200
    turns: list[TurnResult] = []
    for i in range(len(chosen.messages)):
        turns.append(result_of(answer_tokens=budget.answer_tokens(i, turns)))
    used = budget.said[-1] + sum(turn.answer_tokens for turn in turns)
    assert 850 <= used <= 1024
    assert AutoTokenizer.from_pretrained(SMALL_MODEL).chat_template


def test_a_large_window_gets_the_chapter_and_answers_of_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_chat_model(tmp_path / "model", window=20_000)
    chosen, budget = runner._longest_script(str(model))
    assert "DRINK ME" in chosen.messages[0]
    assert "EAT ME" in chosen.messages[4]
    assert len(chosen.messages) == 8
    assert chosen.one_sentence
    assert budget.answer_tokens(7, [result_of(answer_tokens=32)] * 7) == 32
    small = script.Script("so", ("the letter", "and"), answer_tokens=24, repeats=1, one_sentence=True)
    monkeypatch.setattr(runner, "scripts", lambda: (small,))
    monkeypatch.setattr(runner, "SENTENCE_ENDS", ("e", "a"))
    result = run_demo(str(model), tmp_path / "out", console=quiet())
    assert result.same_tokens
    assert all(1 <= turn.answer_tokens < 24 for turn in result.turns)
    assert result.turns[1].reused_tokens == result.turns[1].history_tokens - 1


def test_in_16_bits_answers_are_compared_with_a_kept_cache(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "scripts", lambda: (SHORT,))
    console = Console(record=True, width=80, file=io.StringIO())
    result = run_demo(str(tiny), tmp_path / "out", repeats=1, dtype="bfloat16", console=console)
    assert result.same_tokens
    assert [turn.reused_tokens > 0 for turn in result.turns] == [False, True, True]
    assert "kept in memory" in " ".join(console.export_text().split())
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["compared_with"] == "a cache kept in memory"
    prompts, answers = ([getattr(turn, name) for turn in result.turns] for name in ("prompt_ids", "answer_ids"))
    task = KeptTask(str(tiny), prompts, [len(answer) for answer in answers], dtype="bfloat16")
    assert run_kept(task) == answers


def test_an_answer_that_no_kept_cache_gives_is_found_in_16_bits() -> None:
    turn = result_of(dtype="bfloat16", answer_ids=[1, 2, 3], as_plain=False, same_tokens=False, first_difference=2)
    turn.compare([1, 2, 3])
    assert (turn.same_tokens, turn.first_difference) == (True, None)
    turn.compare([1, 9, 3])
    assert (turn.same_tokens, turn.first_difference) == (False, 1)
    shaky = result_of(dtype="bfloat16", answer_ids=[1], same_tokens=False, same_with_store=False, first_difference=0)
    shaky.compare([1])
    assert not shaky.same_tokens


def test_a_kept_cache_goes_back_to_where_a_prompt_agrees(tiny: Path) -> None:
    model, tokenizer = load_chat_model(tiny)
    kept = KeptCache(model, tokenizer)
    prompts = [[5, 6, 7, 8], [5, 6, 9, 9, 9], [7, 7], [7, 7]]
    fed: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for prompt, first in zip(prompts, [4, 3, 2, 1], strict=True):
        fed.clear()
        answer = kept.answer(prompt, 3)
        assert fed == [first, 1, 1]
        ids = torch.tensor([prompt])
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        assert answer == plain[0, len(prompt) :].tolist()
