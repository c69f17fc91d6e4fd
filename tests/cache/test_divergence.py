"""Why so little of a prompt was reused: where it parts from what is known, and what stands there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import APPEND_ONLY, TEXT, tiny_model, tiny_tokenizer
from support.tiny_models import make_llama, make_model, tokens
from support.turns import follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, ChatSession, attach, detach
from hf_attnstore.cache.divergence import Divergence
from hf_attnstore.cache.identity.model_parts import described, difference

KEY = "ab" * 32


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama-gqa")


@pytest.fixture(autouse=True)
def left_alone(model: Any) -> Iterator[None]:
    yield
    detach(model)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="hf_attnstore"):
        yield caplog


def changed(ids: torch.Tensor, place: int) -> torch.Tensor:
    other = ids.clone()
    other[0, place] = (other[0, place] + 7) % 90 + 8
    return other


def parted(cache: AttentionStoreCache) -> Divergence:
    found = cache.stats.diverged
    assert found is not None
    return found


@pytest.mark.parametrize("place", [0, 1, 8, 16, 31, 40, 99])
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_the_place_and_what_stands_there_are_known_of_a_session(
    model: Any, tmp_path: Path, place: int, key: str | None, told: pytest.LogCaptureFixture
) -> None:
    first = tokens(120, 1)
    with AttentionStore(tmp_path / "store", block_size=16, encryption_key=key) as store:
        turn(model, first, AttentionStoreCache(model, "alice", store))
    with AttentionStore(tmp_path / "store", block_size=16, encryption_key=key) as store:
        ids = changed(first, place)
        cache = AttentionStoreCache(model, "alice", store)
        turn(model, ids, cache)
        found = parted(cache)
        assert (found.agreed, found.prompt_tokens, found.session) == (place, 120, "alice")
        assert cache.reused_tokens == place
        count = min(16, 120 - place)
        assert found.here == tuple(ids[0, place : place + count].tolist())
        assert found.there[:count] == tuple(first[0, place : place + count].tolist())
        assert cache.stats.missed == "other text"
        said = (
            f"agrees up to token {place} of 120; then {list(found.here[:4])} where 'alice' had {list(found.there[:4])}"
        )
        assert said in str(cache.stats)
        assert said in told.text


def test_without_a_name_it_is_the_text_that_agrees_furthest(model: Any, store: AttentionStore) -> None:
    first = tokens(120, 1)
    turn(model, changed(first, 20), AttentionStoreCache(model, "bob", store))
    turn(model, first, AttentionStoreCache(model, "alice", store))
    for place in (48, 70):  # at the end of a block, where nothing of the next one agrees, and within one
        cache = AttentionStoreCache(model, None, store)
        turn(model, changed(first, place), cache)
        assert (parted(cache).agreed, parted(cache).session) == (place, "alice")
        assert parted(cache).there[0] == int(first[0, place])
    store.flush()
    store.delete("alice")
    turn(model, tokens(120, 5), AttentionStoreCache(model, None, store))
    cache = AttentionStoreCache(model, None, store)
    turn(model, changed(tokens(120, 5), 50), cache)
    assert (parted(cache).agreed, parted(cache).session) == (50, None)
    assert "where another text had" in str(cache.stats)


def test_what_goes_on_after_all_that_is_known_has_not_parted(model: Any, store: AttentionStore) -> None:
    first = turn(model, tokens(120, 1), AttentionStoreCache(model, "alice", store)).sequences
    for ids in (follow_up(first, 80, 2), first[:, :60], first):  # goes on, taken back, again
        cache = AttentionStoreCache(model, "alice", store)
        turn(model, ids, cache)
        assert cache.stats.diverged is None
        assert cache.stats.missed == ""
        assert cache.reused_tokens >= min(ids.shape[1], 125) - 1
    cache = AttentionStoreCache(model, "carol", store)
    turn(model, tokens(120, 9), cache)  # nothing in common with anything
    assert cache.stats.diverged is None


def test_nobody_asks_where_little_is_new(model: Any, store: AttentionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokens(120, 1)
    turn(model, first, AttentionStoreCache(model, "alice", store))
    asked: list[str] = []
    latest = store.latest_manifest
    monkeypatch.setattr(store, "latest_manifest", lambda name: (asked.append(name), latest(name))[1])
    cache = AttentionStoreCache(model, "alice", store)
    turn(model, changed(first, 112), cache)
    assert cache.reused_tokens == 112
    assert asked == []
    turn(model, changed(first, 30), AttentionStoreCache(model, "alice", store))
    assert set(asked) == {"alice"}


@pytest.mark.parametrize("name", ["alice", None])
def test_a_first_token_twice_or_missing_is_named(model: Any, store: AttentionStore, name: str | None) -> None:
    model.config.bos_token_id = 5
    try:
        text = tokens(100, 3).clamp_min(8)
        bos = torch.tensor([[5]])
        turn(model, torch.cat([bos, text], dim=1), AttentionStoreCache(model, "alice", store))
        for ids, agreed in ((torch.cat([bos, bos, text], dim=1), 1), (text, 0)):
            cache = AttentionStoreCache(model, name, store, save=False)
            turn(model, ids, cache)
            assert (parted(cache).agreed, parted(cache).cause, parted(cache).session) == (
                agreed,
                "first token",
                "alice",
            )
            assert "BOS" in str(cache.stats)
    finally:
        model.config.bos_token_id = None


def test_kv_that_is_gone_is_said(model: Any, tmp_path: Path) -> None:
    first = tokens(200, 1)
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        turn(model, first, AttentionStoreCache(model, "alice", store))
        store.flush()
        rows = [row for row in store._disk.index.blocks() if row.start >= 96]
        gone = [row.key for row in sorted(rows, key=lambda row: -row.start)]
        store._memory.delete(gone)
        store._disk.delete(gone)
        cache = AttentionStoreCache(model, "alice", store)
        turn(model, first, cache)
        assert cache.reused_tokens == 96
        assert (parted(cache).agreed, parted(cache).cause, parted(cache).there) == (96, "gone", ())
        assert "agrees up to token 96 of 200 with 'alice' (from there on its KV is not in the store)" in str(
            cache.stats
        )
        assert cache.stats.missed == "not in the store"


def test_another_model_is_no_other_text(model: Any, store: AttentionStore) -> None:
    turn(model, tokens(120, 1), AttentionStoreCache(model, "alice", store))
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    try:
        cache = AttentionStoreCache(model, "alice", store)
        turn(model, changed(tokens(120, 1), 30), cache)
        assert cache.reused_tokens == 0
        assert (cache.stats.diverged, cache.stats.missed) == (None, "other model")
    finally:
        with torch.no_grad():
            model.model.norm.weight[0] -= 0.5


def test_plain_generate_says_it_in_the_log(model: Any, store: AttentionStore, told: pytest.LogCaptureFixture) -> None:
    attach(model, store)
    first = tokens(120, 1)
    for ids in (first, changed(first, 44)):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert "agrees up to token 44 of 120" in told.text


# in words


def divergence(before: str, here: str, there: str) -> Divergence:
    """Characters as tokens."""
    ids = [tuple(map(ord, text)) for text in (before, here, there)]
    parts = Divergence(len(before), len(before + here), "alice", ids[1], ids[2], ids[0])
    return parts.in_text(lambda some: "".join(map(chr, some)))


@pytest.mark.parametrize(
    ("before", "here", "there", "cause", "words"),
    [
        ("Today: ", "30 Nov 2026.", "29 Nov 2026.", "date", ("30 Nov", "29 Nov")),
        ("at 2026-11-", "30 it was", "29 it was", "date", ("2026-11-30 it", "2026-11-29 it")),
        ("It is 10:", "31 now, so", "32 now, so", "date", ("10:31 now,", "10:32 now,")),
        ("On ", "Monday we go", "Friday we go", "date", ("Monday we", "Friday we")),
        ("I have ", "3 apples, all", "4 apples, all", "", ("3 apples,", "4 apples,")),
        ("the ma", "rch was on", "n was on", "", ("march was", "man was")),
        ("<|a|>", "Yes, it is", "<think>\nHm, well", "reasoning", None),
        ("<|a|>", "<think>\n\n</think>\n\nYes", "Yes, it is so", "reasoning", None),
    ],
)
def test_causes_are_named_and_words_are_whole(
    before: str, here: str, there: str, cause: str, words: tuple[str, str] | None
) -> None:
    found = divergence(before, here, there)
    assert found.cause == cause
    if words is not None:
        assert (found.here_text, found.there_text) == words
        assert f"then {words[0]!r} where 'alice' had {words[1]!r}" in str(found)


def test_the_same_text_in_other_tokens_is_named() -> None:
    words = {1: "say ", 2: "hel", 3: "lo th", 4: "hello", 5: " there", 6: "ere and more", 7: " and more"}
    found = Divergence(1, 9, None, (2, 3, 6), (4, 5, 7), (1,)).in_text(lambda ids: "".join(words[n] for n in ids))
    assert found.cause == "tokenisation"
    assert "the same text in other tokens" in str(found)


def test_a_chat_says_it_in_words(store: AttentionStore, told: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer(APPEND_ONLY)
    model = tiny_model(tokenizer)
    rest = " ".join(TEXT)
    for day in ("Monday", "Friday"):
        chat = ChatSession(model, tokenizer, store, "alice", f"Today is {day} and {rest}", max_new_tokens=4)
        chat.send("what did he say?")
    assert chat.stats is not None
    found = chat.stats.cache.diverged
    assert found is not None
    assert (found.session, found.cause) == ("alice", "date")
    assert (found.here_text, found.there_text) == ("Friday and", "Monday and")
    assert "then 'Friday and' where 'alice' had 'Monday and'" in str(chat.stats)
    assert "then 'Friday and' where 'alice' had 'Monday and'" in told.text


@pytest.mark.parametrize("what", ["weights", "settings"])
def test_which_part_of_a_model_changed_is_said(tmp_path: Path, what: str) -> None:
    ids = tokens(120, 1)
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        before = make_llama()
        turn(before, ids, AttentionStoreCache(before, "alice", store))
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        after = make_llama(rms_norm_eps=1e-3) if what == "settings" else make_llama()
        if what == "weights":
            with torch.no_grad():
                after.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        cache = AttentionStoreCache(after, "alice", store)
        turn(after, ids, cache)
        assert (cache.reused_tokens, cache.prefilled_tokens) == (0, 120)
        assert cache.stats.missed == "other model"
        named = {
            "weights": "other weights: model.layers.1.mlp.up_proj.weight)",
            "settings": "other settings: config.rms_norm_eps was 1e-06, now 0.001)",
        }
        assert named[what] in cache.stats.recomputed


def test_of_many_tensors_those_of_one_module_are_told_together() -> None:
    many = {f"layers.{n // 10}.experts.{n % 10}.weight": f"{n:08x}" for n in range(3000)}
    first = described("{}", many)
    assert 100 < len(first["tensors"]) <= 2000
    assert difference(first, described("{}", many)) == ""
    other = described('{"a": {"b": 1}}', {**many, "layers.7.experts.3.weight": "x"})
    assert difference(first, other) == "other settings: a.b was not there, now 1; other weights: layers.7.experts"
    assert difference(None, other) == difference({"settings": 3}, other) == ""
