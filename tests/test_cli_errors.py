"""Whatever is typed wrong, the command line says it in one line, with what to do, and never with a traceback."""

from __future__ import annotations

import pytest
from support.chat_fixtures import save_tiny_chat_model
from support.store_blocks import make_chain, save
from typer.testing import CliRunner

from hf_attnstore import AttentionStore, __version__
from hf_attnstore.cli.app import app

STORE = ["--store", "STORE"]
MISTAKES = """\
nonsense
--nonsense
--version --nonsense
lab nonsense
lab gate --nonsense
lab sim nonsense
bench nonsense
bench --nonsense
bench --repeats 0
bench --new none
ls --nonsense
ls --limit none
ls --limit 0
ls --offset -1
ls somebody
show
show alice bob STORE
rm
rm --nonsense alice
rename
rename alice
fork alice
export alice
import
gc --older-than long
gc --older-than -1
chat
chat --session a --max-new-tokens 0
chat --session a --max-new-tokens many
chat --session a --window 1
chat --session a --checkpoint-every 0
ui --port none
ui --nonsense
ui --max-new-tokens 0
inspect --nonsense
demo --repeats none
config --nonsense
verify --nonsense
repair everything
stats everything"""
ERRORS = {
    "ls --store NOTHING": "there is no store in",
    "stats --store NOTHING": "there is no store in",
    "verify --store NOTHING": "there is no store in",
    "repair --store NOTHING": "there is no store in",
    "show nobody --store STORE": "`attnstore ls` lists those there are",
    "show alice --store STORE --namespace other": "no session 'alice'",
    "rm alice nobody --yes --store STORE": "no session 'nobody'",
    "rename nobody anna --store STORE": "no session 'nobody'",
    "rename alice bob --store STORE": "exists already",
    "fork alice bob --store STORE": "exists already",
    "export nobody NOTHING --store STORE": "no session 'nobody'",
    "export alice MODEL/config.json --store STORE": "--force writes over it",
    "export alice NOTHING/there --store STORE": "",
    "import NOTHING --store STORE": "can't read",
    "import MODEL/config.json --store STORE": "",
    "import NOTHING --store STORE --disk much": "not a size",
    "ls --store MODEL": "there is no store in",
    "chat --session a --model NOTHING --store STORE": "there is no folder",
    "chat --session a --model STORE --store STORE": "can't be loaded",
    "chat --session a --model MODEL --dtype float33 --store STORE": "not 'float33'",
    "chat --session a --model MODEL --device nowhere --store STORE": "cpu is always there",
    "chat --session a --model MODEL --memory much --store STORE": "not a size",
    "chat --session a --model MODEL --store MODEL": "choose another folder",
    "inspect --model NOTHING": "there is no folder",
    "inspect --model MODEL --dtype int33": "not 'int33'",
    "ui --auth nobody --model MODEL --store STORE": "USER:PASSWORD",
    "bench --model NOTHING --shape tiny": "not both",
    "bench --model NOTHING --history 8 --no-rss": "there is no folder",
    "bench --history much": "positive whole numbers",
    "chat --session": "requires an argument",
    "bench --shape enormous": "Unknown shape",
    "bench --shape tiny --dtype float33": "not 'float33'",
    "bench --shape tiny --device cuda": "CUDA",
    "demo --model NOTHING --output NOTHING": "there is no folder",
    "lab models --family nobody": "no family called nobody",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("cli")
    with AttentionStore(root / "store", block_size=16) as store:
        for name in ("alice", "bob"):
            save(store, make_chain([*range(40)], 16), name)
    model = save_tiny_chat_model(root / "model")
    return {"STORE": str(root / "store"), "MODEL": str(model), "NOTHING": str(root / "nothing")}


@pytest.mark.parametrize("line", [*MISTAKES.splitlines(), *ERRORS])
def test_what_is_wrong_is_said_in_one_line(line: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = line.split()
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    if line.startswith("bench --shape tiny --device cuda"):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, arguments, input="")
    mistake = line not in ERRORS or line.startswith("bench") or line == "chat --session"
    assert result.exit_code == (2 if mistake else 1), result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert ERRORS.get(line, "--help") in result.stderr
    assert not any(word in result.stderr for word in ("wait=", "sessions()", "memory=", "ATTNSTORE_DEBUG"))


def test_there_are_enough_of_them() -> None:
    assert len({*MISTAKES.splitlines(), *ERRORS}) >= 60


def test_what_nobody_expected_is_one_line_too_and_says_how_to_see_more(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a surprise\nand more")

    monkeypatch.setattr(AttentionStore, "session_count", fail)
    result = CliRunner().invoke(app, ["ls", "--store", places["STORE"]])
    assert result.exit_code == 1
    assert result.stderr == "error: RuntimeError: a surprise (ATTNSTORE_DEBUG=1 shows where)\n"
    monkeypatch.setenv("ATTNSTORE_DEBUG", "1")
    assert isinstance(CliRunner().invoke(app, ["ls", "--store", places["STORE"]]).exception, RuntimeError)


def test_ctrl_c_while_a_command_starts_is_one_line(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_attnstore.chat.model.load_chat_model", interrupt)
    result = CliRunner().invoke(app, ["chat", "--session", "a", "--store", places["STORE"]])
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted\n"


@pytest.mark.parametrize("line", ["-h", "ls -h", "lab -h", "bench -h", "chat -h", "ui -h"])
def test_help_has_a_short_name_everywhere(line: str) -> None:
    result = CliRunner().invoke(app, line.split(), env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_the_version_and_what_is_listed() -> None:
    for name in ("--version", "-V"):
        assert CliRunner().invoke(app, [name]).stdout == f"attnstore {__version__}\n"
    listed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    for panel in ("Talk", "Look after a store", "Try and measure"):
        assert panel in listed
    assert "--install-completion" in listed
    assert "│ sim " not in listed, "it is under lab"
    bench = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).stdout
    assert "│ truncation " not in bench
    for line in (["sim", "--help"], ["bench", "truncation", "--help"], ["lab", "truncation", "--help"]):
        assert CliRunner().invoke(app, line).exit_code == 0, "old names go on"
    assert "attnstore show alice --messages" in CliRunner().invoke(app, ["show", "--help"]).stdout
