"""The models a bench can run: seeded random weights in a named shape, or a model of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from hf_attnstore.chat.model import first_line, model_source
from hf_attnstore.errors import AttentionStoreError


class BenchError(AttentionStoreError):
    """The bench cannot run as asked, or what it measured is not what it claims to measure."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama with random weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    dtype: torch.dtype
    needs_cuda: bool = False


SHAPES: dict[str, Shape] = {
    "tiny": Shape(2, 64, 4, 2, 128, 512, torch.float32),
    "small": Shape(8, 512, 8, 4, 1408, 4096, torch.float32),
    "llama-8b": Shape(32, 4096, 32, 8, 14336, 128256, torch.bfloat16, needs_cuda=True),
}

# With transformers' usual 0.02 a random model hardly looks at its history: greedy tokens would be the same
# whatever the cache held. With wider weights a wrong key or value changes the tokens.
_INITIALIZER_RANGE = 0.1


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load, in plain values, so that a child process can load the same one."""

    shape: str | None
    name: str | None
    device: str
    seed: int
    max_tokens: int
    dtype: str = "auto"

    @property
    def label(self) -> str:
        """Short name for tables and file names."""
        return self.name or self.shape or "model"


def choose_model(
    shape: str | None,
    name: str | None,
    *,
    device: str = "auto",
    seed: int = 0,
    max_tokens: int,
    dtype: str = "auto",
) -> ModelSpec:
    """Check what the user asked for and settle the device.

    Args:
        shape: a name from `SHAPES`; None with `name`.
        name: a hub name, a local path, `smollm2` or `gemma3`; None with `shape`.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        max_tokens: tokens of the longest turn: history, new and decoded.
        dtype: a torch dtype's name; "auto" is that of the shape or of the checkpoint.

    Raises:
        BenchError: both or neither of shape and name, an unknown shape, or a GPU that is not there.
    """
    if (shape is None) == (name is None):
        raise BenchError("Give either --shape or --model, not both and not none.")
    has_cuda = torch.cuda.is_available()
    if shape is not None:
        if shape not in SHAPES:
            raise BenchError(f"Unknown shape {shape!r}; there are: {', '.join(SHAPES)}.")
        if SHAPES[shape].needs_cuda and (not has_cuda or device == "cpu"):
            raise BenchError(
                f"--shape {shape} needs a CUDA GPU, and "
                + ("--device cpu was given." if has_cuda else "torch sees none on this machine.")
                + " Use --shape small, or --model with a model that fits the CPU."
            )
        if device == "auto":
            device = "cuda" if SHAPES[shape].needs_cuda else "cpu"
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if device == "cuda" and not has_cuda:
        raise BenchError("--device cuda was given, but torch sees no CUDA GPU on this machine.")
    return ModelSpec(shape, name, device, seed, max_tokens, dtype)


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """Build or load the model, in eval mode, greedy, and without an end-of-sequence token.

    Raises:
        BenchError: the longest turn does not fit the model's positions, or there is no such dtype.
        ModelNotFoundError: it comes by pip and is not installed.
    """
    model: PreTrainedModel
    dtype = _dtype(spec.dtype)
    if spec.shape is not None:
        shape = SHAPES[spec.shape]
        config = LlamaConfig(
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.intermediate,
            vocab_size=shape.vocabulary,
            max_position_embeddings=max(8192, spec.max_tokens),
            initializer_range=_INITIALIZER_RANGE if shape.hidden <= 1024 else 0.02,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng(), torch.device(spec.device):
            torch.manual_seed(spec.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or shape.dtype)
    else:
        if spec.name is None:
            raise BenchError("The model has neither a shape nor a name.")
        try:
            model = AutoModelForCausalLM.from_pretrained(model_source(spec.name), dtype=dtype or "auto")
        except (OSError, ValueError) as error:
            raise BenchError(f"The model {spec.name!r} can't be loaded: {first_line(error)}") from error
        model = model.to(torch.device(spec.device))  # type: ignore[arg-type]
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and spec.max_tokens > limit:
            raise BenchError(
                f"A turn of {spec.max_tokens} tokens (history + new + decoded) does not fit {spec.name}, "
                f"which has {limit} positions. Use a smaller --history."
            )
    model.eval()
    # Every method decodes the same number of tokens, whatever the model would rather do.
    model.generation_config = GenerationConfig(do_sample=False)
    return model


def is_exact(model: PreTrainedModel) -> bool:
    """Whether its dtype has so many bits that prefilling a prompt in parts changes no token; 16 are too few."""
    return model.dtype in (torch.float32, torch.float64)


def _dtype(name: str) -> torch.dtype | None:
    """A dtype by name; None for "auto".

    Raises:
        BenchError: there is no such dtype.
    """
    found = getattr(torch, name, None)
    if name != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise BenchError(f"--dtype is auto, or such as float32 or bfloat16, not {name!r}.")
    return found


def random_ids(model: PreTrainedModel, tokens: int, seed: Sequence[int]) -> torch.Tensor:
    """Seeded random token ids, `[1, tokens]`, on the model's device.

    The time and the bytes of a KV cache do not depend on what the tokens say.
    """
    state = 0
    for part in seed:
        state = (state * 1_000_003 + part + 1) % (2**63)
    generator = torch.Generator().manual_seed(state)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, vocabulary, (1, tokens), generator=generator)
    return ids.to(model.device)
