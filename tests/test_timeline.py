"""Timelines: the recorder, traces for Perfetto, and what they say of turns that load, compute and save."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from support.tiny_models import make_llama, make_model, tokens
from support.turns import assert_reused, follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.transfer import record as recording
from hf_attnstore.lab.bench.overlap import loading, save_late
from hf_attnstore.store.blocks.stored import StoredBlock
from hf_attnstore.store.transfer.load import Load
from hf_attnstore.timeline import (
    TRACKS,
    Event,
    Recorders,
    Timeline,
    exposed_seconds,
    hidden_seconds,
    intervals,
    lanes,
    total,
    trace,
    trace_json,
    without,
)

LAYERS = 4
HISTORY = 70


# the recorder


def test_events_come_in_the_order_of_their_beginning_whenever_their_times_are_known() -> None:
    timeline = Timeline()
    timeline.add("compute", "b", 2.0, 3.0)
    timeline.add("load", "a", lambda: 1.0, lambda: 4.0)
    timeline.add("load", "c", 2.5)
    first, second, third = timeline.events()
    assert (first, second) == (Event("load", "a", 1.0, 4.0), Event("compute", "b", 2.0, 3.0))
    assert third[:3] == ("load", "c", 2.5)
    assert third.end > 2.5
    assert timeline.events()[:2] == (first, second)


def test_a_timeline_takes_a_limited_number_of_events_from_all_threads_and_counts_the_others() -> None:
    timeline = Timeline(most=1000)

    def add(thread: int) -> None:
        for number in range(300):
            timeline.add("load", f"{thread}", number, number + 1)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline) == len(timeline.events()) == 1000
    assert timeline.dropped == 1400


def test_what_goes_on_in_the_background_is_told_to_those_who_listen_and_are_still_there() -> None:
    recorders = Recorders()
    recorders.add("write", "nobody", 0.0)
    one, other = Timeline(), Timeline()
    recorders.include(one)
    recorders.include(one)
    recorders.include(other)
    recorders.add("write", "both", 0.0)
    recorders.leave_out(other)
    recorders.leave_out(other)
    recorders.add("fetch", "one", 0.0)
    assert [event.name for event in one.events()] == ["both", "one"]
    assert [event.name for event in other.events()] == ["both"]
    del one
    recorders.add("fetch", "nobody", 0.0)
    assert len(recorders) == 0


# looking at events

_events = some.lists(
    some.builds(
        lambda track, begin, length: Event(track, "x", float(begin), float(begin + length)),
        some.sampled_from(["compute", "wait", "load"]),
        some.integers(0, 30),
        some.integers(0, 10),
    ),
    max_size=12,
)


def seconds_of(events: Sequence[Event], *tracks: str) -> set[int]:
    """The whole seconds in which something happens on one of the tracks."""
    return {n for event in events if event.track in tracks for n in range(int(event.begin), int(event.end))}


@given(_events)
def test_time_on_tracks_is_counted_once(events: list[Event]) -> None:
    load, compute, wait = (seconds_of(events, track) for track in ("load", "compute", "wait"))
    assert total(intervals(events, "load")) == len(load)
    assert total(intervals(events, "load", "compute")) == len(load | compute)
    assert total(without(intervals(events, "load"), intervals(events, "wait"))) == len(load - wait)
    assert exposed_seconds(events) == len(wait)
    assert hidden_seconds(events, "load") == len(load & (compute - wait))


@given(_events)
def test_lanes_have_every_event_once_and_no_two_at_a_time(events: list[Event]) -> None:
    found = lanes(events)
    assert sorted(event for lane in found for event in lane) == sorted(events)
    for lane in found:
        assert all(before.end <= after.begin for before, after in pairwise(lane))


def assert_is_a_trace(found: Any, events: Sequence[Event]) -> None:
    """As the Trace Event Format wants its JSON object format: complete events, and metadata that name the threads."""
    assert set(found) == {"traceEvents", "displayTimeUnit"}
    assert found["displayTimeUnit"] in ("ms", "ns")
    names: dict[int, str] = {}
    complete = []
    for entry in found["traceEvents"]:
        assert isinstance(entry["name"], str)
        assert isinstance(entry["pid"], int)
        assert isinstance(entry["tid"], int)
        assert isinstance(entry["ts"], (int, float))
        assert entry["ph"] in ("X", "M")
        if entry["ph"] == "M":
            assert set(entry) == {"ph", "name", "pid", "tid", "ts", "args"}
            key = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}[entry["name"]]
            assert isinstance(entry["args"][key], int if key == "sort_index" else str)
            if entry["name"] == "thread_name":
                assert entry["tid"] not in names
                names[entry["tid"]] = entry["args"]["name"]
        else:
            assert set(entry) == {"ph", "name", "cat", "pid", "tid", "ts", "dur"}
            assert entry["dur"] >= 0
            assert entry["ts"] >= 0
            complete.append(entry)
    assert {entry["pid"] for entry in found["traceEvents"]} == {1}
    assert {entry["tid"] for entry in complete} == set(names)
    assert len(set(names.values())) == len(names)
    for thread in names:  # on one thread, events follow each other
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in complete if e["tid"] == thread)
        assert all(before[1] <= after[0] + 1e-3 for before, after in pairwise(own))
    assert sorted((e["cat"], e["name"]) for e in complete) == sorted((e.track, e.name) for e in events)
    for entry in complete:
        assert names[entry["tid"]].split()[0] == entry["cat"]


@given(_events)
def test_a_trace_is_what_viewers_take(events: list[Event]) -> None:
    assert_is_a_trace(trace(events), events)


def test_a_trace_counts_microseconds_from_the_first_event() -> None:
    events = [
        Event("load", "layer 1", 100.0, 100.5),
        Event("compute", "layer 0", 100.25, 101.0),
        Event("load", "layer 2", 100.25, 100.75),
        Event("other", "x", 102.0, 102.0),
    ]
    found = json.loads(trace_json(events, "a turn"))
    assert_is_a_trace(found, events)
    rows = {(e["cat"], e["name"]): (e["tid"], e["ts"], e["dur"]) for e in found["traceEvents"] if e["ph"] == "X"}
    assert rows[("compute", "layer 0")] == (1, 250_000, 750_000)
    assert rows[("load", "layer 1")] == (2, 0, 500_000)
    assert rows[("load", "layer 2")] == (3, 250_000, 500_000)
    assert rows[("other", "x")] == (4, 2_000_000, 0)
    threads = {e["tid"]: e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name"}
    assert threads == {1: "compute", 2: "load", 3: "load 2", 4: "other"}
    assert found["traceEvents"][0]["args"] == {"name": "a turn"}


# turns


def named(events: Sequence[Event], track: str) -> dict[str, Event]:
    found = [event for event in events if event.track == track]
    assert len({event.name for event in found}) == len(found)
    return {event.name: event for event in found}


def layer_names(count: int = LAYERS) -> list[str]:
    return [f"layer {number}" for number in range(count)]


@pytest.fixture
def resumed(store: AttentionStore) -> tuple[Any, torch.Tensor]:
    """A model of four layers, and a prompt whose beginning is on disk and not in memory."""
    model = make_llama(num_hidden_layers=LAYERS)
    sequence = turn(model, tokens(HISTORY), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    return model, follow_up(sequence, 30, 2)


def test_a_resumed_turn_shows_loading_computing_saving_writing_and_fetching(
    resumed: tuple[Any, torch.Tensor], store: AttentionStore
) -> None:
    model, prompt = resumed
    cache = AttentionStoreCache(model, "alice", store, record=True)
    assert cache.timeline == ()
    ours = turn(model, prompt, cache, max_new_tokens=5)
    assert torch.equal(
        ours.sequences, turn(make_llama(num_hidden_layers=LAYERS), prompt, None, max_new_tokens=5).sequences
    )
    assert_reused(cache, prompt, HISTORY + 5)
    store.flush()
    events = cache.timeline
    assert {event.track for event in events} == set(TRACKS)
    assert all(event.begin <= event.end for event in events)
    compute, load, wait = (named(events, track) for track in ("compute", "load", "wait"))
    assert list(compute) == [*layer_names(), *(f"step {number}" for number in range(1, 5))]
    assert list(load) == list(wait) == layer_names()
    for name in layer_names():
        assert compute[name].begin <= wait[name].begin <= load[name].begin
        assert load[name].end <= wait[name].end <= compute[name].end  # there when attention needs it, no later
    assert all(before.end <= after.begin for before, after in pairwise(compute.values()))
    assert exposed_seconds(events) == pytest.approx(cache.stats.exposed_load_seconds, rel=0.5)

    save = named(events, "save")
    assert list(save) == [*layer_names(), "end of the turn"]
    for name in layer_names():  # handed over when it has computed
        assert save[name].begin >= compute[name].end
    written = named(events, "write")
    assert written.keys() == {"tokens 64–80", "tokens 80–96", "tokens 96–110"}
    assert all(event.begin >= save["layer 3"].end for event in written.values())
    fetched = named(events, "fetch")
    assert fetched.keys() <= {f"tokens {n}–{n + 16}" for n in range(0, 64, 16)} | {"tokens 64–75"}
    assert "tokens 0–16" in fetched
    assert all(event.begin >= compute["step 4"].end for event in fetched.values())
    assert_is_a_trace(json.loads(trace_json(events)), events)
    assert len(store.recorders) == 0  # what comes now is of other turns


def test_only_what_is_asked_for_is_recorded(resumed: tuple[Any, torch.Tensor], store: AttentionStore) -> None:
    model, prompt = resumed
    cache = AttentionStoreCache(model, "alice", store)
    turn(model, prompt, cache)
    assert cache.timeline == ()
    assert len(store.recorders) == 0
    cache.record_timeline = True
    assert cache.timeline == ()
    again = turn(model, prompt[:, :80], cache, max_new_tokens=3).sequences
    assert list(named(cache.timeline, "compute")) == [*layer_names(), "step 1", "step 2"]
    first = named(cache.timeline, "save")["end of the turn"]
    turn(model, follow_up(again, 3, 5), cache, max_new_tokens=1)
    computed = named(cache.timeline, "compute")
    assert list(computed) == layer_names()  # of the last turn alone: only blocks may still be written of the one before
    assert computed["layer 0"].begin > first.begin
    cache.record_timeline = False
    turn(model, prompt[:, :60], cache)
    assert cache.timeline == ()


def test_a_loop_of_ones_own_is_recorded_up_to_its_save(
    resumed: tuple[Any, torch.Tensor], store: AttentionStore
) -> None:
    model, prompt = resumed
    cache = AttentionStoreCache(model, "alice", store, record=True)
    with torch.no_grad():
        done = cache.match(prompt)
        assert done == HISTORY + 5
        assert list(named(cache.timeline, "load")) == layer_names()
        model(input_ids=prompt[:, done:], past_key_values=cache)
        model(input_ids=tokens(1), past_key_values=cache)
        cache.save()
    assert list(named(cache.timeline, "compute")) == [*layer_names(), "step 1"]
    assert "end of the turn" in named(cache.timeline, "save")


def test_many_steps_become_one_event(store: AttentionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_STEPS", 3)
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store, record=True)
    turn(model, tokens(20), cache, max_new_tokens=12)
    compute = named(cache.timeline, "compute")
    assert list(compute) == [*layer_names(2), "step 1", "step 2", "step 3", "steps 4 to 11"]
    assert compute["steps 4 to 11"].begin >= compute["step 3"].end


def test_a_batch_shows_what_its_rows_do(store: AttentionStore) -> None:
    model = make_llama(num_hidden_layers=LAYERS)
    for name, seed in (("a", 1), ("b", 2)):
        turn(model, tokens(40, seed), AttentionStoreCache(model, name, store))
    store.drop_memory()
    cache = AttentionStoreCache(model, ["a", "b"], store, record=True)
    prompts = torch.cat([tokens(40, 1), tokens(40, 2)])
    turn(model, prompts, cache, max_new_tokens=3)
    assert [row.reused_tokens for row in cache.row_stats] == [39, 39]
    store.flush()
    events = cache.timeline
    assert len(set(events)) == len(events)
    loads = [event.name for event in events if event.track == "load"]
    assert sorted(loads) == sorted(2 * layer_names())
    assert list(named(events, "compute")) == [*layer_names(), "step 1", "step 2"]


def test_an_encoder_decoder_shows_what_it_loads(store: AttentionStore) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(tokens(40), past_key_values=AttentionStoreCache(model, "doc", store), **settings)
    store.drop_memory()
    cache = AttentionStoreCache(model, "doc", store, record=True)
    assert torch.equal(model.generate(tokens(40), past_key_values=cache, **settings), first)
    assert cache.stats.encoder_reused == 40
    assert {event.name for event in cache.timeline if event.track == "load"} == set(layer_names(2))
    assert any(event.track == "compute" for event in cache.timeline)


def test_a_turn_that_is_begun_again_after_a_failed_load_is_one_turn(
    resumed: tuple[Any, torch.Tensor], store: AttentionStore
) -> None:
    model, prompt = resumed
    path = max((store.path / "blocks").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-200])
    cache = AttentionStoreCache(model, "alice", store, record=True)
    ours = turn(model, prompt, cache, max_new_tokens=2)
    assert cache.stats.recomputed
    assert torch.equal(
        ours.sequences, turn(make_llama(num_hidden_layers=LAYERS), prompt, None, max_new_tokens=2).sequences
    )
    compute = [event.name for event in cache.timeline if event.track == "compute"]
    assert compute[-LAYERS - 1 :] == [*layer_names(), "step 1"]


# overlap


def test_io_threads_bring_a_layer_while_the_one_before_computes(
    resumed: tuple[Any, torch.Tensor], store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source gives a layer only when the one before it is computing, and that one ends only when the source is
    asked for the layer: without overlap this would never end."""
    model, prompt = resumed
    computing = [threading.Event() for _ in range(LAYERS)]
    asked_for = [threading.Event() for _ in range(LAYERS)]

    def compute_slowly(number: int, *_: Any) -> None:
        computing[number].set()
        assert number + 1 == LAYERS or asked_for[number + 1].wait(20)

    compute_slowly.__module__ = "hf_attnstore.testing"  # a hook of the package's own is no part of what computes
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(functools.partial(compute_slowly, number))
    read = StoredBlock.read

    def read_slowly(self: StoredBlock, wanted: Any) -> int:
        name = wanted[0][0].spec.name  # layers.1.keys, or the ids, which are not for a layer
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        asked_for[layer].set()
        assert layer == 0 or computing[layer - 1].wait(20)
        return read(self, wanted)

    monkeypatch.setattr(StoredBlock, "read", read_slowly)
    cache = AttentionStoreCache(model, "alice", store, save=False, record=True)
    cache.begin_load = loading(io_threads=True)
    ours = turn(model, prompt, cache, max_new_tokens=2)
    assert torch.equal(
        ours.sequences, turn(make_llama(num_hidden_layers=LAYERS), prompt, None, max_new_tokens=2).sequences
    )
    assert_reused(cache, prompt, HISTORY + 5)
    events = cache.timeline
    compute = named(events, "compute")
    for number in range(LAYERS - 1):
        pieces = [e for e in events if e.track == "load" and e.name == f"layer {number + 1}"]
        assert pieces
        assert min(piece.begin for piece in pieces) < compute[f"layer {number}"].end
        assert all(piece.end >= compute[f"layer {number}"].begin for piece in pieces)
        assert all(piece.end <= compute[f"layer {number + 1}"].end for piece in pieces)


