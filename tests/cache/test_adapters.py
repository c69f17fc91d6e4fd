"""Adapters (PEFT): KV belongs to what computes it, by content, whatever adapters are called and however they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, tokens
from support.turns import assert_reused, follow_up, layer_hooks, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, attach, detach
from hf_attnstore.cache.identity.fingerprint import Fingerprint

peft = pytest.importorskip("peft")

PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


def adapted(config: Any, model: Any = None, seed: int = 1, name: str = "default") -> Any:
    """A model with a seeded adapter whose weights are not zero."""
    with torch.random.fork_rng(devices=[]):
        model = make_model() if model is None else model
        torch.manual_seed(seed)
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
        with torch.no_grad():
            for where, parameter in model.named_parameters():
                if f".{name}" in where and not parameter.any():
                    parameter.normal_(std=0.3)
        return model.eval()


def lora(model: Any = None, seed: int = 1, name: str = "default", **settings: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False, **settings)
    return adapted(config, model, seed, name)


def print_of(model: Any) -> str:
    return Fingerprint(model.get_base_model() if isinstance(model, peft.PeftModel) else model).current()


def continues(first: Any, second: Any, store: AttentionStore, **settings: Any) -> int:
    """Tokens that `second` reuses of a session that `first` computed; its own were right."""
    sequence = turn(first, tokens(50), AttentionStoreCache(first, "alice", store)).sequences
    prompt = follow_up(sequence, 6, 2)
    cache = AttentionStoreCache(second, "alice", store)
    ours = turn(second, prompt, cache, **settings)
    assert torch.equal(ours.sequences, turn(second, prompt, None, **settings).sequences)
    assert_reused(cache, prompt, cache.reused_tokens)
    return cache.reused_tokens


def two_adapters(active: str = "default") -> Any:
    model = lora(lora(), 2, "other")
    model.set_adapter(active)
    return model


def both(order: list[str]) -> Any:
    model = lora(lora(), 2, "other")
    model.base_model.set_adapter(order)
    return model


def scaled(model: Any, scale: float) -> Any:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    return model


def done(model: Any, change: Callable[[Any], object]) -> Any:
    with torch.no_grad():
        change(model)
    return model


KINDS: dict[str, Callable[[int], Any]] = {
    "lora": lambda seed: lora(seed=seed),
    "dora": lambda seed: lora(seed=seed, use_dora=True),
    "rslora": lambda seed: lora(seed=seed, use_rslora=True),
    "lora with tokens": lambda seed: lora(seed=seed, trainable_token_indices=[4, 5, 6]),
    "lora with a whole module": lambda seed: lora(seed=seed, modules_to_save=["embed_tokens"]),
    "ia3": lambda seed: adapted(
        peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False), seed=seed
    ),
    "vera": lambda seed: adapted(peft.VeraConfig(r=4, target_modules=["q_proj"], projection_prng_key=seed), seed=seed),
    "fourier": lambda seed: adapted(
        peft.FourierFTConfig(n_frequency=10, target_modules=PROJECTIONS, random_loc_seed=seed), seed=1
    ),
    "adaption prompt": lambda seed: adapted(
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1), seed=seed
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_adapters_share_their_kv_and_others_do_not(kind: str, store: AttentionStore) -> None:
    make = KINDS[kind]
    model, twin, other, plain = make(1), make(1), make(2), make_model()
    assert print_of(model) == print_of(twin)
    assert len({print_of(model), print_of(other), print_of(plain)}) == 3
    assert continues(model, twin, store) == 55
    assert continues(model, other, store) == 0


SAME: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "an adapter under another name": (lora, lambda: lora(name="another")),
    "another adapter that is loaded and not used": (lora, two_adapters),
    "adapters loaded in another order": (
        two_adapters,
        lambda: done(lora(lora(seed=2, name="other"), 1, "default"), lambda m: m.set_adapter("default")),
    ),
    "an adapter that was unloaded": (make_model, lambda: lora().unload()),
    "an adapter that was deleted": (
        two_adapters,
        lambda: done(two_adapters(), lambda m: m.delete_adapter("other")),
    ),
    "a disabled adapter": (make_model, lambda: done(lora(), lambda m: m.base_model.disable_adapter_layers())),
    "merged, and merged for good": (
        lambda: done(lora(), lambda m: m.merge_adapter()),
        lambda: lora().merge_and_unload(),
    ),
    "scaled and back": (lora, lambda: scaled(scaled(lora(), 2.0), 1.0)),
}


@pytest.mark.parametrize("what", SAME)
def test_what_computes_the_same_shares_its_kv(what: str, store: AttentionStore) -> None:
    first, second = (make() for make in SAME[what])
    assert print_of(first) == print_of(second)
    assert continues(first, second, store) == 55


OTHER: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "other weights under the same name": (lora, lambda: lora(seed=2)),
    "the other of two is active": (two_adapters, lambda: two_adapters("other")),
    "both are active": (two_adapters, lambda: both(["default", "other"])),
    "both in another order": (lambda: both(["default", "other"]), lambda: both(["other", "default"])),
    "scaled": (lora, lambda: scaled(lora(), 2.0)),
    "merged": (lora, lambda: done(lora(), lambda m: m.merge_adapter())),
    "merged other": (
        lambda: done(lora(), lambda m: m.merge_adapter()),
        lambda: done(lora(seed=2), lambda m: m.merge_adapter()),
    ),
    "weighted together": (
        two_adapters,
        lambda: done(
            two_adapters(),
            lambda m: (m.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mix", "linear"), m.set_adapter("mix")),
        ),
    ),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_computes_something_else_shares_nothing(what: str, store: AttentionStore) -> None:
    first, second = (make() for make in OTHER[what])
    assert print_of(first) != print_of(second)
    assert continues(first, second, store) == 0


def test_one_cache_follows_its_model_through_every_change(store: AttentionStore) -> None:
    model = two_adapters()
    cache = AttentionStoreCache(model, "alice", store)
    steps: list[tuple[Callable[[], object], int]] = [
        (lambda: None, 0),
        (lambda: model.set_adapter("other"), 0),
        (lambda: model.set_adapter("default"), 49),
        (lambda: scaled(model, 0.5), 0),
        (lambda: scaled(model, 1.0), 49),
        (lambda: model.merge_adapter(["default"]), 0),
        (lambda: model.unmerge_adapter(), 0),  # the weights are not quite what they were
        (lambda: model.set_adapter("other"), 0),
    ]
    for number, (change, reused) in enumerate(steps):
        change()
        ours = turn(model, tokens(50), cache).sequences
        assert torch.equal(ours, turn(model, tokens(50), None).sequences), number
        assert cache.reused_tokens == reused, number


def test_disabling_for_a_while_finds_the_plain_models_kv(store: AttentionStore) -> None:
    plain, model = make_model(), lora()
    sequence = turn(plain, tokens(50), AttentionStoreCache(plain, "alice", store)).sequences
    prompt = follow_up(sequence, 6, 2)
    with model.disable_adapter():
        cache = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, prompt, cache).sequences, turn(plain, prompt, None).sequences)
        assert_reused(cache, prompt, 55)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(model, prompt, None).sequences)
    assert_reused(cache, prompt, 0)


def test_merged_adapters_that_are_disabled_are_not_trusted(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    """PEFT takes them out of the weights only in the middle of the next forward."""
    model, plain = lora(), make_model()
    model.merge_adapter()
    sequence = turn(model, tokens(50), AttentionStoreCache(model, "alice", store)).sequences
    prompt = follow_up(sequence, 6, 2)
    with model.disable_adapter():
        cache = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, prompt, cache).sequences, turn(plain, prompt, None).sequences)
        assert_reused(cache, prompt, 0)
    assert "merged adapters are disabled" in log.text


def test_both_the_wrapper_and_the_model_below_it_generate_and_can_be_attached(store: AttentionStore) -> None:
    model = lora()
    base, before = model.get_base_model(), layer_hooks(model)
    expected = turn(model, tokens(50), None).sequences
    for number, (given, called) in enumerate(((model, model), (model, base), (base, model), (base, base))):
        cache = AttentionStoreCache(given, "alice", store)
        assert torch.equal(turn(called, tokens(50), cache).sequences, expected)
        assert cache.reused_tokens == (49 if number else 0)
    for given in (model, base):
        attach(given, store)
        for called in (model, base):
            turns = store.stats()["turns_with_reuse"]
            assert torch.equal(turn(called, tokens(50), None).sequences, expected)
            assert store.stats()["turns_with_reuse"] == turns + 1
        detach(given)
        assert layer_hooks(model) == before
    assert torch.equal(turn(model, tokens(50), None).sequences, expected)


def test_an_adapter_loaded_from_a_folder_is_the_one_that_was_saved(store: AttentionStore, tmp_path: Path) -> None:
    model = lora()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()
    assert print_of(model) == print_of(loaded)
    assert continues(model, loaded, store) == 55
    by_transformers = make_model()
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    assert print_of(model) == print_of(by_transformers)
    assert continues(model, by_transformers.eval(), store) == 61  # the loaded one has seen the same prompt


LEARNED: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_learned_tokens_before_the_prompt_are_never_mixed_up_with_what_is_stored(
    kind: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    base, other = make_model(), adapted(LEARNED[kind](), make_model())
    sequence = turn(base, tokens(50), AttentionStoreCache(base, "alice", store)).sequences
    model = adapted(LEARNED[kind](), base)
    prompt = follow_up(sequence, 6, 2)
    expected = turn(other, prompt, None)
    assert not torch.equal(expected.logits[0], turn(make_model(), prompt, None).logits[0])
    blocks = store.stats()["saved_blocks"]
    for given in (model, base):
        cache = AttentionStoreCache(given, "alice", store)
        for _ in range(2):
            ours = turn(model, prompt, cache)
            assert torch.equal(ours.sequences, expected.sequences)
            assert torch.equal(ours.logits[0], expected.logits[0])
            assert cache.reused_tokens == 0
            assert "learned tokens" in cache.stats.recomputed
    assert "learned tokens" in log.text
    cache = AttentionStoreCache(model, "alice", store)
    assert cache.match(prompt) == 0
    cache.save()
    attach(model, store)
    assert torch.equal(turn(model, prompt, None).sequences, expected.sequences)
    store.flush()
    assert store.stats()["saved_blocks"] == blocks
    assert store.tokens("alice") == sequence[0, :-1].tolist()
    # what is below still has its own
    cache = AttentionStoreCache(base, "alice", store)
    assert torch.equal(turn(base, prompt, cache).sequences, turn(make_model(), prompt, None).sequences)
    assert_reused(cache, prompt, 55)


def test_an_adapter_that_looks_ahead_is_not_kept(store: AttentionStore) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=PROJECTIONS, alora_invocation_tokens=[7, 8], init_lora_weights=False
    )
    model = adapted(config)
    prompt = tokens(50)
    prompt[0, 30:32] = torch.tensor([7, 8])
    for _ in range(2):
        cache = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, prompt, cache).sequences, turn(model, prompt, None).sequences)
        assert_reused(cache, prompt, 0)
        assert "activated LoRA" in cache.stats.recomputed
