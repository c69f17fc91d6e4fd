"""Workloads: the paper's moments, seeds, rates; chains of blocks."""

import itertools

import pytest

from hf_attnstore.lab.sim.chains import Chain
from hf_attnstore.lab.sim.paper import PUBLISHED, SETTINGS, paper_workload
from hf_attnstore.lab.sim.replay import requests_of
from hf_attnstore.lab.sim.workload import Turn


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_papers_sessions_are_as_published(seed: int) -> None:
    workload = paper_workload(seed=seed)
    assert workload.facts["turns"] == pytest.approx(PUBLISHED["turns"], rel=0.03)
    for share in ("multi", "over_2k", "over_4k"):
        assert workload.facts[share] == pytest.approx(PUBLISHED[share], abs=0.02)
    starts = [conversation.start for conversation in workload.conversations]
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(9000, rel=0.05)  # one a second
    assert 50_000 < workload.turns < 54_000


def test_kv_per_token_is_as_published() -> None:
    published = (0.78, 2.5, 0.31, 0.12)  # MB, where a MB has 2**20 bytes
    for setting, megabytes in zip(SETTINGS, published, strict=True):
        assert setting.model.kv_bytes / 2**20 == pytest.approx(megabytes, rel=0.03)


def test_65b_prefills_2000_tokens_in_360_ms() -> None:
    assert SETTINGS[1].model.prefill_seconds(2000) == pytest.approx(0.36, rel=0.05)


def test_equal_seeds_give_equal_workloads() -> None:
    assert paper_workload(50, seed=3) == paper_workload(50, seed=3)
    assert paper_workload(50, seed=3) != paper_workload(50, seed=4)


def test_gaps_have_the_mean_that_was_asked_for() -> None:
    turns = [turn for c in paper_workload(2000, gap=40).conversations for turn in c.turns]
    assert sum(turn.think for turn in turns) / len(turns) == pytest.approx(40, rel=0.05)
    assert all(turn.think == 0 for c in paper_workload(20, gap=0).conversations for turn in c.turns)


def test_rate_moves_arrivals_and_thinking_stays() -> None:
    workload = paper_workload(20, gap=30)
    fast = workload.at_rate(4)
    for slow, quick in zip(workload.conversations, fast.conversations, strict=True):
        assert quick.start == pytest.approx(slow.start / 4)
        assert [turn.think for turn in quick.turns] == [turn.think for turn in slow.turns]
    slow_thinkers = workload.thinking(3)
    assert slow_thinkers.conversations[0].turns[0].think == 3 * workload.conversations[0].turns[0].think


def test_a_chain_grows_and_its_short_end_is_replaced() -> None:
    chain = Chain(10, itertools.count())
    first = chain.prompt(Turn(12, 5))
    assert (first.tokens, first.history, first.blocks) == (12, 0, [])
    assert (chain.blocks, chain.short) == ([0, 1], 2)
    chain.answer(Turn(12, 5))
    assert (chain.tokens, chain.blocks, chain.short) == (17, [0, 2], 7)
    second = chain.prompt(Turn(3, 1))
    assert (second.tokens, second.history, second.blocks, second.short) == (20, 17, [0, 2], 7)
    assert (chain.blocks, chain.short) == ([0, 3], 0)


@pytest.mark.parametrize("moved", [True, False])
def test_an_overflow_drops_the_oldest_half(moved: bool) -> None:
    chain = Chain(10, itertools.count(), window=40, moved=moved)
    chain.prompt(Turn(35, 0))
    assert chain.blocks == [0, 1, 2, 3]
    prompt = chain.prompt(Turn(8, 2))
    assert chain.truncations == 1
    assert chain.start == 2
    assert (prompt.history, prompt.tokens) == (15, 23)
    assert (prompt.blocks == [2, 3]) is moved  # with positions in the keys, nothing that was stored is of use
    assert chain.before == 1


def test_a_prompt_longer_than_the_window_still_fits() -> None:
    chain = Chain(10, itertools.count(), window=40)
    assert chain.prompt(Turn(500, 3)).tokens <= 40


def test_a_shared_beginning_keeps_whole_blocks_only() -> None:
    chain = Chain(10, itertools.count(), answers=False)
    chain.prompt(Turn(30, 9, shared=0))
    chain.answer(Turn(30, 9, shared=0))
    assert chain.tokens == 30
    prompt = chain.prompt(Turn(20, 0, shared=25))
    assert (prompt.history, prompt.tokens, prompt.blocks) == (20, 45, [0, 1])


def test_requests_come_in_order_and_name_their_conversation() -> None:
    requests = requests_of(paper_workload(30, gap=5), 256, 4096)
    times = [row.at for row in requests.rows]
    assert times == sorted(times)
    last: dict[int, list[object]] = {}
    for row in requests.rows:
        before = last.get(row.session, [])
        assert list(row.prompt) == before[len(before) - len(row.prompt) :]  # what the turn before left, or its end
        last[row.session] = list(row.blocks)