@pytest.mark.parametrize("io_threads", [False, True])
def test_without_overlap_everything_is_there_before_the_first_layer_computes(
    io_threads: bool, resumed: tuple[Any, torch.Tensor], store: AttentionStore
) -> None:
    model, prompt = resumed
    cache = AttentionStoreCache(model, "alice", store, save=False, record=True)
    cache.begin_load = loading(first=True, io_threads=io_threads)
    ours = turn(model, prompt, cache, max_new_tokens=2)
    assert torch.equal(
        ours.sequences, turn(make_llama(num_hidden_layers=LAYERS), prompt, None, max_new_tokens=2).sequences
    )
    assert_reused(cache, prompt, HISTORY + 5)
    assert cache.stats.blocks_from == {"disk": 5}
    events = cache.timeline
    loads = [event for event in events if event.track == "load"]
    assert {event.name for event in loads} == set(layer_names())
    assert max(event.end for event in loads) <= named(events, "compute")["layer 0"].begin
    assert hidden_seconds(events, "load") == 0


def test_the_depth_of_the_look_ahead_can_be_set(
    resumed: tuple[Any, torch.Tensor], store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = resumed
    asked: list[int] = []
    request = Load.request
    monkeypatch.setattr(Load, "request", lambda self, stage: (asked.append(stage), request(self, stage))[1])
    for depth in (1, 3):
        cache = AttentionStoreCache(model, "alice", store, save=False)
        cache.begin_load = loading(depth=depth)
        asked.clear()
        turn(model, prompt, cache, max_new_tokens=1)
        assert_reused(cache, prompt, HISTORY + 5)
        ahead_and_needed = [(number + depth, number) for number in range(LAYERS)]
        assert asked == [depth, *(stage for pair in ahead_and_needed for stage in pair)]
        store.drop_memory()


def test_saving_can_wait_for_the_end_of_the_turn(resumed: tuple[Any, torch.Tensor], store: AttentionStore) -> None:
    model, prompt = resumed
    cache = save_late(AttentionStoreCache(model, "alice", store, record=True))
    ours = turn(model, prompt, cache, max_new_tokens=5).sequences
    save = named(cache.timeline, "save")
    assert list(save) == ["end of the turn"]
    assert save["end of the turn"].begin >= named(cache.timeline, "compute")["step 4"].end
    store.drop_memory()
    again = AttentionStoreCache(model, "alice", store)
    turn(model, ours, again, max_new_tokens=1)
    assert_reused(again, ours, ours.shape[1] - 1)


# a GPU


@pytest.mark.gpu
def test_on_a_gpu_times_are_those_of_the_device(store: AttentionStore) -> None:
    model = make_llama(num_hidden_layers=LAYERS).cuda()
    ids = tokens(HISTORY).cuda()
    sequence = turn(model, ids, AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    prompt = follow_up(sequence, 30, 2)
    plain = turn(make_llama(num_hidden_layers=LAYERS).cuda(), prompt, None, max_new_tokens=5).sequences
    cache = AttentionStoreCache(model, "alice", store, record=True)
    assert torch.equal(turn(model, prompt, cache, max_new_tokens=5).sequences, plain)
    store.flush()
    events = cache.timeline
    compute, wait, save = (named(events, track) for track in ("compute", "wait", "save"))
    assert list(compute)[:LAYERS] == list(wait) == layer_names()
    copies = [event for event in events if event.track == "load" and event.name.endswith("copy")]
    assert {event.name.split(",")[0] for event in copies} == set(layer_names())
    for event in copies:
        name = event.name.split(",")[0]
        assert event.end <= compute[name].end + 1e-4  # the device computes attention when the copy is there
    assert all(before.end <= after.begin + 1e-4 for before, after in pairwise(compute.values()))
    for name in layer_names():
        assert save[name].end >= compute[name].end - 1e-4
    assert_is_a_trace(json.loads(trace_json(events)), events)
