"""Models and ways to generate that have no use for a cache: they run as if there were no store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_attnstore import AttentionStore, AttentionStoreCache, UnsupportedModelError, attach, detach
from hf_attnstore.cache.model.argument import as_generate_takes
from hf_attnstore.lab.families.feeding import some_ids
from hf_attnstore.lab.families.others import build_other
from hf_attnstore.lab.families.tiny import build, families

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
CACHELESS = ("minimax", "openai-gpt", "xlm", "xlnet", "reformer")


def made(family: str) -> Any:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    return build(family)


def blocks(store: AttentionStore) -> int:
    """How many blocks the store has."""
    store.flush()
    return int(store.stats()["disk_blocks"])


def conversation(model: Any, twin: Any, ids: torch.Tensor, told: Callable[[], dict[str, Any]], **settings: Any) -> None:
    """Three turns, each on what the one before gave; all of them as with a model that nothing is attached to."""
    for _ in range(3):
        ours, theirs = model.generate(ids, **settings, **told()), twin.generate(ids, **settings)
        assert torch.equal(ours, theirs)
        ids = torch.cat([theirs, some_ids(9, 7)], dim=1)


@pytest.mark.parametrize("family", CACHELESS)
def test_attached_models_without_a_cache_generate_as_before(family: str, store: AttentionStore) -> None:
    model = made(family)
    attach(model, store)
    conversation(model, made(family), some_ids(30, 1), dict, **GREEDY)
    assert blocks(store) == 0
    detach(model)


@pytest.mark.parametrize("family", CACHELESS)
def test_a_cache_given_to_a_model_without_one_is_left_out(
    family: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = made(family)
    cache = AttentionStoreCache(model, "alice", store)
    conversation(model, made(family), some_ids(30, 1), lambda: as_generate_takes(model, cache), **GREEDY)
    assert cache.reused_tokens == 0
    reason = cache.stats.recomputed
    assert any(words in reason for words in ("takes no cache", "a cache of its own", "no cache continues"))
    assert cache.stats.prompt_tokens == cache.prefilled_tokens
    assert log.text.count(cache.stats.recomputed) == 1
    assert blocks(store) == 0


def test_a_subclass_that_passes_its_arguments_on_takes_a_cache(store: AttentionStore) -> None:
    class Wrapped(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = build("llama")
    model.__class__ = Wrapped
    cache = AttentionStoreCache(model, "alice", store)
    ids = some_ids(30, 1)
    first = model.generate(ids, **as_generate_takes(model, cache), **GREEDY)
    again = AttentionStoreCache(model, "alice", store)
    second = model.generate(first, **as_generate_takes(model, again), **GREEDY)
    assert torch.equal(second, build("llama").generate(first, **GREEDY))
    assert again.reused_tokens == 35


def test_codes_in_several_rows_run_with_a_cache_that_nothing_is_kept_of(store: AttentionStore) -> None:
    def musicgen() -> Any:
        model = made("musicgen_melody")
        model.generation_config = GenerationConfig(
            decoder_start_token_id=0, bos_token_id=1, pad_token_id=0, guidance_scale=1, num_return_sequences=1,
            num_beams=1, max_length=40, use_cache=True,
        )  # fmt: skip
        return model

    model, twin, ids = musicgen(), musicgen(), some_ids(40, 1).view(4, 10)
    theirs = twin.generate(ids, max_new_tokens=6, do_sample=False)
    for _ in range(2):
        cache = AttentionStoreCache(model, "alice", store)
        ours = model.generate(ids, max_new_tokens=6, do_sample=False, **as_generate_takes(model, cache))
        assert torch.equal(ours, theirs)
        assert cache.reused_tokens == 0
    attach(model, store)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), theirs)
    assert blocks(store) == 0


def test_forwards_without_ids_are_not_kept_and_the_prompt_is(store: AttentionStore) -> None:
    if "higgs_audio_v2" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no higgs_audio_v2")
    model, twin = build_other("higgs_audio_v2"), build_other("higgs_audio_v2")
    ids, settings = some_ids(30, 1), {"max_new_tokens": 6, "do_sample": False}
    attach(model, store)
    theirs = twin.generate(ids, **settings)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **settings), theirs)
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(model.generate(ids, **as_generate_takes(model, cache), **settings), theirs)
    assert cache.reused_tokens == 29
    assert cache.token_ids == ids[0].tolist()
    assert cache.get_seq_length() == 35  # the codes are there all the same
    assert "neither input_ids" in cache.stats.recomputed


class Refiner(transformers.PreTrainedModel):
    """A model with a `generate` of its own."""

    config_class = transformers.LlamaConfig
    _supports_sdpa = True

    def generate(self, ids: torch.Tensor) -> torch.Tensor:
        return ids + 1


def test_a_model_with_a_generate_of_another_kind_is_left_alone(store: AttentionStore) -> None:
    model, ids = Refiner(build("llama").config).eval(), some_ids(30, 1)
    attach(model, store)
    assert torch.equal(model.generate(ids), ids + 1)
    with pytest.raises(UnsupportedModelError, match=r"Refiner is not transformers' own"):
        AttentionStoreCache(model, "alice", store)
    assert blocks(store) == 0


# drafts from the states of the whole prompt


def drafter() -> Any:
    config = transformers.MuseGlimmerAssistantConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, block_size=4, mask_token_id=127, target_layer_ids=[0, 1], bos_token_id=None, eos_token_id=None,
        pad_token_id=None, sliding_window=12, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.MuseGlimmerAssistantModel(config).eval()


def dflash(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[], Any], dict[str, Any]]:
    if not hasattr(transformers, "MuseGlimmerAssistantModel"):
        pytest.skip("this transformers has no dflash")
    return lambda: made(family), {"speculation_type": "dflash", "assistant_model": drafter()}


def mtp(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[], Any], dict[str, Any]]:
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no multi-token prediction")

    def loaded(main: Any, **_: Any) -> Any:
        torch.manual_seed(5)
        return layers.MtpModel(main, 1).eval()

    monkeypatch.setattr(layers.MtpModel, "from_pretrained", loaded)
    return lambda: build(family, num_nextn_predict_layers=1), {"use_mtp": True}


@pytest.mark.parametrize(("family", "drafts"), [("llama", dflash), ("qwen3", dflash), ("deepseek_v3", mtp)])
@pytest.mark.parametrize("how", ["attach", "cache"])
def test_drafts_from_the_states_of_the_prompt_have_all_of_them(
    how: str, family: str, drafts: Any, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, settings = drafts(family, monkeypatch)
    model, caches = make(), []

    def cache() -> dict[str, Any]:
        caches.append(AttentionStoreCache(model, "alice", store))
        return as_generate_takes(model, caches[-1])

    if how == "attach":
        attach(model, store)
    conversation(model, make(), some_ids(30, 1), cache if how == "cache" else dict, **GREEDY, **settings)
    for made_one in caches:
        assert made_one.reused_tokens == 0
        assert made_one.stats.saved_bytes > 0
    if how == "cache":  # what was computed is there for others
        ids = some_ids(30, 1)
        plain = AttentionStoreCache(model, "bob", store)
        ours = model.generate(ids, **as_generate_takes(model, plain), **GREEDY)
        assert torch.equal(ours, make().generate(ids, **GREEDY))
        assert plain.reused_tokens == 29
