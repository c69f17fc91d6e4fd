"""The numbers of a turn: when its first token came, and the line that says all of it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tokens
from transformers.generation.streamers import BaseStreamer

from hf_attnstore import AttentionStore, AttentionStoreCache, TurnStats, attach
from hf_attnstore.cache.costs import gate
from hf_attnstore.lab.families.encoder_decoders import encoder_input, make_seq2seq
from hf_attnstore.lab.families.tiny import build
from hf_attnstore.sizes import format_seconds
from hf_attnstore.store.transfer.load_stats import LoadStats

NEW: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 1}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


class Clock(BaseStreamer):
    """Notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def test_the_first_token_is_timed_when_there_is_one(model: Any, store: AttentionStore) -> None:
    clock = Clock()
    cache = AttentionStoreCache(model, store=store)
    model.generate(tokens(20, 1), past_key_values=cache, streamer=clock, **NEW)
    _, first, second, *_ = clock.times  # the prompt comes before them
    assert cache.stats.ttft_seconds is not None
    assert first <= cache._turn.began + cache.stats.ttft_seconds <= second
    assert clock.times[-1] <= cache._turn.began + cache.stats.seconds <= time.perf_counter()


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 1, "min_new_tokens": 1}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}],
    ids=["one token", "beams", "drafts"],
)
def test_it_is_timed_in_every_way_to_generate(model: Any, store: AttentionStore, settings: dict[str, Any]) -> None:
    for _ in range(2):
        cache = AttentionStoreCache(model, store=store)
        model.generate(tokens(20, 1), past_key_values=cache, **{**NEW, **settings})
        assert cache.stats.ttft_seconds is not None
        assert 0 < cache.stats.ttft_seconds <= cache.stats.seconds


def test_a_batch_has_the_time_of_all_its_rows(model: Any, store: AttentionStore) -> None:
    for settings in ({}, {"max_new_tokens": 1, "min_new_tokens": 1}):
        cache = AttentionStoreCache(model, session=["a", "b"], store=store)
        model.generate(tokens(20, 1).repeat(2, 1), past_key_values=cache, **{**NEW, **settings})
        assert cache.stats.ttft_seconds is not None
        assert 0 < cache.stats.ttft_seconds <= cache.stats.seconds
        assert cache.stats.prompt_tokens == 40


