"""Making a configuration tiny: which of its numbers are sizes, and how small they may become.

Works from a configuration's default values, so that nothing is known of a family but its attribute names. Of the
layers, one of each kind stays, and all lists by layer are cut alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 128
ORDINARY_IDS = range(16, 96)
"""Ids that no shrunk configuration gives a meaning to: special ones lie before or behind."""
WINDOW = 12
CHUNK = 16
LAYERS = 4
_FEWEST_LAYERS = 2

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
_BY_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "attention_layers",
    "kv_sharing_modes",
    "mlp_types",
    "ffn_layer_types",
    "block_types",
)
"""Lists with an entry for each layer that say what kind of layer it is."""

_SIZES: dict[str, int] = {
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(
        ("emb_dim", "text_hidden_size", "lru_width", "embed_dim", "embedding_dim", "hidden_size_global"), 32
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner"), 64),
    **dict.fromkeys(("ffn_hidden_size", "dff", "dim_ff", "intermediate_size_mlp", "dense_intermediate_size"), 64),
    **dict.fromkeys(("shared_intermediate_size", "feed_forward_size", "mlp_hidden_size"), 64),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "expert_ffn_hidden_size",
        ),
        16,
    ),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "attention_head_dim", "swa_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("kv_channels", "d_kv", "rotary_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    "o_groups": 2,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    # running states
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 2),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    # lengths
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 256),
    **dict.fromkeys(("model_max_length", "max_target_positions", "max_source_positions", "max_sequence_length"), 256),
    # models that begin anew past it (Phi-3) are measured below it
    "original_max_position_embeddings": 256,
    **dict.fromkeys(("sliding_window", "window_size", "sliding_window_size", "attention_window_size"), WINDOW),
    "local_attention_window_len": WINDOW,
    "keep_window_size": WINDOW,
    "local_attention": 2 * WINDOW,
    **dict.fromkeys(("attention_chunk_size", "chunk_size", "mamba_chunk_size", "block_size"), CHUNK),
    # what else would be large
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "block_multiple_of": 8,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "hc_lowrank": 8,
    "ple_embed_dim": 8,
    "d_rel": 8,
    "rel_extent": 16,
}
LEAVE_OUT: Any = object()
"""As a change: do not give the configuration this argument."""
_SPREAD = 0.2
"""Standard deviation of the weights, where a configuration can say it: at the usual 0.02 so narrow a model hardly
looks at what came before."""


def shrunk(config: PreTrainedConfig, changes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A tiny configuration of the same class.

    Args:
        config: one with default values.
        changes: what the recipe can't know of the family; nested for nested configurations. They come last.
    """
    return type(config)(**small_arguments(config, changes or {}))


def small_arguments(config: PreTrainedConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What to construct a tiny configuration of this class with."""
    own = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    names = {**own, **{alias: own[name] for alias, name in type(config).attribute_map.items() if name in own}}
    arguments: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, PreTrainedConfig):
            nested = changes.get(name)
            arguments[name] = small_arguments(value, nested if isinstance(nested, Mapping) else {})
        elif isinstance(value, bool) or value is None:
            continue
        elif name in ("vocab_size", "n_vocab", "unpadded_vocab_size") and isinstance(value, int):
            arguments[name] = min(value, VOCABULARY)
        elif name in ("initializer_range", "init_std"):
            arguments[name] = _SPREAD
        elif name in _SIZES and isinstance(value, int):
            arguments[name] = min(value, _SIZES[name])
        elif "dropout" in name or name.endswith("_pdrop"):
            arguments[name] = type(value)(0) if isinstance(value, (int, float)) else value
    _equal_heads(own, arguments)
    _few_layers(own, names, arguments)
    _rope(own, arguments)
    _special_ids(own, arguments)
    for name, value in changes.items():
        if not (isinstance(value, Mapping) and isinstance(own.get(name), PreTrainedConfig)):
            arguments[name] = value
    return {name: value for name, value in arguments.items() if value is not LEAVE_OUT}


def _equal_heads(own: Mapping[str, Any], arguments: dict[str, Any]) -> None:
    """As many key heads as query heads, or a single one, where it was so."""
    for heads, shared in (
        ("num_attention_heads", "num_key_value_heads"),
        ("num_attention_heads", "num_kv_heads"),
        ("swa_num_attention_heads", "swa_num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if isinstance(own.get(heads), int) and own.get(heads) == own.get(shared):
            arguments[shared] = arguments[heads]


def _few_layers(own: Mapping[str, Any], names: Mapping[str, Any], arguments: dict[str, Any]) -> None:
    """One layer of each kind, in the order in which they come."""
    counted = [name for name in _LAYER_COUNTS if isinstance(own.get(name), int)]
    if not counted:
        return
    count = own[counted[0]]
    lists = {name: value for name, value in own.items() if isinstance(value, (list, tuple)) and len(value) == count}
    kinds: dict[Any, list[int]] = {}
    for number in range(count):
        kinds.setdefault(tuple(str(lists[name][number]) for name in _BY_LAYER if name in lists), []).append(number)
    chosen = [numbers[0] for numbers in kinds.values()][:LAYERS]
    for number in range(count):
        if len(chosen) >= _FEWEST_LAYERS:
            break
        if number not in chosen:
            chosen.append(number)
    chosen.sort()
    for name in counted:
        arguments[name] = len(chosen)
    for name, value in lists.items():
        if name != "block_types" or len(value) == count:
            arguments[name] = [value[number] for number in chosen]
    for name in ("encoder_layers", "num_encoder_layers"):
        if isinstance(own.get(name), int):
            arguments[name] = len(chosen)  # some configurations count these as the layers of their cache


def _rope(own: Mapping[str, Any], arguments: dict[str, Any]) -> None:
    rope = own.get("rope_parameters")
    if isinstance(rope, Mapping):
        arguments["rope_parameters"] = _small_rope(rope)


def _small_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            small[name] = _small_rope(value)
        elif name == "mrope_section":
            small[name] = [2, 1, 1]
        elif name == "original_max_position_embeddings":
            small[name] = 64
        else:
            small[name] = value
    return small


def _special_ids(own: Mapping[str, Any], arguments: dict[str, Any]) -> None:
    """Special ids get out of the way of ordinary ones: before them, or from the vocabulary's end down."""
    low, high = 0, VOCABULARY - 1
    for name in sorted(own):
        value = own[name]
        if not name.endswith(("_token_id", "_token_index", "token_ids")) or value is None or isinstance(value, bool):
            continue
        several = isinstance(value, (list, tuple))
        if name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id"):
            new, low = low, low + 1
        else:
            new, high = high, high - 1
        arguments[name] = [new] if several else new
