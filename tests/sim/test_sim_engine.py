"""The server on a virtual clock: times worked out by hand, windows, determinism, and what must always hold."""

import gc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attnstore.lab.sim import engine
from hf_attnstore.lab.sim.engine import Server, simulate
from hf_attnstore.lab.sim.machine import Accelerator, Links, Model, Prices
from hf_attnstore.lab.sim.paper import paper_workload
from hf_attnstore.lab.sim.timed import TimedTiers
from hf_attnstore.lab.sim.workload import Conversation, Turn, Workload
from hf_attnstore.store.eviction.lookahead import fetch_window, keep_window
from hf_attnstore.store.eviction.policies import POLICIES

# 1 ms of prefill per token, 10 ms per decoding step, 1,000 bytes of KV per token
MODEL = Model("by hand", 500, 0, 0, 1000, Accelerator("a", 1e6, 1e5), 1, used_flops=1.0, used_bandwidth=1.0)
LINKS = Links(device=1e6, read=2e5, write=1e9, buffer=0.0)


def talk(*turns: Turn, start: float = 0.0) -> Conversation:
    return Conversation(start, start, list(turns))


def server(**changes: object) -> Server:
    base = Server(MODEL, 10**6, 10**7, policy="lru", batch=2, block_tokens=10, links=LINKS)
    return replace(base, **changes)  # type: ignore[arg-type]


def constant_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "step_seconds", lambda self, tokens: 0.01)


def test_a_turn_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    work = Workload("", [talk(Turn(100, 20), Turn(50, 10, think=5.0))])
    nothing = simulate(work, server(memory=0, disk=0))
    # 100 tokens, 20 steps, 5 s, all 170 tokens, 10 steps
    assert list(nothing.ttft) == pytest.approx([0.1, 0.17])
    assert nothing.elapsed == pytest.approx(0.1 + 0.2 + 5 + 0.17 + 0.1)
    assert nothing.gpu_seconds == pytest.approx(0.1 + 0.2 + 0.17 + 0.1)
    kept = simulate(work, server())
    # 120 tokens come from memory in 0.12 s, behind 0.05 s of prefill: 0.07 s of it show
    assert list(kept.ttft) == pytest.approx([0.1, 0.12])
    assert kept.exposed == pytest.approx(0.07)
    assert (kept.fast, kept.slow, kept.history) == (120, 0, 120)
    assert kept.session_rate == kept.token_rate == kept.memory_share == 1.0


def test_loading_before_computing_costs_all_of_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    work = Workload("", [talk(Turn(100, 20), Turn(50, 10, think=5.0))])
    apart = simulate(work, server(links=replace(LINKS, overlap=False)))
    assert apart.ttft[1] == pytest.approx(0.17)
    ahead = simulate(work, server(links=replace(LINKS, buffer=0.5)))
    assert ahead.ttft[1] == pytest.approx(0.06)  # half of the layers were there when it began


def test_saving_first_makes_turns_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    work = Workload("", [talk(Turn(100, 20))])
    assert simulate(work, server(saving_behind=False)).ttft[0] == pytest.approx(0.1 + 0.1)


def test_what_is_on_disk_only_takes_the_time_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    # b's KV takes all of the memory; a's comes back from disk at 200 KB/s, when nobody said before that it would
    work = Workload("", [talk(Turn(90, 10), Turn(50, 10, think=20.0)), talk(Turn(90, 10), start=3.0)])
    out = simulate(work, server(memory=100_000, ahead=False))
    assert out.slow == 100
    assert max(out.ttft) == pytest.approx(100_000 / 2e5)
    assert out.memory_share == 0.0


def behind_another(answer: int) -> Workload:
    """b's KV takes all of the memory that a's was in; a comes back while c, with an answer of so many tokens, occupies
    the only slot."""
    a = talk(Turn(90, 10), Turn(50, 10, think=20.0))
    return Workload("", [a, talk(Turn(290, 10), start=3.0), talk(Turn(5, answer), start=19.0)])


def test_the_queue_brings_it_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    work = behind_another(200)  # longer than the fetch takes
    told = simulate(work, server(memory=305_000, batch=1))
    assert (told.fast, told.slow) == (100, 0)
    untold = simulate(work, server(memory=305_000, batch=1, ahead=False))
    assert (untold.fast, untold.slow) == (0, 100)


def test_a_fetch_that_is_not_over_counts_as_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    out = simulate(behind_another(119), server(memory=305_000, batch=1))
    # a comes at about 20.2 s and begins when c is over, at about 20.2 s: the 0.5 s of the fetch have just begun
    assert out.slow == 100
    assert out.ttft[3] < 100_000 / 2e5 + 0.05


def test_the_batch_is_never_larger_than_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    work = Workload("", [talk(Turn(10, 100), start=0.0) for _ in range(3)])
    out = simulate(work, server(batch=2))
    assert out.waits[0] == 0
    assert out.waits[2] >= 1.0  # until one of the first two has decoded its 100 tokens


