"""Every model family of transformers with the store: bit for bit as with a DynamicCache that was kept in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import fresh
from support.tiny_families import crash, dawdle, well
from typer.testing import CliRunner

from hf_attnstore import AttentionStoreCache
from hf_attnstore.cache.hooks import Attachment
from hf_attnstore.cache.probing.continuing import is_verified
from hf_attnstore.cli.app import app
from hf_attnstore.lab.families import scenarios
from hf_attnstore.lab.families.attached import run_attached
from hf_attnstore.lab.families.feeding import feed_whole, some_ids
from hf_attnstore.lab.families.others import others
from hf_attnstore.lab.families.reference import examine
from hf_attnstore.lab.families.report import markdown, variants_in_words, write, write_verified
from hf_attnstore.lab.families.sweep import (
    FAILED,
    NOT_BUILT,
    OUTSIDE,
    SAME,
    WRONG,
    Row,
    examine_family,
    examine_with_variants,
    sweep,
)
from hf_attnstore.lab.families.tiny import build, families
from hf_attnstore.lab.families.variants import examine_variants

SAMPLE = (
    "llama",  # full attention
    "mistral",  # sliding windows
    "gemma3_text",  # both
    "gemma4_text",  # and layers that use the KV of others
    "gpt2",  # learned positions
    "bloom",  # ALiBi
    "deepseek_v3",  # MLA
    "glm_moe_dsa",  # MLA with an indexer
    "deepseek_v4",  # compressed attention, kinds of its own
    "llama4_text",  # chunks
    "mamba2",  # running states only
    "qwen3_next",  # Gated DeltaNet and full attention
    "lfm2",  # convolutions and full attention
    "falcon_h1",  # both in every layer
    "zaya",  # the same with a sliding window
    "kimi_linear",  # Kimi Delta Attention and MLA
)
OUT = {
    "mamba": "one by one",
    "jamba": "one by one",
    "doge": "tokens that come later",
    "moshi": "logits differ",
    "openai-gpt": "takes no cache",
    "rwkv": "a name of its own",
}
"""Families that no DynamicCache continues, and what is to be said of them."""
FEWEST_REFERENCES = 120
FEWEST_TWINS, FEWEST_HEADS = 100, 150
UNEVEN = ("mllama",)  # a reference of which nothing is kept, as its layers hold other numbers of tokens


def needs(family: str) -> None:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_gives_the_logits_of_a_kept_dynamic_cache(family: str) -> None:
    needs(family)
    row = examine_family(family)
    assert row.reference, row.reason
    assert row.verdict == SAME, row.reason
    assert row.reuse in ("token", "checkpoint")


@pytest.mark.parametrize("family", OUT)
def test_a_family_that_nothing_continues_has_its_reason_and_no_wrong_token(family: str) -> None:
    needs(family)
    row = examine_family(family)
    assert not row.reference
    assert OUT[family] in row.reason
    assert row.verdict == OUTSIDE, row.reason


@pytest.mark.parametrize("family", ["llama", "mamba2", "gemma3n_text", "qwen4_exp_text"])
def test_equal_seeds_give_equal_models(family: str) -> None:
    needs(family)
    one, two, other = build(family), build(family), build(family, seed=1)
    ids = some_ids(30, 1)
    assert not one.training
    assert sum(p.numel() for p in one.parameters()) < 600_000
    assert all(p.dtype == torch.float32 for p in one.parameters())
    assert torch.equal(feed_whole(one, ids), feed_whole(two, ids))
    assert not torch.equal(feed_whole(one, ids), feed_whole(other, ids))


def test_a_cache_that_loses_a_token_is_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import DynamicLayer

    model, update = build("llama"), DynamicLayer.update

    def forgetful(self: DynamicLayer, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        both = update(self, keys, values, *rest, **kwargs)
        self.keys[:, :, 3] = 0
        return both

    assert examine(model).continues
    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    found = examine(model)
    assert not found.continues
    assert "logits differ" in found.reason


class Forgetful(AttentionStoreCache):
    """Saves nothing."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "save": False})


