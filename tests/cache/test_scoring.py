"""Scores are those of plain forwards, the prefix is computed once and kept, and nothing of the continuations is."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import BLOCK, FAMILIES, make_llama, make_model, tokens
from transformers import AutoTokenizer, DynamicCache, T5Config, T5ForConditionalGeneration

from hf_attnstore import (
    AttentionStore,
    AttentionStoreCache,
    CacheUseError,
    Score,
    UnsupportedModelError,
    score,
    score_tokens,
)
from hf_attnstore.cache.model.argument import cache_name
from hf_attnstore.lab.families.tiny import build
from hf_attnstore.session.chain import common_prefix

PREFIX = tokens(50)[0].tolist()
CONTINUATIONS = [[5], [7], [5, 6], [5, 6, 9], [10, 11], [12] * 7]
CLOSE = 2e-5
NAME = cache_name(list(inspect.signature(make_llama().forward).parameters)) or ""


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all ids that models are given together with a cache."""
    shapes: list[tuple[int, ...]] = []
    begin = AttentionStoreCache.begin_forward

    def counted(self: AttentionStoreCache, named: Any) -> Any:
        shapes.append(tuple(named["input_ids"].shape))
        return begin(self, named)

    monkeypatch.setattr(AttentionStoreCache, "begin_forward", counted)
    return shapes


