"""Every Python example in the README and the docs runs, in the order of its page."""

import os
import re
import sys
from pathlib import Path

import pytest
from support import fresh

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


PAGES_WITH_CODE = [page for page in PAGES if python_blocks(page)]


def test_there_are_examples_to_run() -> None:
    assert {page.name for page in PAGES_WITH_CODE} >= {"README.md", "quickstart.md", "api.md"}


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = tmp_path / "page.py"
    script.write_text("\n".join(python_blocks(page)))
    home = {"HOME": str(tmp_path), "ATTNSTORE_STORE": str(tmp_path / "own")}  # pages name folders below the first
    environment = {**os.environ, **home, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = fresh.run([sys.executable, script], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