class Damaging(AttentionStoreCache):
    """Changes a key a little, in every turn that takes up an earlier one."""

    def begin_turn(self, *args: Any, **kwargs: Any) -> int:
        reused = super().begin_turn(*args, **kwargs)
        if reused:
            keys = self.layers[0].keys
            assert keys is not None
            keys[..., 5, :] += 1e-3
        return reused


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (Forgetful, "after a restart: reused 0 tokens instead of 46"),
        (Damaging, "second turn.*: the logits of step 0 differ"),
        (Damaging, "after a restart: the logits of step 0 differ"),
        (Damaging, "exact repeat: the logits of step 0 differ"),
    ],
)
def test_a_store_that_is_wrong_gives_another_verdict(
    broken: type[AttentionStoreCache], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenarios, "AttentionStoreCache", broken)
    row = examine_family("llama")
    assert row.reference
    assert row.verdict == WRONG
    assert re.search(rf"\b{complaint}", row.reason), row.reason


def test_a_family_can_neither_hang_nor_end_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    # workers are forked from one process that has imported what they need
    multiprocessing.set_forkserver_preload(["hf_attnstore.lab.families.sweep", "transformers.generation"])
    forking = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forking)
    rows = sweep(["bloom", "gpt2", "llama"], workers=2, work=crash)
    assert [row.family for row in rows] == ["bloom", "gpt2", "llama"]
    assert [row.verdict for row in rows] == [SAME, FAILED, SAME]
    assert "its process ended" in rows[1].reason
    rows = sweep(["gpt2", "llama"], workers=1, limit=3, work=dawdle)
    assert [row.verdict for row in rows] == [FAILED, SAME]
    assert "took longer than 3 seconds" in rows[0].reason


def test_the_page_and_the_data_say_the_same(tmp_path: Path) -> None:
    rows = [well("llama"), Row("mamba", "MambaForCausalLM", verdict=OUTSIDE, reason="a | b <c>")]
    data = write(rows, tmp_path / "docs" / "models.md")
    page = (tmp_path / "docs" / "models.md").read_text()
    assert page == markdown(rows)
    assert "| mamba |  |  |  |  | outside | a \\| b &lt;c> |" in page
    assert "2 families, 1 of them references" in page
    listed = json.loads(data.read_text())["families"]
    assert [(row["family"], row["verdict"]) for row in listed] == [("llama", SAME), ("mamba", OUTSIDE)]


def test_what_was_verified_is_what_was_the_same_token_by_token(tmp_path: Path) -> None:
    rows = [
        Row("llama", "L", reference=True, reuse="token", verdict=SAME),
        Row("mamba2", "M", reference=True, reuse="checkpoint", verdict=SAME),
        Row("gpt2", "G", reference=True, reuse="token", verdict=WRONG),
        Row("t5 (encoder-decoder)", "T", reference=True, reuse="token", verdict=SAME),
    ]
    assert json.loads(write_verified(rows, tmp_path / "verified.json").read_text())["classes"] == {"llama": "L"}
    assert is_verified(build("llama"), 2)
    assert not is_verified(build("mamba2"), 2)


@pytest.mark.parametrize("family", ["t5 (encoder-decoder)", "whisper (encoder-decoder)"])
def test_an_encoder_decoder_is_in_the_table(family: str) -> None:
    row = examine_family(family)
    assert (row.verdict, row.reuse, row.reason) == (SAME, "token", "")


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    done = CliRunner().invoke(app, ["models", "--family", "llama", "--output", str(page), "--workers", "1", "--check"])
    assert done.exit_code == 0, done.output
    assert "| llama | 2 × full_attention | token | rotated | kept | same |  |" in page.read_text()
    wrong = CliRunner().invoke(app, ["models", "--family", "no-such"])
    assert wrong.exit_code == 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_family_is_as_it_should_be() -> None:
    names = [*families(), *others()]
    rows = sweep(names, workers=os.cpu_count() or 1, limit=600, work=examine_with_variants)
    assert {row.family for row in rows} == set(names)
    bad = [f"{row.family}: {row.verdict} ({row.reason})" for row in rows if not row.well and row.family not in UNEVEN]
    bad += [line for row in rows for line in variants_in_words(row)]
    assert not bad, "\n".join(bad)
    twins = [variant for row in rows for variant in row.variants if variant.kind == "bidirectional"]
    assert len(twins) >= FEWEST_TWINS
    assert not any(variant.verdict == "reused" for variant in twins)
    assert sum(v.verdict == "reused" for row in rows for v in row.variants) >= FEWEST_HEADS
    assert sum(row.attached == "kept" for row in rows) >= FEWEST_REFERENCES
    assert all(row.reason for row in rows if row.verdict in (OUTSIDE, NOT_BUILT))
    assert sum(row.reference for row in rows) >= FEWEST_REFERENCES


