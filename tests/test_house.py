"""The house: which room may import which, that no imports go in a circle, and that the map names every file.

Read from the sources; nothing is imported. A module's name is that of its file, a room is a package, or a module of the
top level. The face of a room, its `__init__`, belongs to no room: it names what is public.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_attnstore"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
FACES = {name for name, path in FILES.items() if path.name == "__init__.py"}

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


class Import(NamedTuple):
    """One import of a module, or of a name of it."""

    target: str
    when: str
    """"module": when the module is imported; "function": later; "typing": by type checkers only."""


@cache
def imports_of(name: str) -> list[Import]:
    """All imports of a module of the package, of the package's own modules by the module that they lead to."""
    found = []
    package = name if name in FACES else name.rpartition(".")[0]
    for node, when in _statements(ast.parse(FILES[name].read_text()), "module"):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, when) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{origin}.{alias.name}"
                found.append(Import(module if module in FILES else origin, when))
    return found


def _statements(node: ast.AST, when: str) -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _statements(ast.Module([statement], []), "typing")
            yield from _statements(ast.Module(child.orelse, []), when)
        else:
            yield child, when
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == "module"
            yield from _statements(child, "function" if inside else when)


def within(name: str, room: str) -> bool:
    return name == f"{PACKAGE}.{room}" or name.startswith(f"{PACKAGE}.{room}.")


def room_of(name: str) -> str:
    return name if name in FACES or name.count(".") == 1 else name.rpartition(".")[0]


def arrows(*when: str, to: Callable[[str], str] = str) -> dict[str, set[str]]:
    """Who imports whom within the package, faces aside."""
    found: dict[str, set[str]] = {}
    for name in FILES.keys() - FACES:
        for target, moment in imports_of(name):
            if target in FILES and target not in FACES and moment in when and to(name) != to(target):
                found.setdefault(to(name), set()).add(to(target))
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of nodes that can all be reached from each other, of at least two."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for node in graph.get(ahead.pop(), set()) - seen:
                seen.add(node)
                ahead.append(node)
        return seen

    reach = {node: reached(node) for node in graph}
    found = {frozenset(n for n in reach[node] if node in reach.get(n, set())) for node in graph if node in reach[node]}
    return sorted(map(set, found), key=sorted)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "e": {"a"}}) == [{"b", "c"}]


def test_nothing_outside_of_the_lab_imports_it() -> None:
    outside = [name for name in FILES if not within(name, "lab")]
    assert [(name, i.target) for name in outside for i in imports_of(name) if within(i.target, "lab")] == []
    named = {name for name in outside if f"{PACKAGE}.lab" in FILES[name].read_text()}
    assert named == {"hf_attnstore.cli.app", "hf_attnstore.ui.cli"}  # which name its commands


@pytest.mark.parametrize("room", ["store", "session"])
def test_the_lower_rooms_know_nothing_of_transformers_and_of_those_above(room: str) -> None:
    above = ["cache", "chat", "serving", "cli", "ui", "lab", *(["session"] if room == "store" else [])]
    for name in (name for name in FILES if within(name, room)):
        for target, when in imports_of(name):
            assert target.partition(".")[0] != "transformers", name
            assert not any(within(target, other) for other in above), (name, target, when)
            assert room == "store" or target.partition(".")[0] != "torch" or when == "typing", name


def test_what_all_may_import_imports_none_of_them() -> None:
    for name in (name for name in FILES if name.count(".") == 1 and name not in FACES):
        assert {i.target for i in imports_of(name) if i.target in FILES} <= {f"{PACKAGE}.errors"}, name


def test_no_rooms_import_each_other_in_a_circle() -> None:
    assert circles(arrows("module", to=room_of)) == []


def test_no_modules_import_each_other_in_a_circle_not_even_within_functions() -> None:
    assert circles(arrows("module")) == []
    assert circles(arrows("module", "function")) == []


def test_the_map_names_every_module_and_nothing_that_is_not_there() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    drawn = page.partition("## The map")[2].partition("```\n")[2].partition("```")[0]
    named, room = [], ""
    for line in drawn.splitlines():
        if line and not line.startswith(" "):
            room = line.split()[0]
        named += [f"{room}{file}".removeprefix(f"{PACKAGE}/") for file in re.findall(r"\b\w+\.py\b", line)]
    unnamed = {"__init__.py", "__main__.py", "_version.py"}
    there = [str(path.relative_to(ROOT / PACKAGE)) for path in FILES.values() if path.name not in unnamed]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_speaks_of_are_there(page: Path) -> None:
    there = [
        f"/{path.relative_to(ROOT)}" for top in (PACKAGE, "tests", "examples") for path in ROOT.glob(f"{top}/**/*.py")
    ]
    for file in re.findall(r"[\w/-]+\.py\b", page.read_text()):
        assert any(path.endswith(f"/{file.lstrip('/')}") for path in there), file
