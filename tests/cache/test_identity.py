"""KV is reused only for the model that computed it: weights, adapters, dtype, settings, and changes in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import make_llama, make_model, tokens
from support.turns import assert_reused, count_values_read, follow_up, turn
from torch import nn

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError
from hf_attnstore.cache.identity import samples
from hf_attnstore.cache.identity.fingerprint import Fingerprint
from hf_attnstore.cache.identity.watch import Watch

peft = pytest.importorskip("peft")

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def lora(model: Any, seed: int, name: str = "default") -> Any:
    """A PEFT model with a LoRA adapter whose weights are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
            return model.eval()
        return peft.get_peft_model(model, config, adapter_name=name).eval()


def continues(first: Any, second: Any, store: AttentionStore, reused: int) -> AttentionStoreCache:
    """A turn of one session by `first` and the next by `second`, whose cache is returned: its tokens were right."""
    sequence = turn(first, tokens(50), AttentionStoreCache(first, "alice", store)).sequences
    prompt = follow_up(sequence, 6, 2)
    cache = AttentionStoreCache(second, "alice", store)
    ours = turn(second, prompt, cache)
    assert torch.equal(ours.sequences, turn(second, prompt, None).sequences)
    assert_reused(cache, prompt, reused)
    return cache


OTHER_MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "weights": (lambda: make_model(seed=0), lambda: make_model(seed=1)),
    "dtype": (lambda: make_model(), lambda: make_model(dtype=torch.bfloat16)),
    "rope theta": (
        lambda: make_llama(rope_parameters=ROPE),
        lambda: make_llama(rope_parameters={**ROPE, "rope_theta": 500.0}),
    ),
    "rope type": (
        lambda: make_llama(rope_parameters=ROPE),
        lambda: make_llama(rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0}),
    ),
    "window": (
        lambda: make_model("mistral"),
        lambda: _with(make_model("mistral"), lambda model: setattr(model.config, "sliding_window", 12)),
    ),
    "adapter or none": (lambda: make_model(), lambda: lora(make_model(), 1)),
    "adapter of the same name": (lambda: lora(make_model(), 1), lambda: lora(make_model(), 2)),
    "adapter disabled": (lambda: lora(make_model(), 1), lambda: _disabled(lora(make_model(), 1))),
    "adapter merged": (
        lambda: make_model(),
        lambda: _with(lora(make_model(), 1), lambda m: m.merge_adapter()),
    ),
    "adapter merged for good": (lambda: make_model(), lambda: lora(make_model(), 1).merge_and_unload()),
    "other active adapter": (
        lambda: lora(lora(make_model(), 1), 2, "other"),
        lambda: _with(lora(lora(make_model(), 1), 2, "other"), lambda m: m.set_adapter("other")),
    ),
    "one key bias": (
        lambda: make_model("qwen2"),
        lambda: _with(make_model("qwen2"), lambda m: m.model.layers[1].self_attn.k_proj.bias.data[3].add_(1.0)),
    ),
}


def _with(model: Any, change: Callable[[Any], object]) -> Any:
    with torch.no_grad():
        change(model)
    return model


