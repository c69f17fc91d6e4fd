"""Quantised weights: equal content is the same model, and every part of the content counts."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.quantised_models import FORMS, Opaque, _wrapped, changed, dynamically_quantised, quantised
from support.tiny_models import make_model, tokens
from support.turns import Reference, assert_reused, assert_same, count_values_read, follow_up, turn
from torch import nn

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.identity.fingerprint import Fingerprint

MAKERS: dict[str, Callable[..., Any]] = {
    **{form: lambda seed=0, make=make: quantised(make, seed) for form, (make, _) in FORMS.items()},
    "packed objects": dynamically_quantised,
}
PARTS = [(form, part) for form, (make, parts) in FORMS.items() for part in range(len(parts(make(nn.Linear(8, 4)))))]


def fingerprint(model: Any) -> str:
    return Fingerprint(model).current()


def assert_continues(first: Any, second: Any, reference: Any, store: AttentionStore, reused: int) -> None:
    """A turn by `first`, and the next by `second`, equal to those of `reference` without a store."""
    theirs = Reference(reference)
    sequence = turn(first, tokens(50), AttentionStoreCache(first, "alice", store)).sequences
    prompt = follow_up(sequence, 6, 2)
    if reused:
        assert torch.equal(theirs.turn(tokens(50)).sequences, sequence)
    cache = AttentionStoreCache(second, "alice", store)
    assert_same(turn(second, prompt, cache), theirs.turn(prompt))
    assert_reused(cache, prompt, reused)


@pytest.mark.parametrize("form", MAKERS)
def test_equal_content_is_reused_and_other_content_is_not(form: str, store: AttentionStore) -> None:
    make = MAKERS[form]
    model, twin, other = make(), make(), make(seed=1)
    before = fingerprint(model)
    assert before == fingerprint(twin) != fingerprint(other)
    assert_continues(model, twin, make(), store, 55)
    assert fingerprint(model) == before  # also after it was used
    assert_continues(model, other, make(seed=1), store, 0)


@pytest.mark.parametrize(("form", "part"), PARTS)
def test_every_part_counts_and_a_change_in_place_is_noticed(form: str, part: int, store: AttentionStore) -> None:
    make, parts = FORMS[form]
    model = quantised(make)
    watching = Fingerprint(model)
    before = watching.current()
    assert watching.current() == before
    cache = AttentionStoreCache(model, "alice", store)
    sequence = turn(model, tokens(50), cache).sequences
    if form == "extra state":  # nothing tells of a change inside an object that only `state_dict` opens
        changed(parts(model.model.layers[1].self_attn.k_proj)[part])
        assert fingerprint(model) != before
        return
    changed(parts(model.model.layers[1].self_attn.k_proj)[part])
    assert watching.current() != before
    assert fingerprint(model) != before
    prompt = follow_up(sequence, 6, 2)
    ours = turn(model, prompt, cache).sequences
    assert_reused(cache, prompt, 0)
    assert torch.equal(ours, turn(model, prompt, None).sequences)


def test_only_the_non_quantised_weights_of_two_models_may_agree() -> None:
    """What packed objects hold is all that tells these apart."""
    model, other = dynamically_quantised(), dynamically_quantised()
    packed = make_model(seed=1).model.layers[1].self_attn.k_proj
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.quantize_per_tensor(packed.weight.detach(), 0.01, 0, torch.qint8)
    watching = Fingerprint(other)
    assert watching.current() == fingerprint(model)
    other.model.layers[1].self_attn.k_proj.set_weight_bias(weight, None)
    assert watching.current() == fingerprint(other) != fingerprint(model)


def test_words_count_as_tensors_do() -> None:
    make, _ = FORMS["parameter with a state"]
    model, other = quantised(make), quantised(make)
    other.model.layers[0].self_attn.k_proj.weight.quant_state.quant_type = "fp4"
    assert fingerprint(model) != fingerprint(other)
    make, _ = FORMS["tensor subclass"]
    model, other = quantised(make), quantised(make)
    other.model.layers[0].self_attn.k_proj.weight.block = 24
    assert fingerprint(model) != fingerprint(other)


def test_fingerprints_are_the_same_in_another_process() -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_quantised import MAKERS, fingerprint\n"
        "for form in MAKERS:\n"
        "    model = MAKERS[form]()\n"
        "    print(fingerprint(model))\n"
    )
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *sys.path],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout.split()  # fmt: skip
    models = [make() for make in MAKERS.values()]
    assert there == [fingerprint(model) for model in models]


def test_what_can_not_be_identified_is_not_reused_and_is_said_once(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = quantised(_wrapped(Opaque))
    sequence = tokens(50)
    for _ in range(3):
        cache = AttentionStoreCache(model, "alice", store)
        ours = turn(model, sequence, cache).sequences
        assert torch.equal(ours, turn(model, sequence, None).sequences)
        assert_reused(cache, sequence, 0)
        assert "can't be identified" in cache.stats.recomputed
        assert "Opaque" in cache.stats.recomputed
        sequence = follow_up(ours, 5, 2)
    assert store.stats()["saved_blocks"] == 0
    assert len([record for record in log.records if "can't be identified" in record.getMessage()]) == 1


def test_samples_of_large_quantised_weights_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    make, _ = FORMS["a dict beside the parameter"]
    read: list[int] = []
    count_values_read(monkeypatch, read)
    model = quantised(make)
    before: list[int] = []
    for size in (64, 1024):
        model.model.layers[0].self_attn.k_proj = make(nn.Linear(size, 2048))
        watching = Fingerprint(model)
        watching.current()
        read.clear()
        watching._compute()
        before.append(sum(read))
        read.clear()
        watching.current()
        assert sum(read) <= 400
    assert before[0] == before[1]


# the packages themselves, where they are installed


def _torchao(seed: int = 0) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed", exc_type=ImportError)
    model = make_model(seed=seed)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def _quanto(seed: int = 0) -> Any:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed", exc_type=ImportError)
    model = make_model(seed=seed)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def _bitsandbytes(kind: str) -> Callable[..., Any]:
    def make(seed: int = 0) -> Any:
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError)

        def convert(linear: nn.Linear) -> nn.Module:
            if kind == "4bit":
                new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(
                    linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
                )
                new.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
            return new.to("cpu")

        return quantised(convert, seed).eval()

    return make


PACKAGES = {
    "torchao": _torchao,
    "optimum-quanto": _quanto,
    "bitsandbytes 4 bit": _bitsandbytes("4bit"),
    "bitsandbytes 8 bit": _bitsandbytes("8bit"),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_models_of_the_packages_are_identified(package: str, store: AttentionStore) -> None:
    make = PACKAGES[package]
    model, twin, other = make(), make(), make(seed=1)
    watching = Fingerprint(model)
    before = watching.current()
    assert before == fingerprint(twin) != fingerprint(other)
    assert_continues(model, twin, make(), store, 55)
    assert watching.current() == before
    assert_continues(model, other, make(seed=1), store, 0)
