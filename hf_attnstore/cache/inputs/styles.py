"""How models take pictures, videos and sounds: which placeholder ids stand for which rows of which inputs.

A model type that is not here has its pictures recomputed each time. One entry in `STYLES` makes it known; what it
needs is that attention is causal but within an item, and that nothing else goes into an item's KV but its own rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Part = tuple[int, int]
"""One item: how many placeholders it has, and how many rows of the features."""

Layout = Callable[[Any, torch.Tensor, Mapping[str, Any], Sequence[int]], list[Part] | None]
"""Of (config, features, inputs beside them, lengths of the runs of placeholders), the items in order; None if these
do not fit each other as expected."""


@dataclass(frozen=True)
class Modality:
    """One kind of input beside text."""

    features: str
    """The input that is made into embeddings; its first dimension goes over the items' rows."""
    placeholders: tuple[str, ...]
    """Names under which a config may have the placeholder's id."""
    kind: int
    """What `mm_token_type_ids` say at its placeholders."""
    layout: Layout
    beside: tuple[str, ...] = ()
    """Inputs that say something of each item, one row for each."""
    trim: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor] = lambda rows, beside: rows
    """What of one item's rows is content; the rest is there because another item is larger."""
    whole_runs: bool = False
    """Whether all placeholders that follow each other see each other, whichever item they belong to."""

    def placeholder(self, config: Any) -> int | None:
        """The placeholder's id; None if the config has none."""
        found = (getattr(config, name, None) for name in self.placeholders)
        return next((number for number in found if isinstance(number, int)), None)


def by_grid(name: str) -> Layout:
    """Items whose numbers of patches the input `name` `[items, (time, height, width)]` says."""

    def layout(
        config: Any, features: torch.Tensor, beside: Mapping[str, Any], runs: Sequence[int]
    ) -> list[Part] | None:
        grid = beside.get(name)
        if not isinstance(grid, torch.Tensor) or grid.ndim != 2 or grid.shape[1] != 3:
            return None
        merged = int(getattr(config.vision_config, "spatial_merge_size", 0)) ** 2
        rows = [math.prod(item) for item in grid.tolist()]
        if not merged or any(count % merged for count in rows) or sum(rows) != features.shape[0]:
            return None
        return [(count // merged, count) for count in rows]

    return layout


def equal(config: Any, features: torch.Tensor, beside: Mapping[str, Any], runs: Sequence[int]) -> list[Part] | None:
    """Items of one size, so that each has as many placeholders; several may follow each other."""
    count, tokens = features.shape[0], sum(runs)
    if features.ndim != 4 or not count or tokens % count or any(run % (tokens // count) for run in runs):
        return None
    return [(tokens // count, 1)] * count


def one_run(config: Any, features: torch.Tensor, beside: Mapping[str, Any], runs: Sequence[int]) -> list[Part] | None:
    """Items of different sizes, which are never cut: if there are as many runs as items, each is one."""
    return [(run, 1) for run in runs] if len(runs) == features.shape[0] else None


def by_size(config: Any, features: torch.Tensor, beside: Mapping[str, Any], runs: Sequence[int]) -> list[Part] | None:
    """Pixtral's images, cut into rows: `image_sizes` `[items, (height, width)]` in pixels says how many patches."""
    sizes = beside.get("image_sizes")
    vision = config.vision_config
    if sizes is None:
        return equal(config, features, beside, runs)
    if getattr(vision, "model_type", "") != "pixtral" or len(sizes) != features.shape[0]:
        return None
    patch = int(vision.patch_size) * int(getattr(config, "spatial_merge_size", 1))
    return [((int(height) // patch) * (int(width) // patch), 1) for height, width in torch.as_tensor(sizes).tolist()]


def _within_size(rows: torch.Tensor, beside: Mapping[str, Any]) -> torch.Tensor:
    """The pixels `[1, channels, height, width]` within the one row of `image_sizes`."""
    sizes = beside.get("image_sizes")
    if sizes is None or len(sizes) != 1:
        return rows
    height, width = torch.as_tensor(sizes)[0].tolist()
    return rows[..., : int(height), : int(width)]


def _without_empty_tiles(rows: torch.Tensor, beside: Mapping[str, Any]) -> torch.Tensor:
    """The tiles `[1, tiles, …]` up to the last that is not empty; how many there are follows from `image_sizes`."""
    if rows.ndim != 5 or len(rows) != 1 or beside.get("image_sizes") is None:
        return rows
    filled = rows[0].flatten(1).any(dim=1).nonzero()
    return rows[:, : int(filled[-1]) + 1] if len(filled) else rows


_IMAGE = ("image_token_id", "image_token_index")
_VIDEO = ("video_token_id", "video_token_index")
_AUDIO = ("audio_token_id", "audio_token_index")

_GRID = (
    Modality("pixel_values", _IMAGE, 1, by_grid("image_grid_thw"), ("image_grid_thw",)),
    Modality("pixel_values_videos", _VIDEO, 2, by_grid("video_grid_thw"), ("video_grid_thw", "second_per_grid_ts")),
)
_EQUAL = (Modality("pixel_values", _IMAGE, 1, equal),)
_SIZED = (Modality("pixel_values", _IMAGE, 1, by_size, ("image_sizes",), _within_size),)

STYLES: Mapping[str, tuple[Modality, ...]] = {
    "aya_vision": _EQUAL,
    "diffusion_gemma": (Modality("pixel_values", _IMAGE, 1, one_run, ("image_position_ids",), whole_runs=True),),
    "gemma3": (Modality("pixel_values", _IMAGE, 1, equal, whole_runs=True),),
    "internvl": _EQUAL,
    "llava": _SIZED,
    "llava_next": (Modality("pixel_values", _IMAGE, 1, one_run, ("image_sizes",), _without_empty_tiles),),
    "mistral3": _SIZED,
    "qwen2_5_vl": _GRID,
    "qwen2_audio": (Modality("input_features", _AUDIO, 3, one_run, ("feature_attention_mask",)),),
    "qwen2_vl": _GRID,
    "qwen3_vl": _GRID,
    "qwen3_vl_moe": _GRID,
    "vipllava": _EQUAL,
}
"""By a config's `model_type`."""
