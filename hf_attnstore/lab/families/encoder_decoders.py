"""Tiny seeded random encoder-decoder models, and what their encoders are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY = 101
START = 2
"""The id that a decoder begins with."""

_SPECIAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "decoder_start_token_id": START,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
_BART: dict[str, Any] = {
    **_SPECIAL,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
}
_T5: dict[str, Any] = {
    **_SPECIAL,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
}
_GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "sliding_window": 8,
}
_SPEECH: dict[str, Any] = {**_BART, "max_source_positions": 60, "max_target_positions": 64}


def _t5gemma() -> Any:
    encoder = {**_GEMMA, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    decoder = {
        **_GEMMA,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "cross_attention_hidden_size": 48,
    }
    special = {name: value for name, value in _SPECIAL.items() if "forced" not in name}
    return transformers.T5GemmaConfig(encoder=encoder, decoder=decoder, **special)


def _whisper() -> Any:
    return transformers.WhisperConfig(**{**_SPEECH, "num_mel_bins": 8, "suppress_tokens": None})


def _marian() -> Any:
    return transformers.MarianConfig(**_BART, decoder_vocab_size=VOCABULARY)


def _plain(name: str, settings: dict[str, Any], **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**{**settings, **changes})


_BUILDERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "t5": ("T5ForConditionalGeneration", _plain("T5Config", _T5, num_layers=2)),
    "mt5": ("MT5ForConditionalGeneration", _plain("MT5Config", _T5)),
    "umt5": ("UMT5ForConditionalGeneration", _plain("UMT5Config", _T5)),
    "longt5": ("LongT5ForConditionalGeneration", _plain("LongT5Config", _T5, local_radius=4, global_block_size=4)),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        _plain("SwitchTransformersConfig", _T5, num_experts=2, num_sparse_encoder_layers=1,
               num_sparse_decoder_layers=1),
    ),
    "bart": ("BartForConditionalGeneration", _plain("BartConfig", _BART)),
    "mbart": ("MBartForConditionalGeneration", _plain("MBartConfig", _BART)),
    "pegasus": ("PegasusForConditionalGeneration", _plain("PegasusConfig", _BART)),
    "pegasus-x": (
        "PegasusXForConditionalGeneration",
        _plain("PegasusXConfig", _BART, block_size=8, num_global_tokens=4),
    ),
    "bigbird-pegasus": (
        "BigBirdPegasusForConditionalGeneration",
        _plain("BigBirdPegasusConfig", _BART, attention_type="original_full"),
    ),
    "marian": ("MarianMTModel", _marian),
    "mvp": ("MvpForConditionalGeneration", _plain("MvpConfig", _BART)),
    "plbart": ("PLBartForConditionalGeneration", _plain("PLBartConfig", _BART)),
    "blenderbot": ("BlenderbotForConditionalGeneration", _plain("BlenderbotConfig", _BART)),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", _plain("BlenderbotSmallConfig", _BART)),
    "m2m-100": ("M2M100ForConditionalGeneration", _plain("M2M100Config", _BART)),
    "nllb-moe": (
        "NllbMoeForConditionalGeneration",
        _plain("NllbMoeConfig", _BART, num_experts=2, expert_capacity=8, encoder_sparse_step=2, decoder_sparse_step=2),
    ),
    "led": (
        "LEDForConditionalGeneration",
        _plain("LEDConfig", _BART, max_encoder_position_embeddings=128, max_decoder_position_embeddings=128,
               attention_window=[8, 8, 8]),
    ),
    "fsmt": (
        "FSMTForConditionalGeneration",
        _plain("FSMTConfig", _BART, langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY),
    ),
    "prophetnet": (
        "ProphetNetForConditionalGeneration",
        _plain("ProphetNetConfig", _SPECIAL, hidden_size=48, encoder_ffn_dim=64, decoder_ffn_dim=64,
               num_encoder_layers=3, num_decoder_layers=2, num_encoder_attention_heads=4,
               num_decoder_attention_heads=4, max_position_embeddings=128),
    ),
    "t5gemma": ("T5GemmaForConditionalGeneration", _t5gemma),
    "whisper": ("WhisperForConditionalGeneration", _whisper),
    "speech-to-text": (
        "Speech2TextForConditionalGeneration",
        _plain("Speech2TextConfig", _SPEECH, input_feat_per_channel=8, conv_channels=16),
    ),
    "moonshine": (
        "MoonshineForConditionalGeneration",
        _plain("MoonshineConfig", _SPECIAL, hidden_size=48, intermediate_size=64, encoder_num_hidden_layers=3,
               decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
               encoder_num_key_value_heads=4, decoder_num_key_value_heads=4, max_position_embeddings=128),
    ),
}  # fmt: skip

FAMILIES = tuple(_BUILDERS)
_SUFFIX = " (encoder-decoder)"
"""Some families are in both of transformers' lists, as BART is: with its encoder, and its decoder alone."""


def listed() -> list[str]:
    """The families, under the names that they have beside decoders alone."""
    return sorted(name + _SUFFIX for name in FAMILIES)


def family_of(name: str) -> str | None:
    """The family behind a name as from `listed`; None if it is none."""
    family = name.removesuffix(_SUFFIX)
    return family if name.endswith(_SUFFIX) and family in _BUILDERS else None


def class_of(family: str) -> str:
    return _BUILDERS[family][0]


MAIN_FAMILIES = ("t5", "bart", "mbart", "marian", "pegasus", "t5gemma", "whisper")


def make_seq2seq(family: str, seed: int = 0) -> Any:
    """A model in eval mode. The same arguments give the same weights, in any process."""
    name, configure = _BUILDERS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(configure())
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():  # attention must matter
                if parameter.ndim > 1 and "embed" not in parameter_name and "shared" not in parameter_name:
                    parameter.mul_(4.0)
    model.generation_config.max_length = 64
    return model.eval()


def encoder_input(family: str, seed: int = 1, size: int = 40, padding: int = 0) -> dict[str, torch.Tensor]:
    """Something for the encoder, with `padding` positions at the end that are masked."""
    generator = torch.Generator().manual_seed(seed)
    if family == "whisper":
        return {"input_features": torch.randn((1, 8, 120), generator=generator)}
    if family == "speech-to-text":
        inputs = {"input_features": torch.randn((1, size, 8), generator=generator)}
    elif family == "moonshine":
        inputs = {"input_values": torch.randn((1, 8000), generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(3, VOCABULARY, (1, size), generator=generator)}
    mask = torch.ones(next(iter(inputs.values())).shape[:2], dtype=torch.long)
    if padding:
        mask[:, -padding:] = 0
    return {**inputs, "attention_mask": mask}


def prompt(count: int, seed: int = 5) -> torch.Tensor:
    """Ids `[1, count]` for a decoder, from the one that it begins with."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (1, count), generator=generator)
    ids[:, 0] = START
    return ids
