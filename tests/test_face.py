"""What is imported when: a store is looked after, and commands are listed, without torch and transformers."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.store_blocks import make_chain, save
from typer.main import get_command

import hf_attnstore
from hf_attnstore import chat, serving
from hf_attnstore.cli.app import app
from hf_attnstore.cli.lazy import command_of
from hf_attnstore.store import AttentionStore

HEAVY = "torch transformers gradio matplotlib scipy safetensors hf_attnstore.cache hf_attnstore.chat.session"
LAZY = "hf_attnstore.lab hf_attnstore.ui"


def loaded_after(script: str, of: str) -> set[str]:
    """Which of the modules named in `of` a new process has loaded at the end of a script."""
    script += f"\nimport sys\nprint('loaded:', *(name for name in {of.split()} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_importing_the_package_and_its_rooms_loads_no_library() -> None:
    names = "import hf_attnstore, hf_attnstore.chat, hf_attnstore.serving, hf_attnstore.session, hf_attnstore.lab"
    assert loaded_after(names, f"{HEAVY} numpy rich typer hf_attnstore.store") == set()


def test_the_store_and_its_bookkeeping_load_without_torch() -> None:
    assert loaded_after("import hf_attnstore.store", f"{HEAVY} rich typer") == set()
    rooms = (Path(hf_attnstore.__file__).parent / "session").glob("*.py")
    names = ", ".join(f"hf_attnstore.session.{path.stem}" for path in rooms)
    assert loaded_after(f"import {names}", f"{HEAVY} rich typer") == set()


def test_a_store_is_listed_shown_counted_and_changed_without_torch(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with AttentionStore(root, block_size=16) as store:
        for name in ("alice", "bob", "carol"):
            save(store, make_chain([*range(40), len(name)], 16), name)

    def script_of(*commands: str) -> str:
        return f"""
from typer.testing import CliRunner
from hf_attnstore.cli.app import app
for command in {commands!r}:
    result = CliRunner().invoke(app, [*command.split(), "--store", {str(root)!r}])
    assert result.exit_code == 0, (command, result.output)
assert "carol" in result.output
"""

    looking = script_of("stats", "ls --json", "show alice", "ls")
    assert loaded_after(looking, f"{HEAVY} {LAZY} numpy pydantic") == set()  # a quarter of a second
    changes = (
        "rename alice dora",
        "fork dora eve",
        "rm bob --yes",
        "gc --dry-run",
        "gc --unowned --older-than 1",
        "ls",
    )
    assert loaded_after(script_of(*changes), f"{HEAVY} {LAZY}") == set()
    script = f"""
from typer.testing import CliRunner
from hf_attnstore.cli.app import app
assert "all is well" in CliRunner().invoke(app, ["verify", "--store", {str(root)!r}]).output
"""
    assert loaded_after(script, f"{HEAVY} {LAZY}") == {"torch"}  # which looks through the tensors


@pytest.mark.parametrize("first", ["transformers", "hf_attnstore"])
def test_a_cache_that_is_made_within_the_first_call_of_generate_is_kept(first: str, tmp_path: Path) -> None:
    second = {"transformers": "hf_attnstore", "hf_attnstore": "transformers"}[first]
    script = f"""
import {first}
import {second}
import torch
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
)
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.arange(3, 43)[None]
with hf_attnstore.AttentionStore({str(tmp_path / "store")!r}) as store:
    model.generate(ids, past_key_values=hf_attnstore.AttentionStoreCache(model, "alice", store), max_new_tokens=2)
    print("kept", len(store.tokens("alice")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["kept", "41"]


def test_help_loads_neither_the_store_nor_the_commands_that_are_called_by_name() -> None:
    script = """
from typer.testing import CliRunner
from hf_attnstore.cli.app import app
assert "bench" in CliRunner().invoke(app, ["--help"]).output
assert CliRunner().invoke(app, ["ls", "--help"]).exit_code == 0
"""
    assert loaded_after(script, f"{HEAVY} {LAZY} numpy hf_attnstore.store") == set()
    script += "assert '--screenshots' in CliRunner().invoke(app, ['ui', '--help']).output"
    assert loaded_after(script, f"{HEAVY} {LAZY} numpy hf_attnstore.store") == {"hf_attnstore.ui"}


@pytest.mark.parametrize("name", ["demo", "models", "ui", "bench", "sim"])
def test_the_list_of_commands_says_of_each_what_it_says_of_itself(name: str) -> None:
    listed = get_command(app).commands[name]  # type: ignore[attr-defined]
    real = command_of(name, listed.target)
    assert listed.get_short_help_str(1000).split("\n\n")[0] == real.help.split("\n\n")[0].replace("\n", " ")
    assert real.name == name


@pytest.mark.parametrize("face", [hf_attnstore, chat, serving], ids=lambda face: face.__name__)
def test_what_a_face_names_is_there_and_listed(face: object) -> None:
    names = face.__all__  # type: ignore[attr-defined]
    assert sorted(names) == names
    assert set(names) <= set(dir(face))
    assert all(getattr(face, name) is not None for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        face.nothing  # type: ignore[attr-defined]  # noqa: B018


PUBLIC = [
    hf_attnstore.AttentionStore, hf_attnstore.AttentionStoreCache, hf_attnstore.Attached, hf_attnstore.ChatSession,
    hf_attnstore.SessionInfo, hf_attnstore.TurnStats, hf_attnstore.TurnTotals, hf_attnstore.TurnQueue,
    hf_attnstore.Turn, hf_attnstore.QueueStats,
]  # fmt: skip
ROOT = Path(__file__).parent.parent


def in_code(page: str) -> set[str]:
    """The words of a page that stand in code within its text."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return {word for code in re.findall(r"`[^`]+`", page) for word in re.findall(r"\w+", code)}


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_every_public_name_of_a_class_is_in_the_documentation_and_says_what_it_is(kind: type) -> None:
    above = {name for base in kind.__mro__ if not base.__module__.startswith("hf_attnstore") for name in dir(base)}
    fields = set(getattr(kind, "__dataclass_fields__", {}))
    names = {name for name in {*dir(kind), *fields} if not name.startswith("_")} - above
    known = in_code("".join((ROOT / "docs" / page).read_text() for page in ("api.md", "serving.md")))
    assert names - known == set()
    values = {name: inspect.getattr_static(kind, name, None) for name in names}
    said = {name for name, value in values.items() if inspect.isfunction(value) or isinstance(value, property)}
    assert {name for name in said if not inspect.getdoc(values[name])} == set()


def test_every_name_of_the_package_is_in_the_documentation() -> None:
    pages = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    assert set(hf_attnstore.__all__) - in_code(pages) == set()
