"""What vision towers make of pictures, kept by content: behind another text the tower does not run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.picture_models import FAMILIES, make_picture_model, prompt, text

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, UnsupportedModelError, attach, detach
from hf_attnstore.cache.model.argument import as_generate_takes
from hf_attnstore.lab.families.tiny import build

GREEDY: dict[str, Any] = {
    "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0
}  # fmt: skip
CHOSEN = ("llava", "qwen2-vl", "qwen3-vl", "gemma3")


def seeing(family: str) -> tuple[Any, list[int]]:
    """A model, and a list that grows by one with every run of its tower."""
    model, runs = make_picture_model(family), []
    tower = getattr(model.model, "vision_tower", None) or model.model.visual
    tower.register_forward_pre_hook(lambda module, args: runs.append(1))
    return model, runs


def same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))


@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "with a cache"])
def test_a_picture_behind_another_text_does_not_run_the_tower(family: str, cached: bool, tmp_path: Path) -> None:
    model, runs = seeing(family)
    plain = make_picture_model(family)
    picture, other = FAMILIES[family].picture(1), FAMILIES[family].picture(2)
    with AttentionStore(tmp_path, block_size=16) as store:
        kept = attach(model, store, keep="image_features")

        def ask(*parts: Any) -> int:
            """How often the tower ran."""
            inputs, before = prompt(family, parts), len(runs)
            given = as_generate_takes(model, AttentionStoreCache(model, None, store)) if cached else {}
            same(model.generate(**inputs, **given, **GREEDY), plain.generate(**inputs, **GREEDY))
            return len(runs) - before

        assert ask(text(9, 1), picture, text(7, 2)) == 1
        assert ask(text(11, 3), picture, text(7, 2)) == 0
        assert ask(text(11, 3), other, text(7, 2)) == 1
        assert (kept.rows, kept.reused_rows) == (3, 1)
    with AttentionStore(tmp_path, block_size=16) as store:  # and from disk, in another order
        attach(model, store, keep="image_features")
        assert ask(text(5, 4), other, text(7, 2)) == 0
        assert ask(text(5, 4), picture, text(8, 2)) == 0
    detach(model)


def test_two_pictures_of_one_prompt_are_kept_together(store: AttentionStore) -> None:
    model, runs = seeing("llava")
    plain = make_picture_model("llava")
    one, two = (FAMILIES["llava"].picture(seed) for seed in (1, 2))
    attach(model, store, keep="image_features")
    for begin, computed in ((3, 1), (4, 0)):
        inputs, before = prompt("llava", (text(9, begin), one, text(3, 2), two, text(5, 2))), len(runs)
        same(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))
        assert len(runs) - before == computed


def test_what_is_found_of_a_picture_may_be_written_to_and_the_same_numbers_in_another_shape_are_another(
    store: AttentionStore,
) -> None:
    model, runs = seeing("llava")
    attach(model, store, keep="image_features")
    pixels = prompt("llava", (text(3, 1), FAMILIES["llava"].picture(1)))["pixel_values"]
    with torch.no_grad():
        first = model.model.get_image_features(pixel_values=pixels).pooler_output[0].clone()
        for _ in range(2):
            found = model.model.get_image_features(pixel_values=pixels).pooler_output[0]
            assert torch.equal(found, first)
            found.zero_()
        assert len(runs) == 1
        with contextlib.suppress(ValueError):  # this one takes one size only: what counts is that it was asked
            model.model.get_image_features(pixel_values=pixels.reshape(1, 3, -1, 2 * pixels.shape[-1]))
        assert len(runs) == 2


def test_other_weights_and_training_run_the_tower(store: AttentionStore) -> None:
    model, runs = seeing("llava")
    kept = attach(model, store, keep="image_features")
    inputs = prompt("llava", (text(9, 1), FAMILIES["llava"].picture(1), text(7, 2)))
    model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).mul_(1.5)
    model.generate(**inputs, **GREEDY)
    model.train()
    with torch.no_grad():
        model(**inputs)
    assert (len(runs), kept.rows, kept.reused_rows) == (3, 2, 0)
    kept.detach()
    assert "get_image_features" not in vars(model.model)
    with pytest.raises(UnsupportedModelError, match="no embeddings of pictures"):
        attach(build("llama"), store, keep="image_features")
    with pytest.raises(CacheUseError, match="image_features"):
        attach(model, store, keep="pictures")  # type: ignore[call-overload]
