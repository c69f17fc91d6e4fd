"""Tiny random models that take pictures or sounds, and prompts for them made by hand: no processor, no hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from .tiny_models import TINY

PICTURE = 98
"""The placeholder's id."""
VIDEO = 97

_NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def _llava() -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_CLIP, projection_dim=32),
        text_config=LlamaConfig(**TINY),
        image_token_id=PICTURE,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def _pixtral() -> PreTrainedModel:
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TINY),
        image_token_id=PICTURE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def _vipllava() -> PreTrainedModel:
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**_CLIP, projection_dim=32),
        text_config=LlamaConfig(**TINY),
        image_token_index=PICTURE,
        vision_feature_layers=[-1, -2],
    )
    return VipLlavaForConditionalGeneration(config)


def _llava_next() -> PreTrainedModel:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_CLIP, projection_dim=32),
        text_config=LlamaConfig(**TINY),
        image_token_index=PICTURE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    return LlavaNextForConditionalGeneration(config)


def _mistral3() -> PreTrainedModel:
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    config = Mistral3Config(
        vision_config=vision,
        text_config=MistralConfig(**TINY, sliding_window=None),
        image_token_index=PICTURE,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )
    return Mistral3ForConditionalGeneration(config)


def _internvl() -> PreTrainedModel:
    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[16, 16],
        patch_size=[4, 4],
    )
    config = InternVLConfig(vision_config=vision, text_config=Qwen2Config(**TINY), image_token_id=PICTURE)
    return InternVLForConditionalGeneration(config)


def _aya_vision() -> PreTrainedModel:
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**_CLIP, vision_use_head=False),
        text_config=Cohere2Config(**TINY, sliding_window=24),
        image_token_index=PICTURE,
    )
    return AyaVisionForConditionalGeneration(config)


