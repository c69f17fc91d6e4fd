"""Tiny models with a `generate` of their own kind, which are in no list of causal language models."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .shrink import shrunk
from .tiny import spread

_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusion_gemma": (
        "DiffusionGemmaForBlockDiffusion",
        {
            "text_config": {
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "num_hidden_layers": 2,
            },
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "pooling_kernel_size": 2,
                "patch_size": 4,
                "position_embedding_size": 64,
            },
            "image_token_id": 97,
            "canvas_length": 8,
        },
    ),
    "higgs_audio_v2": (
        "HiggsAudioV2ForConditionalGeneration",
        {"num_codebooks": 4, "codebook_size": 20, "audio_stream_bos_id": 17, "audio_stream_eos_id": 18},
    ),
}
"""By `config.model_type`: the class, and what its configuration is to be made with."""


def others() -> list[str]:
    """The families here that this transformers has."""
    return sorted(name for name in _OTHERS if name in CONFIG_MAPPING)


def other_class(family: str) -> str:
    return _OTHERS[family][0]


def build_other(family: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A tiny model in eval mode; equal seeds give equal weights.

    Args:
        more: arguments of the configuration that are to be other than they are here; of its parts, by name within them.
    """
    name, changes = _OTHERS[family]
    parts = {key: {**changes[key], **value} for key, value in more.items() if isinstance(value, dict)}
    changes = {**changes, **more, **parts}
    config_class: Any = CONFIG_MAPPING[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, name)._from_config(
            shrunk(config_class(), changes), dtype=torch.float32
        )
        spread(model)
    if type(model.generation_config) is GenerationConfig:
        model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, use_cache=True)
    return model.eval()
