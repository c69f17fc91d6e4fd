"""What computes but is no weight: hooks, replaced functions, numbers in modules, switches. KV is shared only by models
that compute alike; where that can't be told, nothing is kept."""

from __future__ import annotations

import gc
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from functools import partial, wraps
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, tokens
from support.turns import assert_reused, follow_up, turn
from torch import nn
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from hf_attnstore import AttentionStore, AttentionStoreCache, attach, detach
from hf_attnstore.cache.identity.fingerprint import Fingerprint, fingerprint_of
from hf_attnstore.cache.identity.observers import only_looks
from hf_attnstore.lab.families.tiny import build, families

Change = Callable[[Any, pytest.MonkeyPatch], object]
PROMPT = tokens(50)


def steering(scale: float, vector: torch.Tensor | None = None) -> Callable[..., Any]:
    """A forward hook that adds something to what a layer says."""

    def steer(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        added = scale if vector is None else scale * vector
        return (hidden + added, *output[1:]) if isinstance(output, tuple) else hidden + added

    return steer


class Steering:
    """A hook with a state that others set."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output * self.scale


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.5


class Tensors(torch.overrides.TorchFunctionMode):
    """Stands between the model and torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 1.5 if func is torch.nn.functional.silu else result


def other_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A norm as another library would swap it in."""
    return self.weight * torch.nn.functional.normalize(hidden_states, dim=-1, eps=self.variance_epsilon) * 3.0


def other_rotation(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    return q * 1.25, k * cos.unsqueeze(unsqueeze_dim)


def other_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kw: Any
) -> Any:
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (query @ key.transpose(2, 3)) * scaling * 0.5
    causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    weights = weights.masked_fill(~causal, -1e9).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def wrapped(function: Callable[..., Any], scale: float) -> Callable[..., Any]:
    @wraps(function)
    def around(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * scale

    return around


def own_class(module: Any) -> None:
    class Other(type(module)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0.7

    module.__class__ = Other


def other_eps(model: Any) -> Any:
    norm = modeling_llama.LlamaRMSNorm(48, eps=0.3)
    norm.weight = model.model.layers[1].input_layernorm.weight
    return norm.eval()


def mapping(patch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    patch.setitem(AttentionInterface._global_mapping, name, function)


LAYER: Callable[[Any], Any] = lambda model: model.model.layers[1]  # noqa: E731
CHANGES: dict[str, Change] = {
    "hook on a layer": lambda m, p: LAYER(m).register_forward_hook(steering(0.5)),
    "hook with a vector": lambda m, p: LAYER(m).register_forward_hook(steering(1.0, torch.arange(48.0))),
    "hook inside a layer": lambda m, p: LAYER(m).mlp.act_fn.register_forward_hook(Steering(3.0)),
    "pre-hook on a projection": lambda m, p: LAYER(m).self_attn.k_proj.register_forward_pre_hook(
        lambda module, args: (args[0] * 0.5,)
    ),
    "pre-hook with keywords": lambda m, p: LAYER(m).self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 2}), with_kwargs=True
    ),
    "partial as a hook": lambda m, p: LAYER(m).mlp.register_forward_hook(partial(lambda s, m, a, o: o * s, 0.25)),
    "bound method as a hook": lambda m, p: LAYER(m).mlp.register_forward_hook(Steering(0.5).__call__),
    "hook on the embedding": lambda m, p: m.get_input_embeddings().register_forward_hook(steering(0.1)),
    "hook on every module": lambda m, p: p.setitem(
        torch.nn.modules.module._global_forward_hooks, -1, lambda m, a, o: o * 1.1 if isinstance(m, nn.Linear) else None
    ),
    "pre-hook on every module": lambda m, p: p.setitem(
        torch.nn.modules.module._global_forward_pre_hooks,
        -1,
        lambda m, a: (a[0] * 0.9,) if isinstance(m, nn.Linear) else None,
    ),
    "forward of an instance": lambda m, p: setattr(
        LAYER(m).mlp,
        "forward",
        types.MethodType(lambda self, x: self.down_proj(x.new_ones(1, x.shape[1], 64)), LAYER(m).mlp),
    ),
    "forward of an instance, wrapped": lambda m, p: setattr(
        LAYER(m).mlp, "forward", wrapped(LAYER(m).mlp.forward, 2.0)
    ),
    "forward of a class": lambda m, p: p.setattr(modeling_llama.LlamaRMSNorm, "forward", other_norm),
    "forward of a class, wrapped": lambda m, p: p.setattr(
        modeling_llama.LlamaMLP, "forward", wrapped(modeling_llama.LlamaMLP.forward, 0.5)
    ),
    "forward of torch's Linear, wrapped": lambda m, p: p.setattr(nn.Linear, "forward", wrapped(nn.Linear.forward, 0.9)),
    "call of a class": lambda m, p: p.setattr(
        modeling_llama.LlamaMLP, "__call__", wrapped(nn.Module.__call__, 0.5), raising=False
    ),
    "another class": lambda m, p: own_class(LAYER(m).mlp),
    "another module": lambda m, p: setattr(LAYER(m).mlp, "act_fn", nn.GELU()),
    "epsilon": lambda m, p: setattr(LAYER(m).input_layernorm, "variance_epsilon", 0.5),
    "scaling": lambda m, p: setattr(LAYER(m).self_attn, "scaling", 0.01),
    "rope scaling": lambda m, p: setattr(m.model.rotary_emb, "attention_scaling", 0.5),
    "activation as a function": lambda m, p: p.setattr(
        torch.nn.functional, "silu", lambda x, inplace=False: torch.relu(x)
    ),
    "inv_freq": lambda m, p: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq * 0.5),
    "rotation of the modelling file": lambda m, p: p.setattr(modeling_llama, "apply_rotary_pos_emb", other_rotation),
    "helper of a helper": lambda m, p: p.setattr(modeling_llama, "rotate_half", lambda x: x),
    "attention of a name": lambda m, p: mapping(p, "sdpa", other_attention),
    "torch's attention": lambda m, p: p.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        wrapped(torch.nn.functional.scaled_dot_product_attention, 0.5),
    ),
    "code of a function": lambda m, p: p.setattr(modeling_llama.rotate_half, "__code__", (lambda x: x * 0.5).__code__),
    "parametrization": lambda m, p: nn.utils.parametrize.register_parametrization(
        LAYER(m).self_attn.k_proj, "weight", Halved()
    ),
    "hook that silences": lambda m, p: LAYER(m).mlp.down_proj.register_forward_hook(lambda m, a, o: o * 0.0),
    "hook that rounds": lambda m, p: LAYER(m).self_attn.v_proj.register_forward_hook(
        lambda m, a, o: o.to(torch.bfloat16).to(o.dtype)
    ),
    "norms exchanged": lambda m, p: LAYER(m).__dict__["_modules"].update(input_layernorm=other_eps(m)),
}


def first_turn(model: Any, store: AttentionStore) -> torch.Tensor:
    return turn(model, PROMPT, AttentionStoreCache(model, "alice", store)).sequences


def assert_right(model: Any, prompt: torch.Tensor, store: AttentionStore) -> int:
    """A turn is what it is without a store. Returns what it reused."""
    cache = AttentionStoreCache(model, "alice", store)
    ours, theirs = turn(model, prompt, cache), turn(model, prompt, None)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.allclose(ours.logits[0], theirs.logits[0], atol=1e-4)
    assert_reused(cache, prompt, cache.reused_tokens)
    return cache.reused_tokens


@pytest.mark.parametrize("what", CHANGES)
def test_kv_from_before_a_change_is_not_used_after_it_nor_the_other_way_round(what: str, store: AttentionStore) -> None:
    plain = first_turn(make_model(), store)
    prompt = follow_up(plain, 6, 2)
    model = make_model()
    assert assert_right(model, prompt, store) == 55
    with pytest.MonkeyPatch.context() as patch:
        CHANGES[what](model, patch)
        reused = assert_right(model, prompt, store)
        changed = fingerprint_of(model)
        assert reused == 0, "KV of another computation"
        again = assert_right(model, prompt, store)  # identified, or left alone
        assert again in (0, prompt.shape[1] - 1)
        assert changed.computing.problem or again
    other = make_model()
    assert assert_right(other, prompt, store) == prompt.shape[1] - 1, "the plain model's KV is still there"


def print_of(model: Any) -> str:
    return Fingerprint(model).current()


def hooked(hook: Any) -> Any:
    model = make_model()
    LAYER(model).register_forward_hook(hook)
    return model


def test_the_same_addition_is_the_same_computation_and_another_number_is_another() -> None:
    same = [print_of(hooked(steering(0.5, torch.ones(48)))) for _ in range(2)]
    other = [
        print_of(hooked(hook))
        for hook in (steering(0.25, torch.ones(48)), steering(0.5, torch.zeros(48)), steering(0.5), Steering(0.5))
    ]
    assert same[0] == same[1]
    assert len({print_of(make_model()), same[0], *other}) == 6


def test_additions_are_identified_alike_in_another_process(tmp_path: Path) -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]\nfrom test_computing import prints\nprint(*prints(), sep='\\n')\n"
    command = [sys.executable, "-c", code, *sys.path]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(set(there)) == 4
    assert there == prints()


def prints() -> list[str]:
    found = []
    for what in ("hook with a vector", "forward of a class, wrapped", "attention of a name", "parametrization"):
        model = make_model()
        with pytest.MonkeyPatch.context() as patch:
            CHANGES[what](model, patch)
            found.append(print_of(model))
    return found


class Slotted:
    """A hook that shows nothing of its content."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 2.0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output[0] * self.scale if isinstance(output, tuple) else output * self.scale


def noisy(module: nn.Module, args: Any, output: Any) -> Any:
    return output + 0.1 * torch.randn_like(output)


NUMBERS = count(1)
UNKNOWN: dict[str, Any] = {
    "a hook that draws random numbers": noisy,
    "a hook with slots": Slotted(),
    "a hook that goes by a generator": lambda m, a, o, numbers=NUMBERS: o * next(numbers),
    "an operator that somebody registered": lambda m, a, o: torch.ops.aten.relu(o),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_can_not_be_identified_is_not_kept_and_named_once(
    what: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    plain = first_turn(make_model(), store)
    model = hooked(UNKNOWN[what])
    for _ in range(2):
        cache = AttentionStoreCache(model, "bob", store)
        turn(model, follow_up(plain, 6, 2), cache)
        assert cache.reused_tokens == 0
    store.flush()
    assert store.session_fingerprint("bob") is None
    lines = [record.getMessage() for record in log.records if "can't be identified" in record.getMessage()]
    assert len(lines) == 1
    assert "hook" in lines[0]
    assert "model.layers.1 (LlamaDecoderLayer)" in lines[0]


def test_a_mode_around_the_call_is_not_identified(store: AttentionStore, log: pytest.LogCaptureFixture) -> None:
    plain = first_turn(make_model(), store)
    with Tensors():
        assert assert_right(make_model(), follow_up(plain, 6, 2), store) == 0
    assert "Tensors stands between the model and torch" in log.text
    with torch.device("cpu"):
        assert assert_right(make_model(), follow_up(plain, 6, 2), store) == 55


def test_switches_of_torch_that_change_more_than_rounding_are_part_of_the_identity() -> None:
    before = print_of(make_model())
    torch.set_float32_matmul_precision("medium")
    try:
        assert print_of(make_model()) != before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert print_of(make_model()) == before


class Counting:
    """A hook that does something else from its second call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.calls += 1
        return output * float(self.calls)


def test_what_changes_while_a_turn_runs_is_not_kept(store: AttentionStore, log: pytest.LogCaptureFixture) -> None:
    turn(model := hooked(Counting()), PROMPT, AttentionStoreCache(model, "bob", store))
    store.flush()
    assert store.session_fingerprint("bob") is None
    assert store.stats()["disk_blocks"] == 0
    assert "changed while the turn ran" in log.text


def test_a_hook_that_comes_in_the_middle_of_a_turn_is_noticed(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "bob", store)
    with torch.no_grad():
        cache.match(PROMPT)
        model(input_ids=PROMPT[:, :32], past_key_values=cache)
        handle = LAYER(model).register_forward_hook(steering(0.5))
        model(input_ids=PROMPT[:, 32:], past_key_values=cache)
        handle.remove()
        cache.save()
    assert "in the middle of a turn" in cache.stats.recomputed
    assert assert_right(make_model(), PROMPT, store) <= 32


def test_a_hook_that_is_gone_leaves_the_plain_model(store: AttentionStore) -> None:
    plain = first_turn(make_model(), store)
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    handle = LAYER(model).register_forward_hook(steering(0.5))
    prompt = follow_up(plain, 6, 2)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(model, prompt, None).sequences)
    assert cache.reused_tokens == 0
    handle.remove()
    assert torch.equal(turn(model, prompt, cache).sequences, turn(model, prompt, None).sequences)
    assert cache.reused_tokens >= 55


def test_an_attribute_that_takes_the_place_of_another_is_noticed(store: AttentionStore) -> None:
    """Modules have as many attributes as before, and a forward more."""
    model = make_model()
    norm = LAYER(model).input_layernorm
    norm.noted = 1
    cache = AttentionStoreCache(model, "alice", store)
    turn(model, PROMPT, cache)
    del norm.noted
    norm.forward = lambda hidden, usual=norm.forward: 2 * usual(hidden)
    assert torch.equal(turn(model, PROMPT, cache).sequences, turn(model, PROMPT, None).sequences)
    assert cache.reused_tokens == 0
    del norm.variance_epsilon  # a number that its code uses, and another that it does not
    norm.noted, norm.variance_epsilon_ = 1, 0.5
    with pytest.raises(AttributeError):
        turn(model, PROMPT, cache)
    norm.variance_epsilon = 1e-1
    assert torch.equal(turn(model, PROMPT, cache).sequences, turn(model, PROMPT, None).sequences)
    assert cache.reused_tokens == 0


def test_a_number_in_a_hook_is_looked_at_before_every_turn(store: AttentionStore) -> None:
    hook = Steering(0.5)
    model = make_model()
    LAYER(model).mlp.register_forward_hook(hook)
    cache = AttentionStoreCache(model, "alice", store)
    for scale, reused in ((0.5, 0), (0.5, 49), (2.0, 0), (0.5, 49)):
        hook.scale = scale
        assert torch.equal(turn(model, PROMPT, cache).sequences, turn(model, PROMPT, None).sequences)
        assert cache.reused_tokens == reused


def test_asking_for_hidden_states_which_puts_hooks_on_a_model_changes_nothing(store: AttentionStore) -> None:
    plain = first_turn(make_model(), store)
    model = make_model()
    model(input_ids=PROMPT, output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    assert assert_right(model, follow_up(plain, 6, 2), store) == 55


def test_reading_all_of_it_is_done_once_and_models_are_not_kept_alive_by_it(store: AttentionStore) -> None:
    model = make_model()
    LAYER(model).register_forward_hook(lambda m, a, o, whole=model: o)  # leads back to the model
    fingerprint = fingerprint_of(model)
    before = fingerprint.current()
    turn(model, PROMPT, None)
    assert fingerprint.current() == before
    assert fingerprint.computing.reads == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_detach_takes_off_what_was_put_on_to_watch_the_model(store: AttentionStore) -> None:
    model = make_model()
    before = set(vars(model))
    attach(model, store)
    turn(model, PROMPT, None)
    detach(model)
    assert set(vars(model)) == before


def test_a_hook_that_only_writes_down_what_it_sees_changes_nothing(store: AttentionStore) -> None:
    """Its list grows with every forward, and can't be read by it: it is no part of what computes."""
    seen: list[int] = []
    prompt = tokens(40)
    for known in (0, prompt.shape[1] - 1):
        model = make_model()
        model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        assert assert_right(model, prompt, store) == known
    assert seen


def test_a_hook_that_reads_what_it_wrote_down_is_not_known_by_its_code_alone() -> None:
    def scaling(history: list[float]) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            history.append(1.0)
            return output * len(history)

        return hook

    assert print_of(hooked(scaling([]))) != print_of(hooked(scaling([1.0])))


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "gemma3_text"])
def test_a_model_as_transformers_makes_it_has_no_additions(family: str) -> None:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    model = build(family)
    identity = Fingerprint(model)
    identity.current()
    assert not identity.computing.additions
    assert not identity.computing.problem


def test_hooks_that_only_look_are_told_from_those_that_may_do_more() -> None:
    seen: list[Any] = []

    def counts_and_fails(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 7:
            raise MemoryError("no memory")

    class Counted:
        seen = 0

        def hook(self, *_: Any) -> None:
            self.seen += 1

    assert only_looks(lambda *_: seen.append(1))
    assert only_looks(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]))
    assert only_looks(counts_and_fails)
    for other in (
        lambda m, a, output: output,
        lambda m, a, output: output[0].add(1),
        lambda m, a, k: k["cache"].update(1, 2, 0),
        lambda m, a, k: a[0].append(1),
        lambda m, a, k: setattr(m, "eps", 1),
        lambda m, a, k: a[0].zero_(),
        lambda m, a, k: seen.append(m.weight.mul_(2)),
        Counted().hook,
    ):
        assert not only_looks(other)