def _gemma3() -> PreTrainedModel:
    text = {
        **TINY,
        "num_hidden_layers": 3,
        "head_dim": 12,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    config = Gemma3Config(
        text_config=text, vision_config=_CLIP, mm_tokens_per_image=4, image_token_id=PICTURE, boi_token_id=95
    )
    return Gemma3ForConditionalGeneration(config)


_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
_VIDEO_IDS: dict[str, Any] = {"image_token_id": PICTURE, "video_token_id": VIDEO, "vision_start_token_id": 96}


def _qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config={**TINY, "rope_parameters": _ROPE}, vision_config=vision, **_VIDEO_IDS)
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> PreTrainedModel:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config={**TINY, "rope_parameters": _ROPE}, vision_config=vision, **_VIDEO_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> PreTrainedModel:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**TINY, "head_dim": 12, "rope_parameters": {**_ROPE, "mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_VIDEO_IDS))


def _qwen3_vl_moe() -> PreTrainedModel:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {
        **TINY,
        "head_dim": 12,
        "rope_parameters": {**_ROPE, "mrope_interleaved": True},
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_VIDEO_IDS)
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation("eager")  # the fused one has no double precision
    return model


def _qwen2_audio() -> PreTrainedModel:
    audio = {
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "max_source_positions": 20,
    }
    config = Qwen2AudioConfig(
        audio_config=audio, text_config={**TINY, "model_type": "qwen2"}, audio_token_id=PICTURE, **_NO_SPECIAL
    )
    return Qwen2AudioForConditionalGeneration(config)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Picture:
    """A picture, video or sound: what stands for it in the ids, and what the model is given."""

    ids: tuple[int, ...]
    inputs: dict[str, torch.Tensor]


def _image(placeholders: int) -> Callable[[int], Picture]:
    return lambda seed: Picture((PICTURE,) * placeholders, {"pixel_values": _random(1, 3, 16, 16, seed=seed)})


def _rows_of_patches(seed: int) -> Picture:
    """Pixtral's: each row of patches ends with an id of its own."""
    rows, columns = (3, 4) if seed % 2 else (4, 5)
    values = _random(1, 3, 4 * rows, 4 * columns, seed=seed)
    sizes = torch.tensor([[4 * rows, 4 * columns]])
    return Picture(((PICTURE,) * columns + (94,)) * rows, {"pixel_values": values, "image_sizes": sizes})


def _merged_rows(seed: int) -> Picture:
    """Mistral's: four patches make one place."""
    sizes = torch.tensor([[16, 24]])
    ids = ((PICTURE,) * 3 + (94,)) * 2
    return Picture(ids, {"pixel_values": _random(1, 3, 16, 24, seed=seed), "image_sizes": sizes})


def _tiles(seed: int) -> Picture:
    """Llava-NeXT's: the whole picture and two tiles side by side, each of whose rows ends with a place of its own."""
    sizes = torch.tensor([[16, 32]])
    return Picture(
        (PICTURE,) * (16 + 4 * 9), {"pixel_values": _random(1, 3, 3, 16, 16, seed=seed), "image_sizes": sizes}
    )


def _patches(seed: int) -> Picture:
    """Qwen's: its size is its own, so that several are of different length."""
    grid = torch.tensor([[1, 4, 6 if seed % 2 else 8]])
    count = int(grid.prod())
    values = _random(count, 3 * 2 * 4 * 4, seed=seed)
    return Picture((PICTURE,) * (count // 4), {"pixel_values": values, "image_grid_thw": grid})


def _sound(seed: int) -> Picture:
    frames = 24 if seed % 2 else 36
    mask = (torch.arange(40) < frames).long()[None]
    encoded = ((frames - 1) // 2 + 1 - 2) // 2 + 1
    return Picture(
        (PICTURE,) * encoded, {"input_features": _random(1, 8, 40, seed=seed), "feature_attention_mask": mask}
    )


@dataclass(frozen=True)
class Family:
    """A model, pictures for it, and which token types its processor would give."""

    build: Callable[[], PreTrainedModel]
    picture: Callable[[int], Picture]
    types: str = ""


MORE_FAMILIES: dict[str, Family] = {
    "aya-vision": Family(_aya_vision, _image(4)),
    "internvl": Family(_internvl, _image(4)),
    "llava-next": Family(_llava_next, _tiles),
    "mistral3": Family(_mistral3, _merged_rows),
    "qwen3-vl-moe": Family(_qwen3_vl_moe, _patches, "mm_token_type_ids"),
    "vipllava": Family(_vipllava, _image(16)),
}
"""Those that take pictures like one of the others do, but for how many places they have."""

FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, _image(16)),
    "llava-pixtral": Family(_pixtral, _rows_of_patches),
    "gemma3": Family(_gemma3, _image(4), "token_type_ids"),
    "qwen2-vl": Family(_qwen2_vl, _patches, "mm_token_type_ids"),
    "qwen2.5-vl": Family(_qwen2_5_vl, _patches, "mm_token_type_ids"),
    "qwen3-vl": Family(_qwen3_vl, _patches, "mm_token_type_ids"),
    "qwen2-audio": Family(_qwen2_audio, _sound),
}
ALL_FAMILIES = FAMILIES | MORE_FAMILIES


def make_picture_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode, in double precision: how the rows of a product are grouped rounds differently, and random
    weights blow that up. The same arguments give the same weights, in any process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ALL_FAMILIES[family].build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # attention must matter: a wrong key, a wrong token
                if not parameter.any():  # pictures must matter, too
                    parameter.normal_(std=0.1)
                elif parameter.ndim > 1 and "embed" not in name:
                    parameter.mul_(5.0 if "language_model" in name else 2.0)
    return model.double().eval()


def text(count: int, seed: int) -> list[int]:
    """Random ids of text. Its last one says that a picture may come, which Qwen's models count."""
    generator = torch.Generator().manual_seed(seed)
    return [*torch.randint(3, 90, (count - 1,), generator=generator).tolist(), 96]


def _of_one_size(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pictures, with zeros to the right and below as processors put them; everything else as it is."""
    if values[0].ndim != 4:
        return values
    height, width = (max(value.shape[axis] for value in values) for axis in (2, 3))
    return [torch.nn.functional.pad(value, (0, width - value.shape[3], 0, height - value.shape[2])) for value in values]


def prompt(family: str, parts: Sequence[list[int] | Picture]) -> dict[str, Any]:
    """What a processor would make of text and pictures: ids, mask, token types, and the pictures' inputs."""
    ids: list[int] = []
    inputs: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        ids += part.ids if isinstance(part, Picture) else part
        if isinstance(part, Picture):
            for name, value in part.inputs.items():
                inputs.setdefault(name, []).append(value)
    input_ids = torch.tensor([ids])
    made: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    made |= {name: torch.cat(_of_one_size(values)) for name, values in inputs.items()}
    types = ALL_FAMILIES[family].types
    if types:
        made[types] = (input_ids == PICTURE).long() + 2 * (input_ids == VIDEO).long()
    return made
