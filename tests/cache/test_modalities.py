"""What identifies pictures, without a model; and which inputs are not identified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.picture_models import FAMILIES, PICTURE, make_picture_model, prompt, text
from test_pictures import GREEDY, assert_same

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.inputs.content import STAND_IN, Content, Embeddings, NotIdentifiedError, read_content, stand_ins

LLAVA = make_picture_model("llava")
QWEN = make_picture_model("qwen2-vl")


def content_of(family: str, *seeds: int, **changes: Any) -> Content:
    parts: list[Any] = [text(10, 1)]
    for number, seed in enumerate(seeds):
        parts += [FAMILIES[family].picture(seed), text(5 + number, 2)]
    inputs = {**prompt(family, parts), **changes}
    model = {"llava": LLAVA, "qwen2-vl": QWEN}[family]
    found = read_content(model.config, inputs["input_ids"], inputs)
    assert found is not None
    return found


def test_stand_ins_are_no_ids_and_fit_into_32_bits() -> None:
    drawn = stand_ins(b"x", 1000)
    assert drawn.min() >= STAND_IN
    assert drawn.max() < 2**32
    assert len(set(drawn.tolist())) == 1000
    assert np.array_equal(stand_ins(b"x", 10), drawn[:10])
    assert not np.array_equal(stand_ins(b"y", 10), drawn[:10])


def test_ids_outside_of_pictures_stay_and_each_picture_has_its_own() -> None:
    both, other = content_of("llava", 1, 2), content_of("llava", 1, 3)
    raw = both.raw
    assert np.array_equal(both.ids[raw != PICTURE], raw[raw != PICTURE])
    assert (both.ids[raw == PICTURE] >= STAND_IN).all()
    first, second = slice(10, 26), slice(31, 47)
    assert np.array_equal(both.ids[first], other.ids[first])
    assert not (both.ids[second] == other.ids[second]).any()
    assert not (both.ids[first] == both.ids[second]).any()


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "one value": lambda i: {"pixel_values": i["pixel_values"] + torch.eye(*i["pixel_values"].shape[-2:]) * 1e-6},
    "another dtype": lambda i: {"pixel_values": i["pixel_values"].float()},
    "another shape": lambda i: {"image_grid_thw": i["image_grid_thw"][:, [0, 2, 1]]},
    "places that are not marked": lambda i: {"mm_token_type_ids": None},
    "a setting of the model's": lambda i: {"vision_feature_layer": 0},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_goes_into_a_picture_is_in_its_digest(change: str) -> None:
    parts = [text(10, 1), FAMILIES["qwen2-vl"].picture(1), text(5, 2)]
    inputs = prompt("qwen2-vl", parts)
    changed = {**inputs, **CHANGES[change](inputs)}
    one, other = (read_content(QWEN.config, i["input_ids"], i) for i in (inputs, changed))
    assert one is not None
    assert other is not None
    assert not (one.ids[10:16] == other.ids[10:16]).any()
    assert np.array_equal(one.ids[:10], other.ids[:10])


def test_how_tokens_are_chosen_is_not() -> None:
    ways = (content_of("llava", 1), content_of("llava", 1, max_new_tokens=7, temperature=0.5, use_cache=True))
    assert np.array_equal(ways[0].ids, ways[1].ids)


def test_nothing_ends_within_a_picture() -> None:
    content = content_of("llava", 1, 2)  # at [10, 26) and [31, 47)
    assert [content.floor(n) for n in (0, 9, 10, 11, 25, 26, 30, 31, 32, 46, 47, 50)] == [
        *(0, 9, 10, 10, 10, 26, 30, 31, 31, 31, 47, 50)
    ]
    content.all_or_none = True  # type: ignore[attr-defined]
    assert [content.floor(n) for n in (9, 10, 26, 31, 46, 47, 50)] == [9, 10, 10, 10, 10, 47, 50]


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_inputs_are_cut_at_pictures(family: str) -> None:
    content = content_of(family, 1, 2)
    (first, middle), (last, end) = sorted(content.extents())
    inputs = prompt(family, [FAMILIES[family].picture(2)])
    for name, value in content.inputs(middle, end).items():
        assert value is None if name not in inputs else torch.equal(value, inputs[name])
    assert all(value is None for value in content.inputs(end, end + 3).values())
    assert content.inputs(0, end)["pixel_values"].shape[0] > inputs["pixel_values"].shape[0]
    for start, stop in ((0, first + 1), (last + 1, end), (first, end - 1)):
        with pytest.raises(NotIdentifiedError, match="part"):
            content.inputs(start, stop)


def test_pictures_that_can_not_be_told_apart_are_one() -> None:
    """Three pictures for two runs of different length: which belongs to which is not known."""
    ids = torch.tensor([[*text(5, 1), *[PICTURE] * 10, *text(5, 2), *[PICTURE] * 6, *text(4, 3)]])
    pixels = torch.rand(3, 3, 16, 16)
    one = read_content(LLAVA.config, ids, {"pixel_values": pixels})
    assert one is not None
    assert list(one.extents()) == [(5, 26)]
    pixels = pixels.clone()
    pixels[2, 0, 0, 0] += 1
    other = read_content(LLAVA.config, ids, {"pixel_values": pixels})
    assert other is not None
    assert not (one.ids[5:15] == other.ids[5:15]).any()


def test_rows_of_embeddings_are_identified_by_all_before_them() -> None:
    rows = torch.rand(1, 22, 8)
    one = Embeddings(rows, None)
    assert [one.floor(n) for n in (0, 3, 4, 7, 8, 15, 16, 17, 21, 22, 23)] == [0, 0, 4, 4, 8, 12, 16, 16, 16, 22, 23]
    changed = rows.clone()
    changed[0, 6, 7] += 1e-6
    other = Embeddings(changed, None)
    assert np.array_equal(one.ids[:4], other.ids[:4])
    assert not (one.ids[4:] == other.ids[4:]).any()


def small_pictures(inputs: dict[str, Any]) -> dict[str, Any]:
    """Several for a few places: fewer than four for each."""
    return {"pixel_values": inputs["pixel_values"].repeat(8, 1, 1, 1)}


def own_types(inputs: dict[str, Any]) -> dict[str, Any]:
    types = torch.zeros_like(inputs["input_ids"])
    types[0, 3] = 1
    return {"token_type_ids": types}


MISFITS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "few places each": small_pictures,
    "no tensor": lambda i: {"pixel_values": list(i["pixel_values"])},
    "token types of one's own": own_types,
    "no places": lambda i: {"input_ids": torch.tensor([text(30, 1)])},
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_not_identified(what: str) -> None:
    inputs = prompt("llava", [text(10, 1), FAMILIES["llava"].picture(1), text(5, 2)])
    inputs |= MISFITS[what](inputs)
    with pytest.raises(NotIdentifiedError):
        read_content(LLAVA.config, inputs["input_ids"], inputs)


UNIDENTIFIED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "token types of one's own": lambda i: {"token_type_ids": own_types(i)["token_type_ids"]},
    "places that mark nothing but a part": lambda i: {
        "token_type_ids": torch.where(torch.arange(i["input_ids"].shape[1]) < 23, i["token_type_ids"], 0)
    },
}


@pytest.mark.parametrize("what", UNIDENTIFIED)
def test_what_is_not_identified_is_computed_and_not_kept(
    what: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model, other = make_picture_model("gemma3"), make_picture_model("gemma3")
    inputs = prompt("gemma3", [text(21, 1), FAMILIES["gemma3"].picture(1), text(9, 2)])
    cache = AttentionStoreCache(model, "alice", store)
    model.generate(**inputs, past_key_values=cache, **GREEDY)
    blocks = store.stats()["saved_blocks"]
    assert blocks
    inputs |= UNIDENTIFIED[what](inputs)
    cache = AttentionStoreCache(model, "alice", store)
    ours = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert_same(ours, other.generate(**inputs, **GREEDY))
    assert cache.reused_tokens == 0
    assert cache.stats.recomputed
    assert cache.stats.recomputed in log.text
    assert store.stats()["saved_blocks"] == blocks


def test_prefill_in_chunks_does_not_keep_pictures(store: AttentionStore, log: pytest.LogCaptureFixture) -> None:
    """A chunk may end within a picture, whose tokens see each other in some models."""
    model, other = make_picture_model("gemma3"), make_picture_model("gemma3")
    inputs = prompt("gemma3", [text(21, 1), FAMILIES["gemma3"].picture(1), text(9, 2)])
    cache = AttentionStoreCache(model, "alice", store)
    outputs = []
    for each, past in ((model, {"past_key_values": cache}), (other, {})):
        try:
            outputs.append(each.generate(**inputs, **past, prefill_chunk_size=23, **GREEDY))
        except ValueError as error:  # a transformers that does not do it
            outputs.append(str(error))
    if isinstance(outputs[1], str):
        assert outputs[0] == outputs[1]
    else:
        assert_same(*outputs)
    assert "prefill_chunk_size" in log.text
    assert store.stats()["saved_blocks"] == 0


def test_pictures_for_a_model_type_that_is_not_known(store: AttentionStore, log: pytest.LogCaptureFixture) -> None:
    model, other = make_picture_model("llava"), make_picture_model("llava")
    for each in (model, other):
        each.config.model_type = "another"
    inputs = prompt("llava", [text(21, 1), FAMILIES["llava"].picture(1), text(9, 2)])
    for _ in range(2):
        cache = AttentionStoreCache(model, "alice", store)
        ours = model.generate(**inputs, past_key_values=cache, **GREEDY)
        assert_same(ours, other.generate(**inputs, **GREEDY))
        assert cache.reused_tokens == 0
    assert "pixel_values are not identified" in log.text
    assert store.stats()["saved_blocks"] == 0
