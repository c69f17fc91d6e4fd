"""What the site has beside the pages of this folder: README as its first page, CONTRIBUTING, CHANGELOG, the examples,
and the reference, made from the docstrings of all public names."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_config(config: Any) -> Any:
    """Lists the pages of results, whichever there are."""
    results = sorted(
        path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).glob("results/*.md")
    )
    config.nav[-1]["Results"] = results
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds what lies elsewhere."""
    for name, source in _PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "reference.md", content=_reference()))
    for path in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{path.name}", content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What lies beside docs/ in the repository lies within the site."""
    return markdown if "/" in page.file.src_uri else markdown.replace("](../", "](")


def _reference() -> str:
    tree = ast.parse((ROOT / "hf_attnstore" / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    entries = "\n\n".join(f"::: hf_attnstore.{name}" for name in names if not name.startswith("__"))
    return f"# Reference\n\nEverything public, from its docstrings; [API](api.md) is the map.\n\n{entries}\n"
