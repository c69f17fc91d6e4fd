"""A codec is a class that the block format dispatches on: what it writes, what comes back, and who finds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import BLOCK, make_model, tokens
from support.turns import assert_reused, assert_same, follow_up, turn
from transformers import DynamicCache

from hf_attnstore import AttentionStore, AttentionStoreCache, AttentionStoreError
from hf_attnstore.store.blocks import codecs
from hf_attnstore.store.blocks.block import BlockMeta
from hf_attnstore.store.store import repair_store


class Halves:
    """float32 in 16 bits."""

    name: ClassVar[str] = "halves"
    lossy: ClassVar[bool] = True
    stacks: ClassVar[bool] = True

    def encode(self, name: str, tensor: torch.Tensor, meta: BlockMeta) -> Mapping[str, torch.Tensor] | None:
        if meta.token_count < BLOCK or meta.state is not None:
            return None  # a short block is written again soon
        return {"halves": tensor.half()}

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        out.copy_(parts["halves"])


class Planes:
    """The four bytes of a float32 apart."""

    name: ClassVar[str] = "planes"
    lossy: ClassVar[bool] = False
    stacks: ClassVar[bool] = False

    def encode(self, name: str, tensor: torch.Tensor, meta: BlockMeta) -> Mapping[str, torch.Tensor] | None:
        raw = tensor.view(torch.uint8).view(*tensor.shape, 4)
        return {str(place): raw[..., place].contiguous() for place in range(4)}

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        raw = torch.stack([parts[str(place)] for place in range(4)], dim=-1)
        out.copy_(raw.view(torch.float32).squeeze(-1))


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "_codecs", dict(codecs._codecs))
    codecs.register(Halves())
    codecs.register(Planes())
    monkeypatch.setenv("ATTNSTORE_GATE", "off")


def opened(folder: Path, codec: str = "raw", **settings: object) -> AttentionStore:
    return AttentionStore(folder, block_size=BLOCK, codec=codec, **settings)  # type: ignore[arg-type]


def first_turn(folder: Path, codec: str) -> torch.Tensor:
    """A turn of 70 tokens, of whose answer of 6 the last is not fed. Returns the next prompt."""
    model = make_model()
    with opened(folder, codec) as store:
        ours = turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
        assert_same(ours, turn(make_model(), tokens(70), None))
    return follow_up(ours.sequences, 20, 2)


def block_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("blocks/*/*/*"))


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_a_lossless_codec_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    model, plain = make_model(family), make_model(family)
    reference = DynamicCache(config=plain.config)
    with opened(tmp_path, "planes") as store:
        ours = turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
        assert_same(ours, turn(plain, tokens(70), reference))
        store.drop_memory()
        prompt = follow_up(ours.sequences, 20, 2)
        cache = AttentionStoreCache(model, "alice", store)
        assert_same(turn(model, prompt, cache), turn(plain, prompt, reference))
        assert_reused(cache, prompt, 75)
        assert cache.stats.blocks_from == {"disk": 5}
        assert store.verify().problems == []
    files = [load_file(path) for path in tmp_path.glob("blocks/*/*/*")]
    assert all(("layers.0.keys.3" in held) == (len(held["token_ids"]) == BLOCK) for held in files)  # short ones are not


def test_a_lossy_codec_halves_the_files_and_gives_what_16_bits_give(tmp_path: Path) -> None:
    prompt = first_turn(tmp_path / "halves", "halves")
    first_turn(tmp_path / "raw", "raw")
    assert block_bytes(tmp_path / "halves") < 0.75 * block_bytes(tmp_path / "raw")
    model, plain = make_model(), make_model()
    reference = DynamicCache(config=plain.config)
    turn(plain, tokens(70), reference)
    for layer in reference.layers:  # 64 of the 75 tokens are in whole blocks
        for kept in (layer.keys, layer.values):
            kept[:, :, :64] = kept[:, :, :64].half().float()
    with opened(tmp_path / "halves", "halves") as store:
        cache = AttentionStoreCache(model, "alice", store)
        ours = turn(model, prompt, cache)
        assert_reused(cache, prompt, 75)
        assert_same(ours, turn(plain, prompt, reference))
        assert not torch.equal(ours.logits[0], turn(make_model(), prompt, None).logits[0])
        store.promote([span.block for span in store.manifest("alice").spans])
        store.flush()
        again = AttentionStoreCache(model, "alice", store, save=False)
        turn(model, prompt, again)  # and from memory, into which blocks were decoded
        assert again.stats.blocks_from.keys() == {"memory"}


def test_a_part_of_a_coded_block_is_put_in_its_place(tmp_path: Path) -> None:
    prompt = first_turn(tmp_path, "planes")
    other = torch.cat([prompt[:, :41], tokens(20, 3)], dim=1)  # parts with what is known within a block
    model = make_model()
    with opened(tmp_path, "planes") as store:
        cache = AttentionStoreCache(model, "bob", store)
        assert torch.equal(turn(model, other, cache).sequences, turn(make_model(), other, None).sequences)
        assert_reused(cache, other, 41)
        assert cache.stats.blocks_from == {"disk": 3}


def test_blocks_of_two_codecs_live_in_one_store_and_never_meet(tmp_path: Path) -> None:
    prompt = first_turn(tmp_path, "halves")
    model = make_model()
    with opened(tmp_path, "raw") as store:
        cache = AttentionStoreCache(model, "bob", store)
        assert_same(turn(model, prompt, cache), turn(make_model(), prompt, None))
        assert_reused(cache, prompt, 0)
        assert store.verify().problems == []
        assert len(store.tokens("alice")) == 75
    with opened(tmp_path, "halves") as store:
        cache = AttentionStoreCache(model, "alice", store, save=False)
        turn(model, prompt, cache)
        assert cache.reused_tokens == 75
        exported = store.export_session("alice", tmp_path / "alice.safetensors")
        store.delete("alice")
        assert store.import_session(tmp_path / "alice.safetensors").tokens == exported.tokens == 75
        store.drop_memory()
        cache = AttentionStoreCache(model, "alice", store, save=False)
        turn(model, prompt, cache)
        assert cache.reused_tokens == 75
    (tmp_path / "index.sqlite").unlink()
    with opened(tmp_path, "raw") as store:  # made anew from files of both
        assert store.verify().problems == []
        assert {session.name for session in store.sessions()} == {"alice", "bob"}


def test_without_its_codec_a_block_is_left_alone(tmp_path: Path) -> None:
    first_turn(tmp_path, "halves")
    del codecs._codecs["halves"]
    with pytest.raises(AttentionStoreError, match="'halves' is not known here, only"):
        opened(tmp_path / "other", "halves")
    assert repair_store(tmp_path).problems == []
    with opened(tmp_path) as store:
        block = store.manifest("alice").spans[0].block
        assert store.describe(block)["layers.0.keys"].dtype == torch.float32
        store.promote([block])
        store.flush()
        assert store.stats()["memory_blocks"] == 0
        assert store.stats()["rejected"] == 0
    assert len(list(tmp_path.glob("blocks/*/*/*"))) == 5


def test_an_encrypted_store_codes_too(tmp_path: Path) -> None:
    model = make_model()
    with opened(tmp_path, "planes", encryption_key=b"k" * 32) as store:
        ours = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
        store.drop_memory()
        prompt = follow_up(ours, 20, 2)
        cache = AttentionStoreCache(model, "alice", store)
        assert torch.equal(turn(model, prompt, cache).sequences, turn(make_model(), prompt, None).sequences)
        assert_reused(cache, prompt, 75)