@pytest.mark.parametrize("count", [1, 4])
def test_an_encoder_is_part_of_the_time(store: AttentionStore, count: int) -> None:
    model = make_seq2seq("bart")
    for _ in range(2):
        cache = AttentionStoreCache(model, session="a", store=store)
        model.generate(
            **encoder_input("bart"), past_key_values=cache, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        assert cache.stats.ttft_seconds is not None
        assert 0 < cache.stats.ttft_seconds <= cache.stats.seconds
    assert "encoder skipped" in str(cache.stats)


def test_a_loop_of_ones_own_has_no_first_token(model: Any, store: AttentionStore) -> None:
    cache = AttentionStoreCache(model, session="a", store=store)
    with torch.no_grad():
        model(input_ids=tokens(20, 1), past_key_values=cache)
        model(input_ids=tokens(1, 2), past_key_values=cache)
    cache.save()
    assert cache.stats.ttft_seconds is None
    assert cache.stats.seconds > 0
    assert "first token" not in str(cache.stats)


def test_a_turn_in_words(model: Any, store: AttentionStore) -> None:
    ids = tokens(20, 1)
    for _ in range(2):
        store.drop_memory()
        cache = AttentionStoreCache(model, session="a", store=store)
        model.generate(ids, past_key_values=cache, **NEW)
        line = str(cache.stats).split(", ")
        if not cache.reused_tokens:
            assert line[:2] == ["reused 0 of 20 tokens", "prefilled 20"]
            assert len(line) == 3
    assert line[:2] == ["reused 19 of 20 tokens", "prefilled 1"]
    assert line[2].startswith("loaded ")
    assert line[2].endswith("from disk")
    assert line[3] == f"first token after {format_seconds(cache.stats.ttft_seconds)}"


def test_what_was_not_reused_is_said_with_its_reason() -> None:
    stats = TurnStats(prompt_tokens=5000, reused_tokens=1000, prefilled_tokens=2000, dropped_tokens=2000)
    stats.truncation, stats.recomputed = "recomputed", "a load failed"
    assert str(stats) == (
        "reused 1,000 of 5,000 tokens, prefilled 2,000, 2,000 out of the window (the kept ones computed again) "
        "(not more: a load failed)"
    )
    stats.truncation = "rotated"
    assert "2,000 out of the window (kept keys rotated)" in str(stats)


def test_loads_of_one_turn_add_up() -> None:
    stats = TurnStats()
    stats.add_load(LoadStats(bytes=100, seconds=0.5, blocks_from=Counter(disk=2)), 0.25)
    stats.add_load(LoadStats(bytes=20, seconds=0.25, blocks_from=Counter(disk=1, memory=3)), 0.25)
    assert (stats.loaded_bytes, stats.load_seconds, stats.exposed_load_seconds) == (120, 0.75, 0.5)
    assert stats.blocks_from == {"disk": 3, "memory": 3}


def test_a_new_process_knows_what_computing_takes_from_the_first_forward_of_others(
    model: Any, store: AttentionStore
) -> None:
    ids = tokens(200, 1)
    for turn in range(2):
        gate.forget()  # as in a process that has just begun
        store.flush()
        cache = AttentionStoreCache(model, session="a", store=store)
        ids = torch.cat([model.generate(ids, past_key_values=cache, **NEW), tokens(5, turn)], dim=1)
        if not turn:
            assert cache.stats.recompute_seconds == cache.stats.ttft_seconds
            assert "computing" not in str(cache.stats)
    assert cache.reused_tokens == 203
    assert cache.stats.recompute_seconds is not None
    assert f"computing it all takes about {format_seconds(cache.stats.recompute_seconds)}" in str(cache.stats)


def test_running_states_say_which_checkpoint_was_the_last(store: AttentionStore) -> None:
    model = build("mamba")
    ids = tokens(40, 1)
    for _ in range(2):
        cache = AttentionStoreCache(model, session="a", store=store)
        model.generate(ids, past_key_values=cache, **NEW)
        ids = torch.cat([ids[:, :30], tokens(20, 2)], dim=1)
    stats = cache.stats
    assert stats.reused_tokens < stats.matched_tokens - 1
    assert stats.diverged is None or str(stats.diverged) in stats.why_not_more
    stats.diverged, stats.recomputed = None, ""
    assert stats.why_not_more == (
        f"{stats.matched_tokens} are known, but the last checkpoint of running states is at {stats.reused_tokens}"
    )


def test_the_handle_of_attach_says_what_the_last_turn_and_all_of_them_were(
    store: AttentionStore, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = build("llama"), tokens(20, 1)
    plain = model.generate
    with caplog.at_level(logging.INFO, logger="hf_attnstore"), attach(model, store) as attached:
        assert attached.last is None
        answers = [model.generate(ids, **NEW) for _ in range(3)]
        assert attached.last is not None
        assert (attached.last.reused_tokens, attached.last.prefilled_tokens) == (19, 1)
        assert f"generate: {attached.last}" in caplog.text
        model.generate(ids.repeat(2, 1), **NEW)
        assert attached.last.prompt_tokens == 40
        model.generate(ids, use_cache=False, **NEW)
        assert attached.last.why_not_more == "use_cache=False"
        totals = attached.totals
        assert (totals.turns, totals.prompt_tokens, totals.reused_tokens) == (5, 120, 19 * 4)
        assert totals.prefilled_tokens == 20 + 1 + 1 + 2 + 20
        assert "5 turns: reused 76 of 120 tokens, prefilled 44" in str(totals)
    assert model.generate == plain
    assert all(torch.equal(answers[0], answer) for answer in answers)
    assert torch.equal(model.generate(ids, **NEW), answers[0])
    again = attach(model, store)
    attached.detach()  # of what is no longer its own
    assert model.generate != plain
    again.detach()
    assert model.generate == plain


def test_a_cache_without_a_store_keeps_in_the_store_of_the_settings(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNSTORE_STORE", str(tmp_path / "mine"))
    monkeypatch.setattr("hf_attnstore.cache.cache._default", None)
    ids = tokens(20, 1)
    for _ in range(2):
        cache = AttentionStoreCache(model, session="x")
        model.generate(ids, past_key_values=cache, **NEW)
    assert cache.reused_tokens == 19
    assert cache.store is not None
    assert cache.store.path == tmp_path / "mine"
    cache.store.close()
    with AttentionStore() as store:
        assert [session.name for session in store.sessions()] == ["x"]
