"""Architectures of transformers as tiny random models, and what their modelling files do with positions.

The table is written by hand from the `apply_rotary_pos_emb` (or its like) of each modelling file. A verdict is, by
layer, what turns: (tensor, style, first channel, channels); None for a layer that knows no positions.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

HALF, INTERLEAVED = "half-split", "interleaved"
Turn = tuple[str, str, int, int] | None

_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def _long(kind: str, **settings: Any) -> dict[str, Any]:
    return _rope(kind, original_max_position_embeddings=64, **settings)


_WHOLE: list[Turn] = [("keys", HALF, 0, 16)] * 2
_WHOLE_INTERLEAVED: list[Turn] = [("keys", INTERLEAVED, 0, 16)] * 2
_FIRST_HALF: list[Turn] = [("keys", HALF, 0, 8)] * 2
_FIRST_QUARTER: list[Turn] = [("keys", HALF, 0, 4)] * 2
_NOTHING: list[Turn] = [None, None]
_LEARNED = "no rotation"
_LENGTH = "depend on the length"
_STATE = "not by token"

# name: (classes' prefix, changes to the common settings, verdict)
TABLE: dict[str, tuple[str, dict[str, Any], list[Turn] | str]] = {
    "llama": ("Llama", {}, _WHOLE),
    "llama-linear": ("Llama", _rope("linear", factor=4.0), _WHOLE),
    "llama-llama3": ("Llama", _long("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), _WHOLE),
    "llama-yarn": ("Llama", _long("yarn", factor=4.0), _WHOLE),
    "llama-dynamic": ("Llama", _rope("dynamic", factor=2.0), _LENGTH),
    "llama-longrope": (
        "Llama",
        _long("longrope", factor=4.0, short_factor=[1.0] * 8, long_factor=[3.0] * 8),
        _LENGTH,
    ),
    "mistral": ("Mistral", {"sliding_window": 24}, _WHOLE),
    "mixtral": ("Mixtral", _LOCAL_MOE, _WHOLE),
    "gemma": ("Gemma", {"head_dim": 16}, _WHOLE),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 24}, _WHOLE),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        [("keys", HALF, 0, 16)] * 3,
    ),
    "qwen2": ("Qwen2", {}, _WHOLE),
    "qwen3": ("Qwen3", {"head_dim": 16}, _WHOLE),
    "qwen2-moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 32}, _WHOLE),
    "qwen3-moe": ("Qwen3Moe", {**_MOE, "head_dim": 16}, _WHOLE),
    "phi": ("Phi", {}, _FIRST_HALF),
    "phi3": ("Phi3", {}, _WHOLE),
    "phimoe": ("Phimoe", _LOCAL_MOE, _WHOLE),
    "stablelm": ("StableLm", {}, _FIRST_QUARTER),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.25}, _FIRST_QUARTER),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 8}, [("keys", INTERLEAVED, 0, 8)] * 2),
    "codegen": ("CodeGen", {**_GPT, "n_ctx": 256, "rotary_dim": 8}, [("keys", INTERLEAVED, 0, 8)] * 2),
    "falcon": ("Falcon", {"alibi": False}, _WHOLE),
    "falcon-alibi": ("Falcon", {"alibi": True}, _NOTHING),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}, _NOTHING),
    "mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, _NOTHING),
    "gpt2": ("GPT2", _GPT, _LEARNED),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 64}, _LEARNED),
    "gpt-neo": (
        "GPTNeo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 32},
        _LEARNED,
    ),
    "gpt-bigcode": ("GPTBigCode", _GPT, _LEARNED),
    "xglm": ("XGLM", {"d_model": 64, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}, _LEARNED),
    "biogpt": ("BioGpt", {}, _LEARNED),
    "cohere": ("Cohere", {}, _WHOLE_INTERLEAVED),
    "cohere2": ("Cohere2", {"num_hidden_layers": 4}, [*[("keys", INTERLEAVED, 0, 16)] * 3, None]),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}, [*[("keys", HALF, 0, 16)] * 3, None]),
    "glm": ("Glm", {"head_dim": 16}, [("keys", INTERLEAVED, 0, 8)] * 2),
    "glm4": ("Glm4", {"head_dim": 16}, [("keys", INTERLEAVED, 0, 8)] * 2),
    "olmo": ("Olmo", {}, _WHOLE),
    "olmo2": ("Olmo2", {}, _WHOLE),
    "olmo3": ("Olmo3", {"sliding_window": 32}, _WHOLE),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, _WHOLE),
    "starcoder2": ("Starcoder2", {}, _WHOLE),
    "granite": ("Granite", {}, _WHOLE),
    "granite-moe": ("GraniteMoe", _LOCAL_MOE, _WHOLE),
    "nemotron": ("Nemotron", {}, _FIRST_HALF),
    "persimmon": ("Persimmon", {}, _FIRST_HALF),
    # v2 leaves pairs where they are (complex numbers); v3 sorts them into halves while it turns them
    "deepseek-v2": ("DeepseekV2", _MLA, [("values", INTERLEAVED, 0, 8)] * 2),
    "deepseek-v3": ("DeepseekV3", _MLA, [("values", HALF, 0, 8)] * 2),
    "exaone4": (
        "Exaone4",
        {"num_hidden_layers": 4, "sliding_window": 32, "sliding_window_pattern": 4},
        [*[("keys", HALF, 0, 16)] * 3, None],
    ),
    "dbrx": (
        "Dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
        _WHOLE,
    ),
    "ernie4.5": ("Ernie4_5", {"head_dim": 16}, _WHOLE_INTERLEAVED),
    "gpt-oss": ("GptOss", {**_LOCAL_MOE, "head_dim": 16, "sliding_window": 32, **_rope("default")}, _WHOLE),
    "helium": ("Helium", {"head_dim": 16}, _WHOLE_INTERLEAVED),
    "jetmoe": ("JetMoe", {**_LOCAL_MOE, "kv_channels": 16}, _WHOLE),
    "arcee": ("Arcee", {}, _WHOLE),
    "seed-oss": ("SeedOss", {"head_dim": 16}, _WHOLE),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 16}, _WHOLE),
    "apertus": ("Apertus", {}, _WHOLE),
    "bitnet": ("BitNet", {}, _WHOLE),
    "mamba": ("Mamba", {}, _STATE),
    "jamba": ("Jamba", {}, _STATE),
    "bamba": ("Bamba", {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1}, _STATE),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, _STATE),
    # sinusoids that are added to the embeddings
    "ctrl": ("CTRL", {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 64, "n_positions": 256}, _LEARNED),
    "bart-decoder": (
        "Bart",
        {
            "d_model": 64,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "is_encoder_decoder": False,
        },
        _LEARNED,
    ),
    "rwkv": ("Rwkv", {}, "keeps a running state"),
}


def make_architecture(name: str, dtype: torch.dtype = torch.float32) -> Any | None:
    """A tiny model of the table, seeded; None where this transformers does not have it."""
    prefix, changes, _ = TABLE[name]
    config_class = getattr(transformers, f"{prefix}Config", None)
    names = (f"{prefix.removesuffix('Text')}ForCausalLM", f"{prefix}LMHeadModel")
    model_class = next((found for n in names if (found := getattr(transformers, n, None))), None)
    if config_class is None or model_class is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**{**_COMMON, **changes})).to(dtype).eval()
