"""Turns that continue from the store give the very logits of a DynamicCache that was kept in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import fresh
from support.tiny_models import BLOCK, FAMILIES, SLIDING_FAMILIES, make_model, tokens
from support.turns import CHUNKS_CONTINUE, Reference, assert_reused, assert_same, expected_load, follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache

DTYPES = (torch.float32, torch.bfloat16)
PROMPTS = (45, 9, 30, 1)
"""New tokens of each turn: longer and shorter than a block, longer than the window, and a single one."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tier", ["memory", "disk", "disk at once"])
def test_turns_from_a_tier_have_the_logits_of_a_kept_dynamic_cache(
    family: str, dtype: torch.dtype, tier: str, store: AttentionStore, request: pytest.FixtureRequest
) -> None:
    if tier == "disk at once":
        request.getfixturevalue("at_once")
        tier = "disk"
    model, reference = make_model(family, dtype), Reference(make_model(family, dtype))
    sequence = tokens(0)
    known = 0
    for number, count in enumerate(PROMPTS):
        prompt = follow_up(sequence, count, seed=number)
        if tier == "disk":
            store.drop_memory()
            assert store.stats()["memory_blocks"] == 0
        cache = AttentionStoreCache(model, "alice", store)
        ours, theirs = turn(model, prompt, cache), reference.turn(prompt)
        assert_same(ours, theirs)
        assert_reused(cache, prompt, known)
        assert cache.stats.loaded_bytes == expected_load(cache, reference.cache, known)
        assert set(cache.stats.blocks_from) == ({tier} if known else set())
        sequence = ours.sequences
        known = sequence.shape[1] - 1
        assert store.tokens("alice") == sequence[0, :known].tolist()


