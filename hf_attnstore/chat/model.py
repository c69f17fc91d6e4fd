"""Loading a chat model by name or path; without either, the small one that comes with the repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AttentionStoreError
from .pretrained import REAL_MODELS, ModelNotFoundError, real_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ModelNotFoundError", "first_line", "load_chat_model", "model_source", "small_model_path"]


def small_model_path() -> Path:
    """Where the repository keeps its small model.

    Raises `ModelNotFoundError` for an installation without the repository.
    """
    path = Path(__file__).resolve().parents[2] / "examples" / "small-model"
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"the small model is not at {path}: it comes with the repository, not with the installed "
            "package. Run from a clone, "
            "or name a model: --model Qwen/Qwen3-0.6B or --model PATH"
        )
    return path


def model_source(model: str | Path | None = None) -> str:
    """Where transformers finds a model: the small one without a name, what pip brought for `smollm2` and `gemma3`.

    Raises `ModelNotFoundError` if that is not installed.
    """
    if model is None:
        return str(small_model_path())
    name = str(model)
    return str(real_model_path(name)) if name in REAL_MODELS and not Path(name).is_dir() else name


def load_chat_model(
    model: str | Path | None = None, *, device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a hub name, a local folder, `smollm2` or `gemma3`, ready to generate.

    `device` is CUDA where there is one, else the CPU; `dtype` is a torch dtype's name, or "auto" for the one
    in the checkpoint. Raises `ModelNotFoundError` when it can't be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_source(model)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"the model {source!r} can't be loaded: {first_line(error)}") from error
    try:
        return loaded.to(place).eval(), tokenizer
    except RuntimeError as error:
        raise AttentionStoreError(f"the model can't be put on {place!r}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
