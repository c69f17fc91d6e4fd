"""Every Python example in the README and the docs runs, in the order of its page, and the pages make a site."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import fresh

import hf_attnstore

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


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_every_page_picture_and_public_name(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the site needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not (tmp_path / page).is_file()} == set()
    for picture in re.findall(r'<img[^>]* src="([^"]+)"', (tmp_path / "index.html").read_text()):
        assert (tmp_path / picture).is_file(), picture
    reference = (tmp_path / "reference.html").read_text()
    names = {name for name in hf_attnstore.__all__ if not name.startswith("__")}
    assert {name for name in names if f'id="hf_attnstore.{name}"' not in reference} == set()


def test_every_page_is_in_the_contents_of_the_site() -> None:
    listed = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    made = {"reference.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert set(listed) - made == {path.name for path in (ROOT / "docs").glob("*.md")}
