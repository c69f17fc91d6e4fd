"""Load or recompute: the choice itself against brute force, and that no choice changes what comes out."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import fresh
from support.architectures import make_architecture
from support.tiny_models import BLOCK, make_model, tokens
from support.truncating import TruncatingReference
from support.turns import GREEDY, assert_reused, assert_same, follow_up, turn
from transformers import DynamicCache

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.costs import gate as gating
from hf_attnstore.cache.costs.decide import LEAST_GAIN, MARGIN, Choice, Exploration, Option, choose
from hf_attnstore.cache.costs.learn import Costs
from hf_attnstore.lab.bench.slow_disk import SlowDisk
from hf_attnstore.store.disk.surroundings import Surroundings
from hf_attnstore.store.transfer.depth import lookahead_depth, read_buffer_bytes, read_buffer_layers

# the choice, as plain numbers


class Known:
    """Prices as straight formulas."""

    def __init__(self, a: float, b: float, c: float, fixed: Mapping[str, float], per_byte: Mapping[str, float]) -> None:
        self.a, self.b, self.c, self.fixed, self.per_byte = a, b, c, fixed, per_byte

    def one_prefill(self, history: int, new: int) -> float:
        return self.a + self.b * new + self.c * new * (history + new / 2) if new else 0.0

    def one_load(self, load: Mapping[str, int]) -> float:
        return sum(self.fixed[tier] + self.per_byte[tier] * nbytes for tier, nbytes in load.items() if nbytes)

    def prefill(self, points: Sequence[tuple[int, int]], *, corrected: bool = True) -> np.ndarray:
        return np.array([self.one_prefill(*point) for point in points])

    def load(self, loads: Sequence[Mapping[str, int]]) -> np.ndarray:
        return np.array([self.one_load(load) for load in loads])


prices = st.builds(
    lambda a, b, c, fm, fd, m, d: Known(a, b, c, {"memory": fm, "disk": fd}, {"memory": m, "disk": d}),
    st.floats(0, 0.1), st.floats(1e-6, 1e-2), st.floats(0, 1e-5), st.floats(0, 0.01), st.floats(0, 0.1),
    st.floats(1e-10, 1e-5), st.floats(1e-10, 1e-4),
)  # fmt: skip


@given(prices, st.lists(st.sampled_from(["memory", "disk"]), min_size=1, max_size=12), st.integers(1, 300),
       st.integers(1, 40), st.booleans())  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_choice_is_within_the_margin_of_the_best_there_is(
    known: Known, tiers: list[str], new: int, layers: int, overlapped: bool
) -> None:
    per_token = 640
    options = [Option(0, {})]
    for tier in tiers:
        load = dict(options[-1].load)
        load[tier] = load.get(tier, 0) + BLOCK * per_token
        options.append(Option(options[-1].tokens + BLOCK, load))
    prompt = options[-1].tokens + new

    def seconds(option: Option) -> float:
        load = known.one_load(option.load)
        compute = known.one_prefill(option.tokens, prompt - option.tokens)
        return max(load, compute) + load / layers if overlapped else load + compute

    best = min(map(seconds, options))
    choice = choose(options, prompt, known, layers=layers, overlapped=overlapped)
    chosen = seconds(options[choice.place])
    assert chosen <= best * MARGIN * (1 + 1e-9) or chosen - best <= LEAST_GAIN
    if choice.place < len(options) - 1:  # only for a clear gain is anything left in the store, and then the best is
        assert seconds(options[-1]) > best * MARGIN
        assert chosen == pytest.approx(best)


def test_a_hand_worked_choice() -> None:
    # 1 ms a token, 2 s and 0.1 s to load all: memory is worth it, a disk of 1 MB/s is not
    known = Known(0, 1e-3, 0, {"memory": 0.0, "disk": 0.0}, {"memory": 1e-7, "disk": 1e-6})
    half, whole = {"memory": 500_000}, {"memory": 500_000, "disk": 1_500_000}
    options = [Option(0, {}), Option(500, half), Option(1000, whole)]
    choice = choose(options, 1010, known, layers=4, overlapped=False)
    assert choice.place == 1
    assert choice.seconds == pytest.approx((1.010, 0.05 + 0.510, 1.55 + 0.010))
    assert choice.reason == (
        "reuse 500 of 1,000: load 1,550 ms, recompute 1,000 ms; so many: load 50 ms, recompute 500 ms"
    )
    assert choose(options[::2], 1010, known, layers=4, overlapped=False).place == 0
    choice = choose([Option(0, {}), Option(1000, {"memory": 2_000_000})], 1010, known, layers=4, overlapped=False)
    assert (choice.place, choice.reason) == (1, "reuse 1,000 of 1,000: load 200 ms, recompute 1,000 ms")
    assert (choice.load_seconds, choice.compute_seconds) == (pytest.approx(0.2), pytest.approx(0.01))


def test_without_observations_everything_is_reused() -> None:
    options = [Option(0, {}), Option(64, {"disk": 1 << 20})]
    costs = Costs()
    assert choose(options, 70, costs, layers=2, overlapped=False).place == 1
    for _ in range(5):
        costs.observe_prefill(0, 64, 1e-6)
    choice = choose(options, 70, costs, layers=2, overlapped=False)
    assert choice.place == 1
    assert "loading so much was not measured yet" in choice.reason


def test_noise_close_to_one_option_does_not_make_more_tokens_cost_less() -> None:
    """Sixty tokens are known of three hundred; first turns of that length, as it happens, took little."""
    costs = Costs()
    for new in (20, 40, 100, 500, 1000, 2000):
        for history in (0, 100, 1000):
            costs.observe_prefill(history, new, 1e-3 * new)
    for seconds in (0.2, 0.21, 0.22, 0.2):
        costs.observe_prefill(0, 300, seconds)
    for nbytes in (1 << 16, 1 << 20, 1 << 22):
        costs.observe_load("memory", nbytes, 1e-9 * nbytes)
    options = [Option(0, {}), Option(60, {"memory": 1 << 20})]
    corrected = costs.prefill([(0, 300), (60, 240)])
    assert corrected is not None
    assert corrected[0] < corrected[1] / MARGIN  # so that by these alone nothing would be reused
    assert choose(options, 300, costs, layers=4, overlapped=False).place == 1


@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=200), st.floats(0.001, 10))
@settings(deadline=None)
def test_exploring_costs_no_more_than_its_share(compute: list[float], slow: float) -> None:
    exploration, spent, total = Exploration(), 0.0, 0.0
    options = [Option(0, {}), Option(16, {"disk": 100}), Option(64, {"disk": 400})]
    for seconds in compute:
        known = (seconds, seconds + slow / 4, seconds + slow)
        choice = exploration.adjust(options, Choice(0, "", known))
        spent += known[choice.place] - known[0]
        total += known[0]
        if choice.place:
            exploration.loaded("disk")
    assert spent <= 0.02 * total + 1e-12


def test_a_tier_that_was_given_up_is_looked_at_again() -> None:
    exploration, looks = Exploration(), []
    options = [Option(0, {}), Option(16, {"disk": 100}), Option(64, {"disk": 400})]
    for decision in range(100):
        choice = exploration.adjust(options, Choice(0, "", (1.0, 1.1, 5.0)))
        if choice.place:
            looks.append(decision)
            exploration.loaded("disk")
    assert len(looks) >= 10
    assert min(b - a for a, b in pairwise(looks)) >= 8
    exploration.loaded("disk", surprise=True)  # it was much faster than predicted: at once
    exploration.budget = 1.0
    assert exploration.adjust(options, Choice(0, "", (1.0, 1.1, 5.0))).place == 1


@given(st.floats(1e3, 1e12), st.floats(0, 1), st.integers(0, 10**6), st.floats(0, 1), st.integers(0, 10**5))
def test_the_read_buffer_is_that_of_the_paper(
    bandwidth: float, load: float, history: int, compute: float, new: int
) -> None:
    found = read_buffer_bytes(bandwidth, load, history, compute, new)
    assert found == (bandwidth * (load * history - compute * new) if load * history > compute * new else 0)


@given(st.floats(1e-6, 10), st.floats(1e-6, 10), st.integers(1, 100))
def test_with_a_buffer_of_so_many_layers_computing_never_waits(load: float, compute: float, layers: int) -> None:
    """Against a walk through the layers: the buffered ones are there when the first one computes."""
    buffered = read_buffer_layers(load, compute, layers)
    assert 1 <= buffered <= layers
    arrived = [max(0, number + 1 - buffered) * load / layers for number in range(layers)]
    assert all(arrived[number] <= number * compute / layers * (1 + 1e-6) + load / layers for number in range(layers))
    assert buffered <= max(lookahead_depth(load / layers, compute / layers, layers), 1)


# a cache that is made to choose


class Forced:
    """Prices by which some number of tokens is the best to reuse, whatever else."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens = tokens
        self.asked: list[int] = []

    def prefill(self, points: Sequence[tuple[int, int]], *, corrected: bool = True) -> np.ndarray:
        lengths = [history for history, _ in points]
        if len(lengths) > 1:
            self.asked = lengths
        best = max(lengths) if self.tokens is None else self.tokens
        return np.array([0.1 + abs(history - best) for history in lengths])

    def load(self, loads: Sequence[Mapping[str, int]]) -> np.ndarray:
        return np.zeros(len(loads))


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes caches reuse so many tokens of what they know; None for all."""

    def set_to(tokens: int | None) -> Forced:
        forced = Forced(tokens)
        monkeypatch.setattr(Costs, "can_choose", lambda self: True)
        monkeypatch.setattr(Costs, "prefill", lambda self, points, **_: forced.prefill(points))
        monkeypatch.setattr(Costs, "load", lambda self, loads: forced.load(loads))
        return forced

    gating.forget()
    monkeypatch.setenv("ATTNSTORE_GATE", "on")
    return set_to


def blocks_of(store: AttentionStore) -> tuple[int, int]:
    """Blocks on disk, and the tokens in them."""
    store.flush()
    files = list((store.path / "blocks").rglob("*.safetensors"))
    rows = store._disk.index.database.read("SELECT count(*) FROM blocks")
    assert len(files) == rows[0][0]
    return len(files), len(store.tokens("alice"))


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("reuse", [None, 2 * BLOCK, 0], ids=["all", "prefix", "nothing"])
def test_any_choice_gives_the_same_tokens(
    family: str, tier: str, reuse: int | None, store: AttentionStore, force: Any
) -> None:
    model, plain = make_model(family), make_model(family)
    force(None)
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences  # 45 tokens are kept
    if tier == "disk":
        store.drop_memory()
    prompt = follow_up(first, 9, 2)
    force(reuse)
    cache = AttentionStoreCache(model, "alice", store)
    ours = turn(model, prompt, cache)
    reused = 45 if reuse is None else reuse
    assert_reused(cache, prompt, reused)
    assert cache.stats.matched_tokens == 45
    assert cache.stats.gate.startswith(f"reuse {reused} of 45")
    if reuse == 0:
        assert cache.stats.loaded_bytes == 0
        assert cache.stats.missed == "computing is faster"
        assert_same(ours, turn(plain, prompt, None))
    else:
        assert cache.stats.loaded_bytes > 0
        assert (cache.stats.recomputed == "") == (reuse is None)
        assert torch.equal(ours.sequences, turn(plain, prompt, None).sequences)
    if family == "llama-gqa":
        per_token = 2 * 2 * 2 * 12 * 4  # layers, keys and values, heads, dim, float32
        assert cache.stats.loaded_bytes == reused * per_token
        kept_in_memory = DynamicCache(config=plain.config)
        turn(plain, tokens(40), kept_in_memory)
        kept_in_memory.crop(reused - 45)
        assert_same(ours, turn(plain, prompt, kept_in_memory))  # bit for bit what that part of the KV gives
    # what is kept is the whole conversation, in as few blocks as if all had been reused
    kept = ours.sequences[0, :-1].tolist()
    assert store.tokens("alice") == kept
    assert blocks_of(store) == (-(-len(kept) // BLOCK), len(kept))
    # and serves the next turn, in full
    force(None)
    store.drop_memory()
    prompt = follow_up(ours.sequences, 5, 3)
    again = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, prompt, again).sequences, turn(plain, prompt, None).sequences)
    assert_reused(again, prompt, len(kept))


def test_what_was_computed_again_is_in_memory_afterwards(store: AttentionStore, force: Any) -> None:
    model = make_model()
    force(None)
    first = turn(model, tokens(60), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    force(0)
    prompt = follow_up(first, 9, 2)
    cache = AttentionStoreCache(model, "alice", store)
    out = turn(model, prompt, cache).sequences
    assert_reused(cache, prompt, 0)
    block = BLOCK * 2 * 2 * 2 * 12 * 4
    # four whole blocks lie in memory beside the new one, and only that was handed over
    assert cache.stats.saved_bytes == block
    store.flush()
    assert store.stats()["memory_bytes"] >= 5 * block
    force(None)
    again = AttentionStoreCache(model, "alice", store)
    turn(model, follow_up(out, 3, 3), again)
    assert again.stats.blocks_from == {"memory": 5}


def test_where_memory_has_no_room_what_is_on_disk_stays_there(tmp_path: Path, force: Any) -> None:
    model = make_model()
    block = BLOCK * 2 * 2 * 2 * 12 * 4
    with AttentionStore(tmp_path, memory=2 * block, block_size=BLOCK) as store:
        force(None)
        first = turn(model, tokens(60), AttentionStoreCache(model, "alice", store)).sequences
        store.drop_memory()
        force(0)
        out = turn(model, follow_up(first, 30, 2), AttentionStoreCache(model, "alice", store)).sequences
        assert store.tokens("alice") == out[0, :-1].tolist()
        assert store.stats()["memory_bytes"] <= 2 * block
        assert blocks_of(store)[0] == -(-(out.shape[1] - 1) // BLOCK)


def test_what_the_cache_holds_is_never_computed_again(store: AttentionStore, force: Any) -> None:
    model = make_model()
    force(0)
    cache = AttentionStoreCache(model, "alice", store)
    first = turn(model, tokens(40), cache).sequences
    prompt = follow_up(first, 9, 2)
    ours = turn(model, prompt, cache)
    assert_reused(cache, prompt, 45)
    assert cache.stats.loaded_bytes == 0
    assert torch.equal(ours.sequences, turn(make_model(), prompt, None).sequences)


def test_a_part_in_the_cache_and_the_rest_in_the_store(store: AttentionStore, force: Any) -> None:
    model = make_model()
    force(None)
    cache = AttentionStoreCache(model, "alice", store)
    first = turn(model, tokens(40), cache).sequences
    other = AttentionStoreCache(model, "alice", store)
    second = turn(model, follow_up(first, 40, 2), other).sequences
    prompt = follow_up(second, 5, 3)
    forced = force(0)
    turn(model, prompt, cache)
    assert_reused(cache, prompt, 45)  # what it held, and nothing that would have had to be loaded
    assert forced.asked[0] == 45
    assert cache.stats.loaded_bytes == 0
    assert blocks_of(store)[1] == prompt.shape[1] + GREEDY["max_new_tokens"] - 1


@pytest.mark.parametrize("reuse", [None, 0], ids=["all", "as little as possible"])
def test_keys_that_were_moved_are_always_loaded(reuse: int | None, store: AttentionStore, force: Any) -> None:
    """Computed again they would be others: what a model says must not depend on how fast the machine is."""
    model = make_model()
    reference = TruncatingReference(make_model(), window=64)
    prompt = tokens(30)
    for seed in range(5):
        force(reuse)
        cache = AttentionStoreCache(model, "alice", store, window=64)
        out = turn(model, prompt, cache)
        expected = reference.turn(prompt, room=6)
        assert out.sequences[0, prompt.shape[1] :].tolist() == expected.sequences[0, -6:].tolist()
        if cache.stats.truncation:
            assert cache.stats.truncation == "rotated"
            assert cache.reused_tokens >= cache._held.view.base > 0
        prompt = follow_up(out.sequences, 12, seed + 10)
    assert cache.stats.dropped_tokens
    assert store.tokens("alice", dropped=True) == out.sequences[0, :-1].tolist()


def test_a_turn_that_was_interrupted_while_computing_again_leaves_the_session_whole(
    store: AttentionStore, force: Any
) -> None:
    model = make_model()
    force(None)
    first = turn(model, tokens(60), AttentionStoreCache(model, "alice", store)).sequences
    before = store.tokens("alice")
    force(0)
    cache = AttentionStoreCache(model, "alice", store)
    prompt = follow_up(first, 9, 2)
    calls = []

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        turn(model, prompt, cache, prefill_chunk_size=16)
    handle.remove()
    assert cache.stats.reused_tokens == 0
    assert store.tokens("alice") == before
    force(None)
    again = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, prompt, again).sequences, turn(make_model(), prompt, None).sequences)
    assert_reused(again, prompt, len(before))


def test_a_gate_that_is_switched_off_chooses_nothing(
    store: AttentionStore, force: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    force(0)
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences
    prompt = follow_up(first, 9, 2)
    cache = AttentionStoreCache(model, "alice", store, gate=False, save=False)
    turn(model, prompt, cache)
    assert_reused(cache, prompt, 45)
    assert cache.stats.gate == ""
    monkeypatch.setenv("ATTNSTORE_GATE", "off")
    cache = AttentionStoreCache(model, "alice", store, save=False)
    turn(model, prompt, cache)
    assert_reused(cache, prompt, 45)
    cache = AttentionStoreCache(model, "alice", store, gate=True, save=False)
    turn(model, prompt, cache)
    assert_reused(cache, prompt, 0)


@pytest.mark.parametrize(("shared", "reused"), [(8, 0), (40, 40)])
def test_a_long_prompt_is_not_put_behind_a_few_tokens_before_costs_are_known(
    shared: int, reused: int, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating, "_LONG", 256)
    model, plain = make_model(), make_model()
    known = tokens(400)
    turn(model, known, AttentionStoreCache(model, "alice", store, gate=True))
    prompt = torch.cat([known[:, :shared], tokens(400, seed=5)[:, shared:]], dim=1)
    prompt[0, shared] = known[0, shared] - 1
    cache = AttentionStoreCache(model, "bob", store, gate=False, save=False)
    turn(model, prompt, cache)
    assert_reused(cache, prompt, shared)
    cache = AttentionStoreCache(model, "bob", store, gate=True)
    ours = turn(model, prompt, cache)
    assert_reused(cache, prompt, reused)
    assert cache.stats.matched_tokens == shared
    assert cache.stats.gate.startswith(f"reuse {reused} of {shared}")
    if not reused:
        assert_same(ours, turn(plain, prompt, None))


def test_match_may_compute_and_resume_loads_all(store: AttentionStore, force: Any) -> None:
    model = make_model()
    force(0)
    first = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences
    cache = AttentionStoreCache(model, "alice", store)
    assert cache.match(first) == 0
    cache.reset()
    assert cache.resume().shape[1] == 45
    assert cache.stats.loaded_bytes > 0


@pytest.mark.parametrize("reuse", [None, 32, 0], ids=["all", "an earlier checkpoint", "nothing"])
def test_models_with_running_states_go_on_at_a_checkpoint(reuse: int | None, store: AttentionStore, force: Any) -> None:
    model, plain = make_architecture("lfm2"), make_architecture("lfm2")
    if model is None or plain is None:
        pytest.skip("this transformers has no such model")
    force(None)
    every: dict[str, Any] = {"checkpoint_every": 32}
    first = turn(model, tokens(80), AttentionStoreCache(model, "alice", store, **every)).sequences
    store.drop_memory()
    prompt = follow_up(first, 9, 2)
    force(reuse)
    cache = AttentionStoreCache(model, "alice", store, **every)
    ours = turn(model, prompt, cache)
    assert_reused(cache, prompt, 85 if reuse is None else reuse)
    assert (cache.stats.loaded_bytes == 0) == (reuse == 0)
    assert torch.equal(ours.sequences, turn(plain, prompt, None).sequences)
    assert store.tokens("alice") == ours.sequences[0, :-1].tolist()


# learning


def some_turns(model: Any, store: AttentionStore, count: int, length: int = 200, **more: Any) -> list[Any]:
    """Resumed turns of short conversations, each from disk; their stats."""
    found = []
    for number in range(count):
        name = f"session {number}"
        first = turn(model, tokens(length, number), AttentionStoreCache(model, name, store, **more)).sequences
        store.drop_memory()
        cache = AttentionStoreCache(model, name, store, **more)
        turn(model, follow_up(first, 7, number), cache)
        found.append(cache.stats)
    return found


def test_a_slow_disk_is_found_out_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSTORE_GATE", "on")
    gating.forget()
    model = make_model()
    disk = SlowDisk(200_000)  # 200 tokens take 0.4 s, many times what it takes to compute them
    with AttentionStore(tmp_path, block_size=BLOCK, surroundings=Surroundings(disk=disk)) as store:
        stats = some_turns(model, store, 6)
        assert [s.reused_tokens for s in stats[:3]] == [205] * 3  # before anything is known, reuse
        assert stats[-1].reused_tokens < 205
        assert stats[-1].missed == "computing is faster"
        load = float(re.search(r"of 205: load ([\d,]+) ms", stats[-1].gate)[1].replace(",", ""))  # type: ignore[index]
        assert load >= 300  # 205 tokens of 384 bytes at 200 kB/s take 394 ms, some of which the model computes
        assert stats[-1].recompute_seconds is not None
        assert stats[-1].recompute_seconds > 0
        # the next process begins with that
        store.flush()
        assert _in_another_process(tmp_path) < 205
    gating.forget()


def _in_another_process(path: Path) -> int:
    """How much a new process reuses in its first turn on a slow disk."""
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from support.tiny_models import make_model, tokens, BLOCK\n"
        "from support.turns import turn, follow_up\n"
        "from hf_attnstore import AttentionStore, AttentionStoreCache\n"
        "model = make_model()\n"
        f"with AttentionStore({str(path)!r}, block_size=BLOCK) as store:\n"
        "    known = torch.tensor([store.tokens('session 0')])\n"
        "    cache = AttentionStoreCache(model, 'session 0', store, gate=True)\n"
        "    turn(model, follow_up(known, 7, 9), cache)\n"
        "    print(cache.stats.matched_tokens, cache.stats.reused_tokens)\n"
    )
    out = fresh.run([sys.executable, "-c", script], check=True)
    matched, reused = map(int, out.stdout.split()[-2:])
    assert matched >= 205
    return reused
