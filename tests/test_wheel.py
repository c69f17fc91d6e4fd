"""An installed wheel, without the checkout, with the newest transformers that pip finds."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_attnstore.cache.model.tested import NEWEST_TESTED, warn_if_untested

ROOT = Path(__file__).parent.parent


def run(*command: object, **settings: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pin(name: str) -> str:
    found = re.search(rf"^{name}==.*$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert found is not None
    return found.group()


def copy_sources(source: Path) -> Path:
    """What a wheel is built of, elsewhere: building leaves files beside what is built."""
    built = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "hf_attnstore", source / "hf_attnstore", ignore=built)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def test_the_wheel_has_everything_that_the_package_reads_and_its_command(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="the wheel is built by setuptools 77 or newer")
    source = copy_sources(tmp_path / "source")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        entries = packed.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    files = {path.relative_to(source).as_posix() for path in (source / "hf_attnstore").rglob("*") if path.is_file()}
    assert files - names == set()
    assert "attnstore = hf_attnstore.cli.app:app" in entries


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_lines_of_the_readme_reuse_in_a_fresh_environment_with_the_newest_transformers(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip")
    if subprocess.run([*pip, "index", "versions", "transformers"], capture_output=True, timeout=120).returncode:
        pytest.skip("no package index can be reached")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "ATTNSTORE_GATE": "off"}
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, copy_sources(tmp_path / "source"))
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", pin("torch"), env=environment)
    run(python, "-m", "pip", "install", "--quiet", wheel, "transformers", env=environment)
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert code is not None
    (tmp_path / "lines.py").write_text(code.group(1))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said = [run(python, "lines.py", cwd=tmp_path, env=environment) for _ in range(2)]
    counts = [re.search(r"reused (\d+) of (\d+) tokens, prefilled (\d+)", line) for line in said]
    first, second = [[int(part) for part in found.groups()] for found in counts if found is not None]
    assert first[0] == 0
    assert second == [first[1] - 1, first[1], 1]


def test_a_newer_transformers_than_was_tested_gets_a_word(caplog: pytest.LogCaptureFixture) -> None:
    major, minor = map(int, NEWEST_TESTED.split("."))
    with caplog.at_level(logging.WARNING, logger="hf_attnstore"):
        assert not warn_if_untested(f"{NEWEST_TESTED}.7")
        assert not warn_if_untested(f"{major}.{minor - 1}.0")
        assert not caplog.records
        assert warn_if_untested(f"{major}.{minor + 1}.0")
    assert NEWEST_TESTED in caplog.text
    assert "pip install" in caplog.text


def test_the_pinned_transformers_is_the_newest_that_was_tested() -> None:
    assert pin("transformers").startswith(f"transformers=={NEWEST_TESTED}.")