def plainly(model: Any, prefix: list[int], continuation: list[int]) -> Score:
    """By one forward over everything."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prefix, *continuation[:-1]]])).logits[0, len(prefix) - 1 :].float()
    likely = logits.log_softmax(-1)[range(len(continuation)), continuation]
    return Score(tuple(likely.tolist()), logits.argmax(-1).tolist() == continuation)


def assert_close(ours: list[Score], theirs: list[Score]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_log_likelihoods == pytest.approx(b.token_log_likelihoods, abs=CLOSE)
        assert a.is_greedy == b.is_greedy
        assert a.tokens == b.tokens
        assert a.log_likelihood == pytest.approx(sum(b.token_log_likelihoods), abs=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_plain_forwards_and_a_known_prefix_is_not_computed(
    family: str, store: AttentionStore
) -> None:
    model = make_model(family)
    expected = [plainly(model, PREFIX, continuation) for continuation in CONTINUATIONS]
    for reused in (0, len(PREFIX) - 1):
        cache = AttentionStoreCache(model, store=store, drop=0)
        assert_close(score_tokens(cache, PREFIX, CONTINUATIONS, batch_size=2), expected)
        # a last token behind what is known is computed with what comes after it
        assert (cache.reused_tokens, cache.prefilled_tokens) == (reused, 0 if reused else len(PREFIX))


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "lfm2"])
def test_models_with_running_states_go_on_from_a_checkpoint(family: str, store: AttentionStore) -> None:
    model = build(family)
    expected = [plainly(model, PREFIX, continuation) for continuation in CONTINUATIONS]
    for reused in (0, len(PREFIX) - 1):
        cache = AttentionStoreCache(model, store=store, drop=0)
        assert_close(score_tokens(cache, PREFIX, CONTINUATIONS, batch_size=4), expected)
        # a last token behind what is known is computed with what comes after it
        assert (cache.reused_tokens, cache.prefilled_tokens) == (reused, 0 if reused else len(PREFIX))


def test_a_model_that_goes_on_token_by_token_only_computes_each_text_as_a_whole(store: AttentionStore) -> None:
    model = build("jamba")
    expected = [plainly(model, PREFIX, continuation) for continuation in CONTINUATIONS]
    cache = AttentionStoreCache(model, store=store, drop=0)
    assert_close(score_tokens(cache, PREFIX, CONTINUATIONS), expected)
    assert cache.prefilled_tokens == 0


def test_scores_are_bit_for_bit_those_of_a_cache_kept_in_memory(store: AttentionStore) -> None:
    model = make_model()
    first, second = [5, 6, 9], [10, 11, 4]
    score_tokens(AttentionStoreCache(model, store=store, drop=0), PREFIX[:-6], [[3]])
    ours = score_tokens(AttentionStoreCache(model, store=store, drop=0), PREFIX, [first, second])
    kept: Any = DynamicCache(config=model.config)
    plain = make_model()
    with torch.no_grad():
        plain(torch.tensor([PREFIX[:-6]]), **{NAME: kept})
        begun = plain(torch.tensor([PREFIX[-6:]]), **{NAME: kept}, logits_to_keep=1).logits[0]
        kept.batch_repeat_interleave(2)
        rows = plain(torch.tensor([first[:2], second[:2]]), **{NAME: kept}).logits
    for score_, ids, row in zip(ours, (first, second), rows, strict=True):
        wanted = torch.cat([begun, row]).log_softmax(-1)[range(3), ids]
        assert torch.equal(torch.tensor(score_.token_log_likelihoods), wanted)


def test_each_token_is_fed_once_and_what_begins_another_continuation_with_that(
    store: AttentionStore, fed: list[tuple[int, ...]]
) -> None:
    cache = AttentionStoreCache(make_llama(), store=store, drop=0)
    score_tokens(cache, PREFIX, CONTINUATIONS)
    # one token of a continuation is scored by what comes before; of [5, 6] all that is fed is the 5 of [5, 6, 9]
    assert fed == [(1, 50), (3, 6)]
    fed.clear()
    score_tokens(cache, [*PREFIX, 9], [[4], [8]])
    assert fed == [(1, 1)]
    fed.clear()
    score_tokens(cache, PREFIX, [[7, 8, 4], [7, 8, 5]])  # their common beginning is the prefix's, too
    assert fed == [(1, 3)]


def test_of_a_known_prefix_nothing_is_computed_but_its_last_token_in_the_rows(
    store: AttentionStore, fed: list[tuple[int, ...]]
) -> None:
    model = make_model()
    expected = [plainly(model, PREFIX, continuation) for continuation in CONTINUATIONS]
    for _ in range(2):
        fed.clear()
        assert_close(
            score_tokens(AttentionStoreCache(model, store=store, drop=0), PREFIX, CONTINUATIONS, batch_size=2), expected
        )
    assert fed == [(2, 3), (1, 7)]  # of [5, 6, 9] and [10, 11]
    fed.clear()
    single = [[4], [8]]  # whose scores the last token of the prefix has: there are no rows
    got = score_tokens(AttentionStoreCache(model, store=store, drop=0), PREFIX, single)
    assert_close(got, [plainly(model, PREFIX, continuation) for continuation in single])
    assert fed == [(1, 1)]
    for _ in range(2):
        cache = AttentionStoreCache(model, session="scored", store=store, drop=0)
        assert_close(score_tokens(cache, PREFIX, CONTINUATIONS), expected)
        assert store.tokens("scored") == PREFIX  # a session has all of it


def test_nothing_of_continuations_is_kept(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, session="scored", store=store, drop=0)
    score_tokens(cache, PREFIX, CONTINUATIONS)
    assert store.tokens("scored") == PREFIX
    assert store.stats()["memory_blocks"] == -(-len(PREFIX) // BLOCK)


def test_a_model_that_changes_while_it_computes_is_not_taken_from_a_cache(store: AttentionStore) -> None:
    model = make_model()
    expected = [plainly(model, PREFIX, continuation) for continuation in CONTINUATIONS]
    count = [0]
    hook = model.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    cache = AttentionStoreCache(model, store=store, drop=0)
    assert_close(score_tokens(cache, PREFIX, CONTINUATIONS), expected)
    assert store.stats()["memory_blocks"] == 0 < count[0]
    hook.remove()


def test_beyond_the_length_at_which_frequencies_change_texts_are_computed_as_a_whole(store: AttentionStore) -> None:
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = make_llama(max_position_embeddings=52, rope_parameters=scaled)
    expected = [plainly(model, PREFIX, continuation) for continuation in CONTINUATIONS]
    cache = AttentionStoreCache(model, store=store, drop=0)
    assert_close(score_tokens(cache, PREFIX, CONTINUATIONS), expected)


def test_texts_are_cut_into_tokens_as_a_whole(store: AttentionStore) -> None:
    tokenizer = AutoTokenizer.from_pretrained("examples/small-model")
    model = make_llama(vocab_size=len(tokenizer))
    prefix, ends = "The king has come to the ", ["castle", "river and the sea", "king"]
    got = score(model, tokenizer, prefix, ends, store)
    begin = tokenizer(prefix.rstrip())["input_ids"]
    whole = [tokenizer(prefix + end)["input_ids"] for end in ends]
    assert all(ids[: len(begin)] == begin for ids in whole)
    assert_close(got, [plainly(model, begin, ids[len(begin) :]) for ids in whole])
    assert store.stats()["memory_blocks"] > 0


def test_where_a_continuation_joins_the_prefix_in_a_token_all_are_scored_from_the_same_place(
    store: AttentionStore,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained("examples/small-model")
    model = make_llama(vocab_size=len(tokenizer))
    prefix, ends = "The king has come to the k", ["ing", " and sat down"]
    begin, *whole = (tokenizer(text)["input_ids"] for text in (prefix, *(prefix + end for end in ends)))
    given = [common_prefix(np.array(begin), np.array(ids)) for ids in whole]
    assert given[0] < given[1] == len(begin)
    got = score(model, tokenizer, prefix, ends, store)
    assert_close(got, [plainly(model, ids[: given[0]], ids[given[0] :]) for ids in whole])


def test_what_can_not_be_scored_is_refused(store: AttentionStore) -> None:
    cache = AttentionStoreCache(make_llama(), store=store, drop=0)
    assert score_tokens(cache, PREFIX, []) == []
    for prefix, continuations in (([], [[3]]), (PREFIX, [[3], []])):
        with pytest.raises(CacheUseError, match="can't be scored"):
            score_tokens(cache, prefix, continuations)
    with pytest.raises(CacheUseError, match="batch_size"):
        score_tokens(cache, PREFIX, [[3]], batch_size=0)
    with pytest.raises(CacheUseError, match="drop=0"):
        score_tokens(AttentionStoreCache(make_llama(), store=store), PREFIX, [[3]])
    small = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    encoder = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)).eval()
    with pytest.raises(UnsupportedModelError, match="encoder"):
        score_tokens(AttentionStoreCache(encoder, store=store), PREFIX, [[3]])