@pytest.mark.parametrize(("family", "how"), [("llama", "kept"), ("openai-gpt", "as without"), ("qwen3_next", "kept")])
def test_plain_generate_with_a_store_attached_is_in_the_table(family: str, how: str) -> None:
    needs(family)
    assert examine_family(family).attached == how


@pytest.mark.parametrize("family", others())
def test_a_family_with_a_generate_of_its_own_kind_runs_as_without(family: str) -> None:
    row = examine_family(family)
    assert (row.verdict, row.well) == (OUTSIDE, True), row.reason
    assert row.attached in ("kept", "as without")


def test_other_heads_are_reused_and_twins_that_see_ahead_are_not() -> None:
    found = {(v.kind, v.model_class): v.verdict for v in examine_variants("llama")}
    assert found == {
        ("base", "LlamaModel"): "reused",
        ("sequence classification", "LlamaForSequenceClassification"): "reused",
        ("token classification", "LlamaForTokenClassification"): "reused",
        ("question answering", "LlamaForQuestionAnswering"): "reused",
        ("bidirectional", "LlamaForCausalLM"): "not kept",
    }
    assert [v.verdict for v in examine_variants("roformer") if v.kind == "bidirectional"] == ["not kept", "not kept"]


def test_a_twin_that_is_reused_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attachment, "is_verified", lambda *_: True)
    found = [v for v in examine_variants("llama") if v.kind == "bidirectional"]
    assert [v.verdict for v in found] == ["wrong"]
    assert "WRONG TOKENS" in found[0].reason


def test_tokens_that_change_under_attach_are_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begin_turn = AttentionStoreCache.begin_turn

    def damaged(self: AttentionStoreCache, *args: Any, **kwargs: Any) -> int:
        reused = begin_turn(self, *args, **kwargs)
        if reused:
            for layer in self.layers:
                assert layer.values is not None
                layer.values.neg_()
        return reused

    monkeypatch.setattr(AttentionStoreCache, "begin_turn", damaged)
    how, problems = run_attached(build("llama"), build("llama"), tmp_path)
    assert how == "kept"
    assert "attached, the same again: WRONG TOKENS, other than those of plain generate" in problems


def test_the_page_of_kinds_is_what_the_command_writes() -> None:
    page = (Path(__file__).parent.parent / "docs" / "results" / "kinds.md").read_text()
    if f"transformers {transformers.__version__}," not in page:
        pytest.skip("the page is of another transformers")
    # in another process, as tests may have changed what classes come with
    code = "from hf_attnstore.lab.families.kinds import kinds, markdown; print(markdown(kinds()), end='')"
    assert fresh.run([sys.executable, "-c", code], check=True).stdout == page
    rows = page[page.index("|---|---|---|") :].splitlines()[1:]
    kept = dict(row.removeprefix("| ").split(" | ")[:2] for row in rows)
    assert kept["llama"] == "by token"
    assert kept["qwen3_next"] == kept["rwkv"] == "by checkpoint"
    assert kept["bert"] == kept["deberta"] == "whole inputs"
    assert kept["xlnet"] == kept["vit"] == "not"
    assert len(rows) == len(kept) > 500