def _disabled(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_another_model_reuses_nothing_and_the_log_says_why(
    what: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    first, second = (make() for make in OTHER_MODELS[what])
    cache = continues(first, second, store, reused=0)
    assert "other weights or settings" in log.text
    assert "other weights or settings" in cache.stats.recomputed


@pytest.mark.parametrize(
    "make",
    [
        make_model,
        lambda: make_model(dtype=torch.bfloat16),
        lambda: lora(make_model(), 1),
        lambda: lora(make_model(), 1).merge_and_unload(),
        lambda: _disabled(lora(make_model(), 1)),
    ],
    ids=["plain", "bfloat16", "adapter", "merged", "disabled"],
)
def test_an_equal_model_reuses_everything(
    make: Callable[[], Any], store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    continues(make(), make(), store, reused=55)
    assert not log.records


def test_the_old_models_kv_is_there_when_it_comes_back(store: AttentionStore) -> None:
    first, second = make_model(seed=0), make_model(seed=1)
    continues(first, second, store, reused=0)
    sequence = turn(first, tokens(50), None).sequences
    cache = AttentionStoreCache(first, "alice", store)
    turn(first, follow_up(sequence, 3, 9), cache)
    assert cache.reused_tokens == 55


def _train_a_step(model: Any) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.enable_grad():
        model(input_ids=tokens(20), labels=tokens(20)).loss.backward()
    optimizer.step()
    model.zero_grad()
    model.eval()


def _train_the_row_of_one_token(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens(50)[0, 20]] += 1.0


IN_PLACE: dict[str, Callable[[Any], object]] = {
    "training step": _train_a_step,
    "load_state_dict": lambda model: model.load_state_dict(make_model(seed=5).state_dict()),
    "param.data.add_": lambda model: [p.data.add_(0.01) for p in model.parameters()],
    "param.data of one matrix": lambda model: model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1.0),
    "param.data replaced": lambda model: [setattr(p, "data", p.data * 1.5) for p in model.parameters()],
    "parameter replaced": lambda model: setattr(
        model.model.layers[1].self_attn.v_proj,
        "weight",
        nn.Parameter(model.model.layers[1].self_attn.v_proj.weight.detach() * 2),
    ),
    "one row of the embedding": _train_the_row_of_one_token,
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "rope buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
}


@pytest.mark.parametrize("keep", [True, False], ids=["same object", "new object"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_weights_that_change_in_place_between_turns_are_noticed(
    change: str, keep: bool, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    sequence = turn(model, tokens(50), cache).sequences
    IN_PLACE[change](model)
    prompt = follow_up(sequence, 6, 2)
    if not keep:
        cache = AttentionStoreCache(model, "alice", store)
    ours = turn(model, prompt, cache)
    assert_reused(cache, prompt, 0)
    assert torch.equal(ours.sequences, turn(model, prompt, None).sequences)
    assert "weights or settings" in log.text
    again = follow_up(ours.sequences, 6, 3)
    ours = turn(model, again, cache)
    assert_reused(cache, again, ours.sequences.shape[1] - 6 - 6 - 1)
    assert torch.equal(ours.sequences, turn(model, again, None).sequences)


@pytest.mark.parametrize("keep", [True, False], ids=["same object", "new object"])
def test_an_adapter_that_is_merged_between_turns_is_noticed(keep: bool, store: AttentionStore) -> None:
    model = lora(make_model(), 1)
    cache = AttentionStoreCache(model, "alice", store)
    sequence = turn(model, tokens(50), cache).sequences
    merged = model.merge_and_unload()
    prompt = follow_up(sequence, 6, 2)
    if not keep:
        cache = AttentionStoreCache(merged, "alice", store)
    ours = turn(merged, prompt, cache)
    assert_reused(cache, prompt, 0)
    assert torch.equal(ours.sequences, turn(merged, prompt, None).sequences)


def test_adapters_switched_between_turns_each_find_their_own(store: AttentionStore) -> None:
    model = lora(lora(make_model(), 1), 2, "other")
    sequences = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        cache = AttentionStoreCache(model, "alice", store)
        sequences[name] = turn(model, tokens(50), cache).sequences
        assert cache.reused_tokens == 0
    assert not torch.equal(sequences["default"], sequences["other"])
    for name in ("default", "other"):
        model.set_adapter(name)
        cache = AttentionStoreCache(model, "alice", store)
        prompt = follow_up(sequences[name], 5, 2)
        assert torch.equal(turn(model, prompt, cache).sequences, turn(model, prompt, None).sequences)
        assert_reused(cache, prompt, 55)
    with model.disable_adapter():
        cache = AttentionStoreCache(model, "alice", store)
        prompt = follow_up(sequences["other"], 5, 2)
        assert torch.equal(turn(model, prompt, cache).sequences, turn(model, prompt, None).sequences)
        assert cache.reused_tokens == 0


def test_adapters_named_in_the_call_are_told_apart(store: AttentionStore) -> None:
    model = lora(lora(make_model(), 1), 2, "other")
    outputs = {}
    for name in ("default", "other", "__base__"):
        cache = AttentionStoreCache(model, "alice", store)
        outputs[name] = turn(model, tokens(50), cache, adapter_names=[name]).sequences
        assert cache.reused_tokens == 0, name
        assert torch.equal(outputs[name], turn(model, tokens(50), None, adapter_names=[name]).sequences)
    assert not torch.equal(outputs["default"], outputs["other"])


def test_a_manual_loop_is_told_that_the_weights_changed_under_what_it_holds(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    with torch.no_grad():
        model(input_ids=tokens(40), past_key_values=cache)
        cache.save()
        IN_PLACE["load_state_dict"](model)
        with pytest.raises(CacheUseError, match="match"):
            model(input_ids=tokens(5, 2), past_key_values=cache)
        whole = torch.cat([tokens(40), tokens(5, 2)], dim=1)
        assert cache.match(whole) == 0
        ours = model(input_ids=whole, past_key_values=cache).logits
        assert torch.equal(ours, model(input_ids=whole).logits)


def test_autocast_is_part_of_the_identity(store: AttentionStore) -> None:
    model = make_model()
    sequence = turn(model, tokens(50), AttentionStoreCache(model, "alice", store)).sequences
    cache = AttentionStoreCache(model, "alice", store)
    prompt = follow_up(sequence, 6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turn(model, prompt, cache)
    assert cache.reused_tokens == 0


def test_names_and_token_settings_are_not_part_of_the_identity() -> None:
    model, other = make_model(), make_model()
    other.config._name_or_path = "elsewhere"
    other.config.eos_token_id = 5
    other.config.use_cache = False
    assert Fingerprint(model).current() == Fingerprint(other).current()


def test_strides_and_storage_of_weights_do_not_matter() -> None:
    model, other = make_model(), make_model()
    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
    assert Fingerprint(model).current() == Fingerprint(other).current()


def test_the_fingerprint_reads_a_bounded_sample_of_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Big(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.config = make_llama().config
            self.weights = nn.ParameterList([nn.Parameter(torch.ones(size), requires_grad=False) for _ in range(5)])

    read: list[int] = []
    count_values_read(monkeypatch, read)
    counts = []
    for size in (10_000, 4_000_000):
        read.clear()
        model = Big(size)
        fingerprint = Fingerprint(model)
        fingerprint.current()
        first = sum(read)
        read.clear()
        fingerprint.current()
        counts.append((first, sum(read)))
    assert counts[0] == counts[1]
    first, again = counts[1]
    assert first <= 5 * 1100
    assert again <= 5 * 8


def test_an_unchanged_model_keeps_its_fingerprint_over_turns_and_training_mode() -> None:
    model = make_model()
    fingerprint = Fingerprint(model)
    before = fingerprint.current()
    model.train()
    model.eval()
    turn(model, tokens(20), None)
    assert fingerprint.current() == before
    assert Fingerprint(model).current() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
@pytest.mark.parametrize("values", [1, 3, 4, 5, 1000, 1001])
def test_peeking_reads_the_few_values_that_count(dtype: torch.dtype, values: int) -> None:
    whole = torch.arange(3 * values).to(dtype)
    part = whole[values : 2 * values]  # one that does not begin where its memory does
    hole = samples.peephole(part)
    if values < 4:
        assert hole is None
    else:
        assert hole is not None
        assert samples.seen_through([hole]) == [samples.raw_bytes(samples.few_values(part))]
        part.neg_() if dtype.is_floating_point else part.bitwise_not_()
        assert samples.seen_through([hole]) == [samples.raw_bytes(samples.few_values(part))]  # as they are now
    assert samples.peephole(whole[::2]) is None


def test_it_is_noticed_that_a_tensor_is_not_where_it_was() -> None:
    layer = torch.nn.Linear(8, 8)
    tensor = layer.weight.requires_grad_(False)
    layer.config = make_llama().config
    unchanged = seen_unchanged(layer)
    assert unchanged.modules_if_unchanged() == [layer]
    whole = tensor.data
    for other in (whole[1:], whole[:4], whole.t(), whole.clone(), torch.empty(0)):
        tensor.data = other
        assert unchanged.modules_if_unchanged() is None
    tensor.data = whole
    assert unchanged.modules_if_unchanged() == [layer]
    layer.weight = torch.nn.Parameter(whole, requires_grad=False)  # another object, though of the same memory
    assert unchanged.modules_if_unchanged() is None
    gone = weakref.ref(tensor)
    del tensor
    assert gone() is None  # it is not kept for the sake of looking at it


@pytest.mark.parametrize("move", ["to another module", "to the end", "away", "in place of another"])
def test_it_is_noticed_that_a_module_is_not_where_it_was(move: str) -> None:
    model = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), torch.nn.Sequential(torch.nn.Linear(4, 4))
    )
    model.config = make_llama().config
    unchanged = seen_unchanged(model)
    assert unchanged.modules_if_unchanged() is not None
    first, second = model[0]._modules, model[1]._modules
    if move == "to another module":  # the modules are the same ones in the same order
        model[1]._modules = {"1": first.pop("1"), **second}
    elif move == "to the end":
        first["0"] = first.pop("0")
    elif move == "away":
        first["1"] = None
    else:
        first["1"] = torch.nn.Linear(4, 4)
    assert unchanged.modules_if_unchanged() is None


def seen_unchanged(model: nn.Module) -> Any:
    watch = Watch()
    watch.look(model, (), [])
    assert watch._last is not None
    return watch._last


def test_weights_whose_memory_was_taken_away_are_not_read() -> None:
    model = make_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    fingerprint = Fingerprint(model)
    fingerprint.current()
    weight.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError)):
        fingerprint.current()


@pytest.mark.parametrize("looked_at", [True, False])
def test_weights_that_changed_unseen_are_not_the_old_ones_under_other_settings_either(looked_at: bool) -> None:
    """A change that the samples do not show, while another attention implementation is set or as it is set again."""
    model = make_model()
    fingerprint = Fingerprint(model)
    old = fingerprint.current()
    model.set_attn_implementation("eager")
    other = fingerprint.current()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(-1)[-2] += 5
    if looked_at:
        assert fingerprint.current() not in (old, other)
    model.set_attn_implementation("sdpa")
    new = fingerprint.current()
    assert new not in (old, other)
    model.set_attn_implementation("eager")
    assert fingerprint.current() not in (old, other, new)
    model.set_attn_implementation("sdpa")
    assert fingerprint.current() == new
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)  # which shows
    assert fingerprint.current() not in (old, other, new)
