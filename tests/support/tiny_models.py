"""Tiny seeded random models, one for each kind of attention that the cache has to keep."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 101
WINDOW = 24
BLOCK = 16

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**TINY, **changes})


_BUILDERS: dict[str, Any] = {
    "llama-mha": lambda: LlamaForCausalLM(_llama(num_key_value_heads=4)),
    "llama-gqa": lambda: LlamaForCausalLM(_llama()),
    "llama-mqa": lambda: LlamaForCausalLM(_llama(num_key_value_heads=1)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=WINDOW)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**{**TINY, "num_hidden_layers": 2}, head_dim=12, sliding_window=WINDOW)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **{**TINY, "num_hidden_layers": 3},
            head_dim=12,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=12)),
    "deepseek-v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{**TINY, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=12,
            v_head_dim=12,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=512,
            n_embd=48,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ),
}

FAMILIES = tuple(_BUILDERS)
SLIDING_FAMILIES = ("mistral", "gemma2", "gemma3")


def make_model(family: str = "llama-gqa", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode. The same arguments give the same weights, in any process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[family]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # attention must matter: a wrong key, a wrong token
                if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                    parameter.mul_(10.0)
    return model.to(dtype).eval()


def make_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama whose config differs in `changes`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(_llama(**changes)).eval()


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    """Random ids `[1, count]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, count), generator=generator)
