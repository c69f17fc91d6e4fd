"""What a turn's footer and the plots say: measured, estimated, or nothing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from hf_attnstore.sizes import format_seconds
from hf_attnstore.ui.expecting import AGAIN_AFTER, WITHIN, Expectations
from hf_attnstore.ui.messages import aside, shown, turn_at
from hf_attnstore.ui.panel import conversation_panel, store_panel
from hf_attnstore.ui.plots import tiers_plot, timeline_plot, times_plot
from hf_attnstore.ui.records import TurnRecord, cost_of_recomputing, footer, from_json, replaced, to_json
from hf_attnstore.ui.sessions import Conversation, Exchange, ago, shortened

FIRST = TurnRecord(ttft=0.5, prompt=100, prefilled=100)
LATER = TurnRecord(ttft=0.1, prompt=200, reused=180, prefilled=20)


def test_a_turn_with_nothing_to_reuse_is_what_recomputing_costs() -> None:
    assert cost_of_recomputing([FIRST], 0) == (0.5, "measured")
    assert "recomputing: the same, as nothing was reused" in footer([FIRST], 0)


def test_without_any_measure_the_cost_is_estimated_from_prefills_and_said_to_be() -> None:
    cost = cost_of_recomputing([FIRST, LATER], 1)
    assert cost == (pytest.approx(1.0), "estimated")  # 5 ms for each token beyond the 100 that took 0.5 s
    assert "recomputing: 1.00 s (estimated), 10 × as long" in footer([FIRST, LATER], 1)


def test_prefills_of_about_one_length_say_nothing_of_the_cost() -> None:
    near = replace(LATER, prefilled=95, reused=105)
    assert cost_of_recomputing([FIRST, near], 1) is None
    assert "recomputing: not known yet" in footer([FIRST, near], 1)


def test_the_estimate_of_the_cache_comes_before_one_of_the_page() -> None:
    assert cost_of_recomputing([FIRST, replace(LATER, recompute_estimate=0.7)], 1) == (0.7, "estimated")


def test_tried_on_this_turn_it_is_measured() -> None:
    without = TurnRecord(with_store=False, ttft=0.8, prompt=200, prefilled=200)
    records = replaced([FIRST, replace(LATER, recompute_estimate=0.7)], 1, without)
    assert cost_of_recomputing(records, 1) == (0.8, "measured")
    assert "first token after 800 ms without the store" in footer(records, 1)
    assert "with the store: 100 ms (measured)" in footer(records, 1)
    records = replaced(records, 1, LATER)  # and back again
    assert cost_of_recomputing(records, 1) == (0.8, "measured")
    assert "recomputing: 800 ms (measured), 8 × as long" in footer(records, 1)


def test_tried_on_another_turn_of_the_conversation_it_is_measured_nearby() -> None:
    tried = TurnRecord(with_store=False, ttft=0.9, prompt=180, prefilled=180)
    cost = cost_of_recomputing([FIRST, tried, LATER], 2)
    assert cost == (pytest.approx(0.9 + 20 * 0.8 / 160), "measured nearby")


def test_another_answer_to_another_prompt_is_no_comparison() -> None:
    records = replaced([FIRST, LATER], 1, TurnRecord(with_store=False, ttft=0.8, prompt=150, prefilled=150))
    assert records[1] is not None
    assert records[1].ttft_with is None


def test_an_edit_drops_the_records_of_what_followed_and_gaps_are_gaps() -> None:
    assert replaced([FIRST, LATER, LATER], 0, LATER) == [replace(LATER)]
    assert replaced([], 2, FIRST) == [None, None, FIRST]


def test_records_survive_being_kept_and_unknown_ones_are_none() -> None:
    records = [FIRST, None, LATER]
    assert from_json(json.loads(json.dumps(to_json(records))), 3) == records
    assert from_json(json.loads(json.dumps(to_json(records))), 1) == [FIRST]
    assert from_json(None, 2) == [None, None]
    assert from_json([{"ttft": 1.0, "of a later version": 1}, 7], 2) == [TurnRecord(ttft=1.0), None]


def test_the_footer_says_where_the_prompt_parted_from_what_is_known() -> None:
    parted = "agrees up to token 8 of 445; then '<b>30 Nov' where 'alice' had '29 Nov'"
    record = replace(LATER, diverged=parted)
    assert parted in footer([FIRST, record], 1)
    assert from_json(json.loads(json.dumps(to_json([record]))), 1) == [record]
    exchange = Exchange("hello", "yes", record=record)
    assert "&lt;b&gt;30 Nov" in shown([exchange])[-1]["content"]  # words of a conversation are text, not HTML


def test_the_footer_says_what_was_fetched_cut_and_waited_for() -> None:
    record = replace(LATER, fetched_bytes=2048, fetched_seconds=0.003, waited=2.0, finish="length", dropped=1200)
    words = footer([record], 0)
    assert "2.0 KiB fetched before you sent it, which saved about 3.0 ms of loading" in words
    assert "waited 2.00 s for others" in words
    assert "cut at the longest answer" in words
    assert "the oldest 1,200 tokens are out of the window" in words


def test_times_and_sizes_are_for_people() -> None:
    assert [format_seconds(t) for t in (0.0004, 0.0234, 1.239, 26.04)] == ["0.4 ms", "23 ms", "1.24 s", "26.0 s"]
    assert [ago(0, now) for now in (5, 70, 7200, 200_000)] == ["just now", "1 minute ago", "2 hours ago", "2 days ago"]
    assert shortened("the old prince", 8) == "the old…"
    assert shortened("the old prince", 14) == "the old prince"


def test_answers_and_names_can_not_put_markup_on_the_page() -> None:
    assert "<script>" not in aside("<script>alert(1)</script>", "wrong")["content"]
    svg = timeline_plot([("<b>", "<script>", 0.0, 1.0)])
    assert "<script>" not in svg
    assert "<b>" not in svg


def test_plots_are_well_formed_and_show_every_turn_and_event() -> None:
    times = ElementTree.fromstring(times_plot([0.1, None, 0.3], [(0.5, True), None, (0.9, False)]))
    assert [c.get("class") for c in times.iter("circle")] == ["without", "without estimated", "with", "with"]
    tiers = ElementTree.fromstring(tiers_plot([("memory", 512, 1024), ("disk", 0, 1024)]))
    (bar,) = [r for r in tiers.iter("rect") if r.get("class") == "with"]
    assert float(bar.get("width", "0")) == pytest.approx(120)
    line = ElementTree.fromstring(timeline_plot([("compute", "layer 0", 1.0, 1.5), ("load", "layer 1", 1.2, 2.0)]))
    boxes = {r.get("class"): float(r.get("width", "0")) for r in line.iter("rect") if r.get("class") != "room"}
    assert boxes["track-load"] == pytest.approx(boxes["track-compute"] * 1.6, rel=0.01)


def test_panels_of_nothing_are_panels() -> None:
    assert "first turn shows here" in conversation_panel(None)
    stats = {"memory_bytes": 0, "memory_capacity": 10, "disk_bytes": 0, "disk_capacity": 0}
    assert "–" in store_panel({**stats, "prompt_tokens": 0, "reused_tokens": 0})
    told = conversation_panel(
        Conversation("talk", (Exchange("a", "b", record=FIRST), Exchange("c", "d", record=LATER)))
    )
    assert "60% of 300" in told


def test_the_turn_of_a_message_is_found_among_footers_and_reasoning() -> None:
    messages = shown([Exchange("a", "b", "hm", FIRST), Exchange("c", "d", record=None), Exchange("e", "f")])
    assert [m["role"] for m in messages] == ["user", "assistant", "assistant", "user", "assistant", "user", "assistant"]
    assert [turn_at(messages, index) for index in (0, 3, 5, [5, 0])] == [0, 1, 2, 2]


class _Store:
    namespace = "ann"

    def __init__(self) -> None:
        self.places = {"memory": 100, "disk": 500}
        self.told: list[float] = []

    def residence(self, name: str) -> dict[str, int]:
        return dict(self.places)

    def expect(self, name: str, within: float) -> None:
        self.told.append(within)


def test_the_store_is_told_once_in_a_while_and_what_it_fetched_is_counted() -> None:
    now = [0.0]
    store, expectations = _Store(), Expectations(lambda: now[0])
    for now[0] in (0.0, 1.0, AGAIN_AFTER - 0.1):
        expectations.expect(store, "talk")
    assert store.told == [WITHIN]
    now[0] = AGAIN_AFTER + 1
    expectations.expect(store, "talk")
    assert len(store.told) == 2
    store.places["memory"] = 450
    assert expectations.take(store, "talk") == (350, None)
    assert expectations.take(store, "talk") == (0, None)
    expectations.expect(store, "talk")
    store.places = {"memory": 900, "disk": 950}  # a turn computed that
    expectations.forget(store, "talk")
    assert expectations.take(store, "talk") == (0, None)
