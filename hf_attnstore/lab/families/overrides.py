"""What the general recipe for tiny configurations can't know of a family."""

from __future__ import annotations

from typing import Any

from .shrink import LEAVE_OUT, WINDOW

_TWO_WITH_WINDOW: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "num_hidden_layers": 2,
}
_LFM: dict[str, Any] = {
    "layer_types": ["conv", "full_attention", "conv"],
    "num_hidden_layers": 3,
    "full_attn_idxs": LEAVE_OUT,
}
_SHARING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_GEMMA4: dict[str, Any] = {**_SHARING, "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}}
_ASSISTANT: dict[str, Any] = {
    **_GEMMA4,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {1: {"head_dim": 16}},
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
_GEMMA3N: dict[str, Any] = {
    **_SHARING,
    "intermediate_size": 64,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}
_DOTS3: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "per_layer_config": {
        2: {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 24,
            "head_dim": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        }
    },
    "head_dim": 16,
    "rope_parameters": LEAVE_OUT,
}
_QWEN4: dict[str, Any] = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],  # newer versions: indexed_attention
    "num_hidden_layers": 3,
    "ple_layer_ids": [2],
    "ple_embed_dim": 16,
    "heads_per_ngram": 4,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 1,
    "eos_token_id": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_SMALL_VISION: dict[str, Any] = {
    "num_hidden_layers": 1,
    "intermediate_layers_indices": [0],
    "output_channels": 8,
    "image_size": 16,
    "patch_size": 8,
}

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "big_bird": {"attention_type": "original_full"},  # its default attends to what comes later in long texts
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        **_TWO_WITH_WINDOW,
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "num_hidden_layers": 1,
            "mlp_layer_types": ["dense"],
            "per_layer_config": {},
        },
        "audio_config": {"adapter_out_dim": 32, "downsample_hidden_size": 8, "adapter_input_size": 32},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8, "mamba_n_groups": 1},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_assistant": {"text_config": _ASSISTANT, "backbone_hidden_size": 32, "num_centroids": 8},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT, "backbone_hidden_size": 32, "num_centroids": 8},
    "got_ocr2": {"vision_config": {**_SMALL_VISION, "global_attn_indexes": [0]}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "laguna": {**_TWO_WITH_WINDOW, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2": _LFM,
    "lfm2_moe": _LFM,
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "mellum": _TWO_WITH_WINDOW,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 8},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "mpt": {"attn_config": {"alibi": True}, "use_cache": True},  # its default is to have no cache
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {**_SMALL_VISION, "crop_size": 16},
        "audio_config": {"num_blocks": 1, "nemo_conv_channels": 8},
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "attention_head_size": 8,
        "hash_seed": 1,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 128,
        "shape_embed_dim": 8,
        "shape_vocab_size": 128,
    },
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its own state takes multiples of 64 for granted
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": WINDOW,
        "router_hidden_size": 16,
    },
}
"""By family: arguments of its configuration, nested for nested configurations."""

DEFAULTS: dict[str, dict[str, Any]] = {
    # its own default values are not valid together
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
            "num_hidden_layers": 30,
        }
    },
    "gemma4_unified_assistant": {
        "text_config": {
            "model_type": "gemma4_unified_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
            "num_hidden_layers": 30,
        }
    },
}
"""By family: arguments that its configuration can't do without."""

for _family in ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"):
    CHANGES[_family] = {**CHANGES.get(_family, {}), "is_decoder": True}
for _family in ("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"):
    CHANGES[_family] = {**CHANGES.get(_family, {}), "is_decoder": True}
for _family in ("xlm-roberta-xl", "xmod"):
    CHANGES[_family] = {**CHANGES.get(_family, {}), "is_decoder": True}