@pytest.mark.parametrize("family", SLIDING_FAMILIES)
def test_sliding_layers_load_less_than_the_history(family: str, store: AttentionStore) -> None:
    model, reference = make_model(family), Reference(make_model(family))
    first = reference.turn(tokens(120))
    turn(model, tokens(120), AttentionStoreCache(model, "alice", store))
    prompt = follow_up(first.sequences, 5, seed=2)
    cache = AttentionStoreCache(model, "alice", store)
    assert_same(turn(model, prompt, cache), reference.turn(prompt))
    everything = 125 * sum(t.nbytes // t.shape[-2] for layer in cache.layers for t in (layer.keys, layer.values))
    assert 0 < cache.stats.loaded_bytes < (0.5 if family == "mistral" else 0.85) * everything


@pytest.mark.parametrize("family", SLIDING_FAMILIES)
def test_blocks_longer_than_the_window_are_saved_whole(family: str, tmp_path: Path) -> None:
    model, reference = make_model(family), Reference(make_model(family))
    with AttentionStore(tmp_path / "store", block_size=80) as store:
        sequence = tokens(0)
        for number, count in enumerate((50, 60, 30, 40)):
            store.drop_memory()
            prompt = follow_up(sequence, count, seed=number)
            cache = AttentionStoreCache(model, "alice", store)
            ours = turn(model, prompt, cache)
            known = max(sequence.shape[1] - 1, 0)
            assert_same(ours, reference.turn(prompt))
            assert_reused(cache, prompt, known)
            assert cache.stats.loaded_bytes == expected_load(cache, reference.cache, known, block=80)
            sequence = ours.sequences
            assert store.tokens("alice") == sequence[0, :-1].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_cache_object_serves_all_turns_and_loads_nothing(family: str, store: AttentionStore) -> None:
    model, reference = make_model(family), Reference(make_model(family))
    cache = AttentionStoreCache(model, "alice", store)
    sequence = tokens(0)
    for number, count in enumerate(PROMPTS):
        prompt = follow_up(sequence, count, seed=number)
        ours = turn(model, prompt, cache)
        assert_same(ours, reference.turn(prompt))
        assert_reused(cache, prompt, max(sequence.shape[1] - 1, 0))
        assert cache.stats.loaded_bytes == 0
        sequence = ours.sequences


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("settings", [{"prefill_chunk_size": 7}, {"attn_implementation": "eager"}], ids=str)
def test_chunked_prefill_and_eager_attention_are_bit_equal_too(
    family: str, settings: dict[str, object], store: AttentionStore
) -> None:
    if not CHUNKS_CONTINUE and "prefill_chunk_size" in settings:
        pytest.skip("a DynamicCache itself is not continued in chunks by this transformers")
    settings = dict(settings)
    models = [make_model(family), make_model(family)]
    implementation = settings.pop("attn_implementation", None)
    if implementation is not None:
        for model in models:
            model.set_attn_implementation(implementation)
    reference = Reference(models[1])
    sequence = tokens(0)
    for number, count in enumerate((40, 25, 12)):
        prompt = follow_up(sequence, count, seed=number)
        cache = AttentionStoreCache(models[0], "alice", store)
        ours = turn(models[0], prompt, cache, **settings)
        assert_same(ours, reference.turn(prompt, **settings))
        assert_reused(cache, prompt, max(sequence.shape[1] - 1, 0))
        sequence = ours.sequences


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma2", "gpt2"])
def test_manual_forwards_have_the_logits_of_a_kept_dynamic_cache(family: str, store: AttentionStore) -> None:
    model, reference = make_model(family), Reference(make_model(family))
    ids = tokens(90)
    chunks = [(0, 33), (33, 34), (34, 64), (64, 65), (65, 90)]
    for start, stop in chunks:
        cache = AttentionStoreCache(model, "alice", store)
        with torch.no_grad():
            assert cache.match(ids[:, :stop]) == start
            ours = model(input_ids=ids[:, start:stop], past_key_values=cache).logits
            theirs = reference.model(input_ids=ids[:, start:stop], past_key_values=reference.cache).logits
        assert torch.equal(ours, theirs)
        assert cache.stats.loaded_bytes == expected_load(cache, reference.cache, start)
        assert cache.prefilled_tokens == stop - start
        cache.save()
        store.drop_memory()


def run_turns(root: Path, number: int, prompts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One turn of every family and dtype from the store in `root`: logits, sequences and counts."""
    results = {}
    for name, prompt in prompts.items():
        family, _, kind = name.partition("/")
        model = make_model(family, torch.float32 if kind == "float32" else torch.bfloat16)
        with AttentionStore(root / family / kind, block_size=BLOCK) as store:
            cache = AttentionStoreCache(model, "älice/../1", store)
            output = turn(model, prompt, cache)
            results[f"{name}/sequences"] = output.sequences
            results[f"{name}/logits"] = torch.stack(output.logits)
            results[f"{name}/counts"] = torch.tensor([cache.reused_tokens, cache.prefilled_tokens])
            results[f"{name}/bytes"] = torch.tensor([cache.stats.loaded_bytes])
    return results


def test_turns_in_new_processes_have_the_logits_of_a_kept_dynamic_cache(tmp_path: Path) -> None:
    names = [f"{family}/{kind}" for family in FAMILIES for kind in ("float32", "bfloat16")]
    references = {name: Reference(make_model(name.split("/")[0], getattr(torch, name.split("/")[1]))) for name in names}
    sequences = {name: tokens(0) for name in names}
    for number, count in enumerate((50, 11)):
        prompts = {name: follow_up(sequences[name], count, seed=number) for name in names}
        save_file(prompts, tmp_path / "prompts.safetensors")
        fresh.run([sys.executable, __file__, tmp_path, number], check=True)
        found = load_file(tmp_path / f"turn{number}.safetensors")
        for name in names:
            theirs = references[name].turn(prompts[name])
            known = max(sequences[name].shape[1] - 1, 0)
            assert torch.equal(found[f"{name}/sequences"], theirs.sequences), name
            assert torch.equal(found[f"{name}/logits"], torch.stack(theirs.logits)), name
            assert found[f"{name}/counts"].tolist() == [known, prompts[name].shape[1] - known], name
            assert bool(found[f"{name}/bytes"].item()) == bool(known), name
            sequences[name] = theirs.sequences


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, turn_number = Path(sys.argv[1]), int(sys.argv[2])
    given = load_file(folder / "prompts.safetensors")
    save_file(run_turns(folder, turn_number, given), folder / f"turn{turn_number}.safetensors")
