"""The codecs that come with the package: what they write, what comes back by whichever way, what they leave alone."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.engines import Valkey, empty_server
from support.tiny_models import BLOCK, make_model, tokens
from support.turns import Reference, assert_reused, assert_same, expected_load, follow_up, turn
from transformers import DynamicCache

from hf_attnstore import AttentionStore, AttentionStoreCache, AttentionStoreError
from hf_attnstore.cache.transfer import save
from hf_attnstore.errors import LoadError
from hf_attnstore.lab.families.encoder_decoders import encoder_input, make_seq2seq
from hf_attnstore.store.blocks import kernels
from hf_attnstore.store.blocks.block import BlockMeta
from hf_attnstore.store.blocks.codecs import codec_named

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_zstd = pytest.mark.skipif(importlib.util.find_spec("zstandard") is None, reason="needs the zstandard package")
LOSSY = ["fp16", "int8", "int4", pytest.param("int8z", marks=needs_zstd)]
EVERY = [*LOSSY, pytest.param("lossless", marks=needs_zstd)]


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    save._say_once.cache_clear()


def opened(folder: Path, codec: str | None, **settings: Any) -> AttentionStore:
    return AttentionStore(folder, block_size=BLOCK, codec=codec, on_device=0, **settings)


def meta(tokens: int, start: int = 256) -> BlockMeta:
    return BlockMeta(b"k" * 32, b"p" * 32, "f", start, b"\0\0\0\0" * tokens)


def there_and_back(name: str, tensor: torch.Tensor, what: str = "layers.0.keys", start: int = 256) -> torch.Tensor:
    """What a codec makes of a tensor."""
    codec = codec_named(name)
    parts = codec.encode(what, tensor, meta(tensor.shape[1], start))
    if parts is None:
        return tensor
    room = torch.full((tensor.shape[0], tensor.shape[1] + 7, tensor.shape[2]), math.nan, dtype=tensor.dtype)
    codec.decode(parts, room[:, 3:-4])
    assert room[:, :3].isnan().all()
    assert room[:, -4:].isnan().all()
    return room[:, 3:-4]


def some_kv(heads: int, count: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Channels of very different sizes, one that never changes and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(heads, count, dim, generator=generator)
    found *= torch.logspace(-3, 2, dim) if dim > 1 else 1
    found[..., 0] = 0.5
    if dim > 1:
        found[..., 1] = 0
    return found.to(dtype)


# arithmetic


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 16, 12), (3, 64, 8), (1, 128, 256), (2, 100, 66), (1, 512, 128)], ids=str
)
@pytest.mark.parametrize("what", ["layers.0.keys", "layers.0.values"])
@pytest.mark.parametrize("codec", EVERY)
def test_what_comes_back_is_within_half_a_step(
    codec: str, what: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    kv = some_kv(*shape, dtype)
    found = there_and_back(codec, kv, what).float()
    if codec == "lossless":
        assert torch.equal(found, kv.float())
        return
    exact = kv.float()
    heads, count, dim = shape
    if what.endswith("keys"):  # groups of tokens of one channel
        group = 64 if codec == "int4" else 128
        groups = exact.view(heads, -1, group if count % group == 0 else count, dim).transpose(2, 3)
    else:
        groups = exact.view(heads, count, -1, 64 if codec == "int4" and dim % 64 == 0 else dim)
    centred = groups - groups.mean(-1, keepdim=True) if codec == "int8z" and what.endswith("keys") else groups
    square = centred.square().mean(-1)
    by_head = (square * square.mean(-1, keepdim=True)) ** 0.25 / 12.5
    coarse = groups.std(-1, correction=0) / 6.5 if centred is groups else by_head
    levels = torch.tensor(15.0)
    if codec == "int4" and what.endswith("keys") and dim > 1:
        parts = codec_named(codec).encode(what, kv, meta(count))
        widths = torch.cat([parts["widths"], 8 - parts["widths"]], dim=-1).float()
        bits = torch.empty(heads, dim).scatter_(1, parts["order"].long(), widths)
        assert (bits.sum(-1) == 4 * dim).all()
        assert (bits[:, 0] < bits[:, -1]).all() or dim < 4 or count < 2  # varies least, most
        levels = (2**bits - 1)[:, None]
    size = {
        "fp16": groups.abs().amax(-1) * 2**-10,
        "int8": groups.abs().amax(-1) / 127,
        "int8z": torch.maximum(centred.abs().amax(-1) / 127, coarse) + groups.abs().amax(-1) * 2**-16,
        "int4": (groups.amax(-1) - groups.amin(-1)) / levels + groups.abs().amax(-1) * 2**-9,
    }[codec]
    rounding = groups.abs() * torch.finfo(dtype).eps
    error = (
        (found.view(exact.shape) - exact).view(heads, -1, groups.shape[3], dim).transpose(2, 3)
        if what.endswith("keys")
        else (found - exact).view(groups.shape)
    )
    assert (error.abs() <= (size * 0.501)[..., None] + rounding + 6e-8).all()
    assert (found != exact).any() == (codec != "fp16" or dtype == torch.float32) or max(shape) < 16


@pytest.mark.skipif(kernels.library() is None, reason="the package was built without a compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 12), (3, 64, 8), (1, 128, 256), (2, 100, 66), (1, 256, 320)], ids=str)
@pytest.mark.parametrize("what", ["layers.0.keys", "layers.0.values"])
@pytest.mark.parametrize("codec", ["int8", "int4", *EVERY[-2:]])
def test_compiled_loops_give_the_bits_that_torch_gives(
    codec: str, what: str, shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, calls, real = some_kv(*shape, dtype), [], kernels.library
    monkeypatch.setattr(kernels, "library", lambda: calls.append(real()) or calls[-1])
    compiled = there_and_back(codec, kv, what, start=0)
    assert calls
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert torch.equal(compiled.view(torch.uint8), there_and_back(codec, kv, what, start=0).view(torch.uint8))


def test_int4_blocks_whose_channels_have_four_bits_each_are_still_read() -> None:
    codec, generator = codec_named("int4"), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 64, 8), dtype=torch.uint8, generator=generator)
    steps, lowest = torch.rand(2, 1, 16, generator=generator).half(), torch.rand(2, 1, 16, generator=generator).half()
    found = torch.empty(2, 64, 16)
    codec.decode({"codes": codes, "scale": steps, "lowest": lowest}, found)
    whole = torch.cat([codes & 15, codes >> 4], dim=-1).float()
    assert torch.equal(found, whole * steps.float() + lowest.float())


@needs_zstd
def test_int8z_blocks_whose_keys_have_no_means_are_still_read() -> None:
    from hf_attnstore.store.blocks.entropy import squeezed

    codes, steps = torch.randint(-99, 99, (2, 64, 16), dtype=torch.int8), torch.rand(2, 1, 16).half()
    found = torch.empty(2, 64, 16)
    codec_named("int8z").decode({"codes": squeezed(codes.numpy()), "scale": steps}, found)
    assert torch.equal(found, codes.float() * steps.float())


@pytest.mark.parametrize("codec", ["int8", "int4", pytest.param("int8z", marks=needs_zstd)])
def test_parts_of_later_versions_are_refused_and_not_left_out(codec: str) -> None:
    parts = dict(codec_named(codec).encode("layers.0.keys", some_kv(1, 64, 8), meta(64)))
    with pytest.raises(LoadError, match="not known here: \\['more'\\]"):
        codec_named(codec).decode(parts | {"more": torch.ones(1)}, torch.empty(1, 64, 8))


def test_an_order_that_is_none_is_refused() -> None:
    codec = codec_named("int4")
    parts = dict(codec.encode("layers.0.keys", some_kv(1, 64, 8), meta(64)))
    for order in (torch.full((1, 8), 200, dtype=torch.uint8), torch.zeros(1, 8, dtype=torch.uint8)):
        with pytest.raises(LoadError):
            codec.decode(parts | {"order": order}, torch.empty(1, 64, 8))


@pytest.mark.parametrize("codec", EVERY)
def test_zeros_and_what_never_changes_come_back_exactly(codec: str) -> None:
    for value in (0.0, -0.0, *(() if codec.startswith("int8") else (1.0, -3.5))):
        kv = torch.full((2, 64, 16), value)
        assert torch.equal(there_and_back(codec, kv), kv)
        assert torch.equal(there_and_back(codec, kv, "layers.1.values"), kv)


@pytest.mark.parametrize("codec", ["int8", "int4", pytest.param("int8z", marks=needs_zstd)])
@pytest.mark.parametrize("what", ["layers.0.keys", "layers.0.values"])
def test_the_first_four_tokens_of_a_conversation_are_exact_and_count_in_no_step(codec: str, what: str) -> None:
    kv = some_kv(2, 64, 16)
    kv[:, :4] *= 100
    found = there_and_back(codec, kv, what, start=0)
    assert torch.equal(found[:, :4], kv[:, :4])
    without = kv.clone()
    without[:, :4] = 0
    assert torch.equal(found[:, 4:], there_and_back(codec, without, what, start=0)[:, 4:])
    assert not torch.equal(there_and_back(codec, kv, what, start=64)[:, :4], kv[:, :4])


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_do_not_become_infinite(codec: str, dtype: torch.dtype) -> None:
    kv = some_kv(1, 64, 16, dtype)
    kv[0, 5, 2] = torch.finfo(dtype).max
    kv[0, 9, 2] = -torch.finfo(dtype).max
    for what in ("layers.0.keys", "layers.0.values"):
        found = there_and_back(codec, kv, what)
        assert found.isfinite().all()
        assert abs(found[0, 5, 2].item() - kv[0, 5, 2].item()) <= 0.04 * kv[0, 5, 2].item()


@pytest.mark.parametrize("codec", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool], ids=str)
def test_other_types_are_left_as_they_are(codec: str, dtype: torch.dtype) -> None:
    assert codec_named(codec).encode("layers.0.keys", torch.ones(2, 64, 8, dtype=dtype), meta(64)) is None


@needs_zstd
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lossless_keeps_every_bit_of_whatever_there_is(dtype: torch.dtype) -> None:
    kv = some_kv(2, 64, 32, dtype)
    width = torch.int32 if dtype == torch.float32 else torch.int16
    kv.view(-1)[:8] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-7, 65504.0]).to(dtype)
    found = there_and_back("lossless", kv).contiguous()
    assert torch.equal(found.view(width), kv.view(width))


# through a store


class RoundedReference(Reference):
    """A kept `DynamicCache` whose full blocks are what the codec makes of them, from the end of each turn on."""

    def __init__(self, model: Any, codec: str) -> None:
        super().__init__(model)
        self.codec, self.rounded = codec, 0

    def turn(self, ids: torch.Tensor, **settings: Any) -> Any:
        found = super().turn(ids, **settings)
        stop = self.cache.get_seq_length() // BLOCK * BLOCK
        for number, layer in enumerate(self.cache.layers):
            for name, kept in (("keys", layer.keys), ("values", layer.values)):
                for start in range(self.rounded, stop, BLOCK):
                    block = kept[0, :, start : start + BLOCK]
                    block.copy_(there_and_back(self.codec, block.clone(), f"layers.{number}.{name}", start))
        self.rounded = stop
        return found


def ways(tier: str, store: AttentionStore) -> None:
    """Has what is loaded next come from a tier."""
    store.flush()
    if tier.startswith("disk"):
        store.drop_memory()
    elif tier == "promoted":
        store.drop_memory()
        store.promote([span.block for span in store.manifest("alice").spans])
        store.flush()


@pytest.mark.parametrize("tier", ["memory", "at once", "unwritten", "disk", "disk at once", "promoted"])
@pytest.mark.parametrize("codec", EVERY)
def test_turns_have_the_logits_of_a_kept_cache_that_was_rounded_by_the_codec_itself(
    codec: str, tier: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tier.endswith("at once"):
        request.getfixturevalue("at_once")
    model, reference = make_model(), RoundedReference(make_model(), codec)
    with opened(tmp_path, codec) as store:
        if tier == "unwritten":  # the writer has not come to it: what is loaded is rounded all the same
            monkeypatch.setattr(store, "_write", lambda *_: None)
        sequence, known = tokens(0), 0
        for number, count in enumerate((45, 9, 30, 1)):
            prompt = follow_up(sequence, count, seed=number)
            if tier != "unwritten":
                ways(tier, store) if known else None
            cache = AttentionStoreCache(model, "alice", store)
            ours, theirs = turn(model, prompt, cache), reference.turn(prompt)
            assert_same(ours, theirs)
            assert_reused(cache, prompt, known)
            assert cache.stats.loaded_bytes == expected_load(cache, reference.cache, known)
            source = "disk" if tier.startswith("disk") else "memory"
            assert set(cache.stats.blocks_from) == ({source} if known else set())
            sequence, known = ours.sequences, ours.sequences.shape[1] - 1


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("family", ["gemma3", "mistral", "llama-mqa"])
@pytest.mark.parametrize("codec", LOSSY)
def test_every_way_gives_the_same(codec: str, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    prompt = tokens(90)
    with opened(tmp_path, codec) as store:
        model = make_model(family, dtype)
        turn(model, prompt, AttentionStoreCache(model, "alice", store))
        longer = follow_up(prompt, 9, 3)
        found = []
        for tier in ("memory", "disk", "promoted"):
            ways(tier, store)
            cache = AttentionStoreCache(model, "alice", store, save=False)
            found.append(turn(model, longer, cache))
            assert_reused(cache, longer, 90)
        assert_same(found[0], found[1])
        assert_same(found[0], found[2])
        exact = turn(make_model(family, dtype), longer, None)
        if dtype == torch.float32:  # in 16 bits a prompt in parts is rounded otherwise
            assert not torch.equal(found[0].logits[0], exact.logits[0])


def test_ratio_and_time_are_told_by_codec(tmp_path: Path) -> None:
    model = make_model()
    with opened(tmp_path, "int8") as store:
        for codec in ("int8", "int4", "fp16", "raw"):
            cache = AttentionStoreCache(model, codec, store.with_codec(codec))
            turn(model, tokens(8 * BLOCK), cache, max_new_tokens=1)
        store.flush()
        for stats in (store.stats(), store.totals()):
            assert stats["fp16_ratio"] == 0.5
            assert 0.125 < stats["int4_ratio"] < stats["int8_ratio"] < 0.45
            seconds = [stats[f"{codec}_seconds"] for codec in ("int8", "int4", "fp16")]
            assert min(seconds) > 0
            assert math.isclose(sum(seconds), stats["code_seconds"])
            assert "raw_ratio" not in stats


@needs_zstd
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("family", ["gemma3", "deepseek-v3", "qwen2"])
def test_lossless_has_the_logits_of_a_kept_cache(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, reference = make_model(family, dtype), Reference(make_model(family, dtype))
    with opened(tmp_path, "lossless") as store:
        ours = turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
        assert_same(ours, reference.turn(tokens(70)))
        ways("disk", store)
        assert (0.3 < store.stats()["lossless_ratio"] < 1.2) == (store.stats()["coded_bytes"] > 0)
        prompt = follow_up(ours.sequences, 20, 2)
        cache = AttentionStoreCache(model, "alice", store)
        assert_same(turn(model, prompt, cache), reference.turn(prompt))
        assert_reused(cache, prompt, 75)
        assert store.verify().problems == []
    assert any("layers.0.keys.exponents" in load_file(path) for path in tmp_path.glob("blocks/*/*/*"))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_memory_holds_what_the_codec_makes_of_blocks(codec: str, tmp_path: Path) -> None:
    sizes = {}
    for name in ("raw", codec):
        with opened(tmp_path / name, name) as store:
            model = make_model()
            turn(model, tokens(8 * BLOCK), AttentionStoreCache(model, "alice", store), max_new_tokens=1)
            store.flush()
            sizes[name] = store.stats()["memory_bytes"]
            if name == codec:
                stats = store.stats()
                assert stats["coded_bytes"] == sizes["raw"]
                assert stats["coded_to_bytes"] == sizes[codec]
                assert stats["code_seconds"] > 0
                store.drop_memory()
                assert store.stats()["memory_bytes"] == 0
                store.promote([span.block for span in store.manifest("alice").spans])
                store.flush()
                assert store.stats()["memory_bytes"] == sizes[codec]
    assert sizes[codec] < {"int8": 0.45, "int4": 0.4}[codec] * sizes["raw"]  # blocks of 16 tokens have many steps


def test_what_was_not_measured_is_kept_as_it_is_and_that_is_said_once(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    model, reference = make_model("deepseek-v3"), Reference(make_model("deepseek-v3"))
    with opened(tmp_path, "int8") as store:
        ours = turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
        assert_same(ours, reference.turn(tokens(70)))
        ways("disk", store)
        prompt = follow_up(ours.sequences, 20, 2)
        cache = AttentionStoreCache(model, "alice", store)
        assert_same(turn(model, prompt, cache), reference.turn(prompt))
        assert_reused(cache, prompt, 75)
    said = [record.message for record in log.records if "are kept as they are" in record.message]
    assert said == ["2 of 2 layers of a model are kept as they are: what int8 does to such was not measured"]


def test_forks_and_other_sessions_share_what_is_coded(tmp_path: Path) -> None:
    model = make_model()
    with opened(tmp_path, "int8") as store:
        turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
        store.fork("alice", "bob")
        other = torch.cat([tokens(70)[:, :41], tokens(20, 3)], dim=1)  # parts with what is known within a block
        found = []
        for session, tier in (("bob", "memory"), ("carol", "disk")):
            ways(tier, store)
            cache = AttentionStoreCache(model, session, store, save=False)
            found.append(turn(model, other, cache))
            assert_reused(cache, other, 41)
        assert_same(*found)


def test_keys_are_rotated_after_they_are_decoded(tmp_path: Path) -> None:
    found = []
    for tier in ("memory", "disk"):
        with opened(tmp_path / tier, "int8") as store:
            model = make_model()
            settings = {"window": 64, "drop": 0.5}
            first = turn(model, tokens(58), AttentionStoreCache(model, "alice", store, **settings)).sequences
            prompt = follow_up(first, 10, 2)
            ways(tier, store)
            cache = AttentionStoreCache(model, "alice", store, **settings)
            found.append(turn(model, prompt, cache))
            assert cache.stats.rotated_tokens > 0
            assert cache.stats.truncation == "rotated"
    assert_same(*found)


def test_a_lossless_session_beside_lossy_ones(tmp_path: Path) -> None:
    model, reference = make_model(), Reference(make_model())
    with opened(tmp_path, "int8") as store:
        exact = store.with_codec("raw")
        assert exact.with_codec("int8") is store
        assert exact.in_namespace("other").codec == "raw"
        turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
        ours = turn(model, tokens(70), AttentionStoreCache(model, "pinned", exact))
        assert_same(ours, reference.turn(tokens(70)))
        ways("disk", store)
        prompt = follow_up(ours.sequences, 20, 2)
        pinned = AttentionStoreCache(model, "pinned", exact)
        assert_same(turn(model, prompt, pinned), reference.turn(prompt))
        assert_reused(pinned, prompt, 75)
        lossy = AttentionStoreCache(model, "alice", store)
        turn(model, prompt, lossy)
        assert_reused(lossy, prompt, 75)
        store.flush()
        assert (store.session_codec("pinned"), store.session_codec("alice")) == ("raw", "int8")
        assert (pinned.stats.rounded_by, lossy.stats.rounded_by) == ("", "int8")
        assert "int8" in str(lossy.stats)
        assert "int8" not in str(pinned.stats)


def test_what_was_parked_after_rounding_is_not_taken_over_without_loss(tmp_path: Path) -> None:
    model, reference = make_model(), Reference(make_model())
    with AttentionStore(tmp_path, block_size=BLOCK, codec="int8", on_device="64MiB") as store:
        turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
        store.drop_memory()
        prompt = follow_up(reference.turn(tokens(70)).sequences, 20, 2)
        turn(model, prompt, AttentionStoreCache(model, "alice", store))  # parks what came from disk
        assert store.stats()["device_sessions"] == 1
        exact = AttentionStoreCache(model, "alice", store.with_codec("raw"))
        assert_same(turn(model, prompt, exact), turn(make_model(), prompt, None))
        assert_reused(exact, prompt, 0)


def test_rows_of_a_batch_are_what_they_are_alone(tmp_path: Path) -> None:
    model, prompts = make_model(), torch.cat([tokens(70, 1), tokens(70, 2)])
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    with opened(tmp_path, "int8") as store:
        for number, name in enumerate(("alice", "bob")):
            turn(model, prompts[number : number + 1, :66], AttentionStoreCache(model, name, store), max_new_tokens=1)
        found = []
        for tier in ("memory", "disk"):
            ways(tier, store)
            cache = AttentionStoreCache(model, ["alice", "bob"], store, save=False)
            found.append(model.generate(prompts, attention_mask=mask, past_key_values=cache, **settings))
            assert cache.stats.reused_tokens == 2 * 66
            assert cache.stats.rounded_by == "int8"
            assert set(cache.stats.blocks_from) == {tier}
        assert torch.equal(*found)
        for number, name in enumerate(("alice", "bob")):
            alone = AttentionStoreCache(model, name, store, save=False)
            ours = turn(model, prompts[number : number + 1], alone, max_new_tokens=4)
            assert torch.equal(ours.sequences, found[0][number : number + 1])


@pytest.mark.parametrize("codec", ["int8", pytest.param("lossless", marks=needs_zstd)])
def test_what_another_machine_has_written_is_kept_here_as_it_is(codec: str, tmp_path: Path) -> None:
    server = Valkey(tmp_path)
    try:
        model, found = make_model(), []
        with opened(tmp_path / "one", codec, shared=server.patient_url) as one:
            turn(model, tokens(70), AttentionStoreCache(model, "alice", one))
            one.flush()
            prompt = follow_up(tokens(70), 20, 2)
            ways("disk", one)
            found.append(turn(model, prompt, AttentionStoreCache(model, "alice", one, save=False)))
        with opened(tmp_path / "two", codec, shared=server.patient_url) as two:
            for tier in ("shared", "memory", "disk"):
                if tier != "shared":
                    two.flush()
                if tier == "disk":
                    two.drop_memory()
                cache = AttentionStoreCache(model, "alice", two, save=False)
                found.append(turn(model, prompt, cache))
                assert_reused(cache, prompt, 70)
                assert cache.stats.blocks_from == {tier: 5}
        for other in found[1:]:
            assert_same(found[0], other)
        sizes = [
            sorted(path.stat().st_size for path in (tmp_path / name).glob("blocks/*/*/*")) for name in ("one", "two")
        ]
        assert sizes[1] == [size for size in sizes[0] if size in sizes[1]]
        assert len(sizes[1]) == 5
    finally:
        server.kill()


def test_nothing_of_encoder_decoders_is_rounded(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    model = make_seq2seq("t5")
    inputs = encoder_input("t5", 1, 40)
    settings: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    with opened(tmp_path, "int8") as store:
        model.generate(**inputs, past_key_values=AttentionStoreCache(model, "alice", store), **settings)
        ways("disk", store)
        cache = AttentionStoreCache(model, "alice", store)
        ours = model.generate(**inputs, past_key_values=cache, **settings)
        assert torch.equal(ours, make_seq2seq("t5").generate(**inputs, **settings))
        assert cache.stats.encoder_reused == 40
        assert store.stats()["coded_bytes"] == 0
    assert any("are kept as they are" in record.message for record in log.records)


# how it is chosen, and how it is read


def test_the_environment_chooses_where_the_caller_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSTORE_CODEC", "int8")
    with opened(tmp_path, None) as store, opened(tmp_path, "raw") as other:
        assert (store.codec, other.codec) == ("int8", "raw")
    monkeypatch.setenv("ATTNSTORE_CODEC", "int7")
    with pytest.raises(AttentionStoreError, match="'int7' is not known here, only"):
        opened(tmp_path, None)


def test_a_lossy_codec_on_models_that_were_never_measured_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save.say_if_unmeasured.cache_clear()
    for codec in ("raw", "fp16", "int8"):
        with opened(tmp_path / codec, codec) as store:
            for family in ("llama-gqa", "qwen2", "qwen2"):
                AttentionStoreCache(make_model(family), None, store)
    (said,) = [record.getMessage() for record in caplog.records if "not measured" in record.message]
    assert said.startswith("KV of qwen2 is kept with loss")
    assert "attnstore doctor --model … --codec int8" in said


def test_the_reader_in_the_documentation_reads_what_is_written(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    code = re.search(r"```python\n(.*?def read_coded.*?)```", page, re.DOTALL)
    assert code is not None
    scope: dict[str, Callable[..., Any]] = {}
    exec(code[1], scope)
    codecs = ["fp16", "int8", "int4"] + (["int8z", "lossless"] if importlib.util.find_spec("zstandard") else [])
    for codec in codecs:
        model, kept = make_model(), DynamicCache(config=make_model().config)
        turn(make_model(), tokens(BLOCK), kept, max_new_tokens=1)
        with opened(tmp_path / codec, codec) as store:
            turn(model, tokens(BLOCK), AttentionStoreCache(model, "alice", store), max_new_tokens=1)
        (path,) = (tmp_path / codec).glob("blocks/*/*/*")
        for number, layer in enumerate(kept.layers):
            for name, whole in (("keys", layer.keys), ("values", layer.values)):
                label = f"layers.{number}.{name}"
                found = torch.from_numpy(scope["read_coded"](path, label))
                assert torch.equal(found, there_and_back(codec, whole[0], label, start=0))


# a tier's own codec


def written(store: AttentionStore) -> set[str]:
    """Names of what is in the block files of a store."""
    return {name for path in store.path.glob("blocks/**/*.safetensors") for name in load_file(path)}


@needs_zstd
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("tier", ["memory", "disk", "promoted"])
def test_a_disk_with_a_lossless_codec_of_its_own_serves_a_raw_store(tier: str, family: str, tmp_path: Path) -> None:
    model, reference = make_model(family), Reference(make_model(family))
    with opened(tmp_path, "raw", disk_codec="lossless") as store:
        ours = turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
        assert_same(ours, reference.turn(tokens(70)))
        ways(tier, store)
        assert "layers.0.keys.exponents" in written(store)
        assert store.session_codec("alice") == "raw"
        assert not store.is_lossy
        assert store.stats()["lossless_seconds"] > 0
        prompt = follow_up(ours.sequences, 20, 2)
        cache = AttentionStoreCache(model, "alice", store)
        assert_same(turn(model, prompt, cache), reference.turn(prompt))
        assert_reused(cache, prompt, ours.sequences.shape[1] - 1)
        assert not store.verify().problems
    for codec in ("", "raw", "lossless"):  # what is found does not depend on it
        with opened(tmp_path, "raw", disk_codec=codec) as store:
            cache = AttentionStoreCache(model, "alice", store, save=False)
            again = follow_up(prompt, 20, 2)
            turn(model, again, cache)
            assert_reused(cache, again, prompt.shape[1])


@needs_zstd
@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_shared_tier_with_a_lossless_codec_of_its_own(
    codec: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, url = make_model(), empty_server(request)
    with opened(tmp_path / "alone", codec) as alone:
        first = turn(model, tokens(70), AttentionStoreCache(model, "alice", alone))
        second = follow_up(first.sequences, 20, 2)
        third = follow_up(turn(model, second, AttentionStoreCache(model, "alice", alone)).sequences, 20, 3)
        expected = turn(model, third, AttentionStoreCache(model, "alice", alone, save=False))
    with opened(tmp_path / "one", codec) as one:
        turn(model, tokens(70), AttentionStoreCache(model, "alice", one))
    with opened(
        tmp_path / "one", codec, shared=url, shared_codec="lossless"
    ) as one:  # sends from files, and from memory
        turn(model, second, AttentionStoreCache(model, "alice", one))
        one.flush()
        assert "layers.0.keys.exponents" not in written(one)
    server = request.getfixturevalue("server")
    values = [server.value(name) for name in server.keys("*:b:*")]
    assert len(values) >= second.shape[1] // BLOCK
    own = [b"layers.0.keys.exponents" in value for value in values]
    assert all(own) if codec == "raw" else any(own)
    with opened(tmp_path / "two", codec, shared=url) as two:
        cache = AttentionStoreCache(model, "alice", two)
        assert_same(turn(model, third, cache), expected)
        assert set(cache.stats.blocks_from) == {"shared"}
        assert "lossless_seconds" not in two.stats()


def test_a_tiers_own_codec_is_without_loss(tmp_path: Path) -> None:
    with pytest.raises(AttentionStoreError, match="would depend on where its KV"):
        opened(tmp_path, "raw", disk_codec="int8")
    with pytest.raises(AttentionStoreError, match="'zip' is not known"):
        opened(tmp_path, "raw", shared_codec="zip")