def test_kept_on_the_device_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    work = Workload("", [talk(Turn(100, 20), Turn(50, 10, think=5.0))])
    out = simulate(work, server(device=10**6))
    assert out.kept == 120
    assert out.ttft[1] == pytest.approx(0.05)


def test_a_device_with_room_for_one_keeps_the_session_that_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    turns = [Turn(500, 10), *[Turn(10, 10, think=0.0) for _ in range(4)]]
    work = Workload("", [talk(*turns), talk(*turns)])  # always one runs and the other waits
    histories = 510 + 530 + 550 + 570
    untold = simulate(work, server(memory=10**7, device=600_000, batch=1, ahead=False))
    assert (untold.kept, untold.fast) == (0, 2 * histories), "each takes the other's place"
    told = simulate(work, server(memory=10**7, device=600_000, batch=1))
    assert (told.kept, told.fast) == (histories, histories), "who waits keeps its place"


def test_the_device_knows_a_session_by_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    work = Workload("", [talk(Turn(60, 20), Turn(30, 10, think=5.0))])
    assert simulate(work, server(device=10**6, window=100)).kept == 0, "of what is kept, positions have changed"


def test_an_overflow_keeps_half_with_decoupled_positions_and_nothing_without(monkeypatch: pytest.MonkeyPatch) -> None:
    constant_steps(monkeypatch)
    work = Workload("", [talk(Turn(60, 20), Turn(30, 10, think=5.0))])
    assert simulate(work, server(window=100)).fast == 30
    assert simulate(work, server(window=100, moved=False)).fast == 0


def test_windows_are_those_of_the_formulas() -> None:
    assert fetch_window(1000, 100) == 10
    assert keep_window(1000, 4000, 100) == 50
    tiers = TimedTiers(1000, 4000, "lru", kv_bytes=1, block_tokens=10, links=LINKS)
    tiers._set_windows(100.0)
    for number in range(80):
        tiers.queued(number, engine.Chain(10))
    tiers.look_ahead(0.0)
    assert len(tiers.tiers.lookahead) == 50
    assert tiers._fetched == 10
    deeper = TimedTiers(1000, 4000, "lru", kv_bytes=1, block_tokens=10, links=LINKS, depth=0.5)
    deeper._set_windows(100.0)
    for number in range(80):
        deeper.queued(number, engine.Chain(10))
    deeper.look_ahead(0.0)
    assert (len(deeper.tiers.lookahead), deeper._fetched) == (25, 5)


def test_a_run_is_determined_by_its_seed() -> None:
    work = paper_workload(60, gap=5)
    one, two = (
        simulate(work, server(memory=20_000_000, disk=80_000_000, policy="predictive", block_tokens=256))
        for _ in range(2)
    )
    assert one.summary() == two.summary()


def test_turns_of_the_warm_up_are_not_counted() -> None:
    work = paper_workload(20, gap=1)
    out = simulate(work, server(), warm_up=10)
    assert out.turns == work.turns - 10
    assert out.total_turns == work.turns
    assert len(out.ttft) == out.turns


def test_cost_is_hours_times_prices() -> None:
    prices = Prices(accelerator=5, memory=0.01, disk=0.001)
    assert prices.cost(3600, 2, memory=10**11, disk=10**12) == pytest.approx(10 + 1 + 1)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 25),
    st.sampled_from(sorted(POLICIES)),
    st.integers(0, 3_000_000),
    st.sampled_from([0, 500_000, 20_000_000]),
    st.booleans(),
    st.integers(0, 5),
)
def test_caps_hold_chains_stay_whole_and_no_turn_is_lost(
    sessions: int, policy: str, memory: int, disk: int, ahead: bool, seed: int
) -> None:
    work = paper_workload(sessions, gap=2, seed=seed)
    config = server(memory=memory, disk=disk, policy=policy, ahead=ahead, window=4096, block_tokens=256)
    run = engine._Run(work, config, 0, None, lambda done: None)
    if run.store is not None:
        check = run.store.look_ahead

        def checking(now: float) -> None:
            check(now)
            assert run.store is not None
            tiers = run.store.tiers
            books = [tiers.memory] if tiers.disk is None else [tiers.memory, tiers.disk]
            for book in books:
                assert 0 <= book.used <= book.capacity
            if tiers.disk is not None:
                for chain in run.chains:
                    there = [key in tiers.disk for key in chain.whole]
                    assert there == sorted(there, reverse=True)  # no block without the ones before it

        run.store.look_ahead = checking  # type: ignore[method-assign]
    out = run.run()
    assert out.turns == out.total_turns == work.turns
    assert out.found <= out.history
    assert not run.running
    assert not run.queue


@pytest.mark.parametrize("device", [0, 10**5])
def test_what_a_simulation_leaves_goes_without_a_search_for_cycles(device: int) -> None:
    work = Workload("", [talk(Turn(300, 20), Turn(50, 10), start=float(n)) for n in range(40)])
    gc.collect()
    gc.disable()
    try:
        simulate(work, server(memory=10**6, device=device))
        left = [thing for thing in gc.get_objects() if type(thing) is TimedTiers]
    finally:
        gc.enable()
    assert not left
