"""The order of waiting turns, by hand and by properties."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from hf_attnstore.serving.order import WaitingTurns

Came = list[tuple[str | None, float, float]]
"""Session, priority and the second at which it came, one for each turn; a turn's number is its item."""


def waiting(came: Came, patience: float) -> WaitingTurns[int]:
    turns: WaitingTurns[int] = WaitingTurns(patience)
    for number, (session, priority, now) in enumerate(came):
        turns.add(number, session, priority, now)
    return turns


@st.composite
def arrivals(draw: st.DrawFn) -> Came:
    now, came = 0.0, []
    for _ in range(draw(st.integers(0, 12))):
        now += draw(st.sampled_from([0.0, 1.0, 7.0]))
        came.append((draw(st.sampled_from([None, "a", "b", "c"])), float(draw(st.integers(-1, 3))), now))
    return came


def test_equal_priorities_run_in_the_order_in_which_they_came() -> None:
    turns = waiting([("a", 0, 0.0), ("b", 0, 0.0), (None, 0, 1.0), ("a", 0, 2.0)], patience=30)
    assert turns.order() == [0, 1, 2, 3]


def test_a_step_of_priority_is_worth_so_many_seconds() -> None:
    turns = waiting([("early", 0, 0.0), ("late", 0, 5.0), ("urgent", 1, 12.0)], patience=10)
    assert turns.order() == [0, 2, 1]  # 12 - 10 is before 5, but not before 0


def test_without_patience_for_anything_priorities_mean_nothing_and_with_endless_patience_everything() -> None:
    came: Came = [("a", 0, 0.0), ("b", 2, 1.0), ("c", 1, 1e6)]
    assert waiting(came, patience=0).order() == [0, 1, 2]
    assert waiting(came, patience=math.inf).order() == [1, 2, 0]


def test_an_urgent_turn_takes_along_those_of_its_session_that_wait_before_it() -> None:
    turns = waiting([("b", 0, 0.0), ("a", 0, 1.0), ("c", 1, 2.0), ("a", 5, 3.0), ("a", 0, 4.0)], patience=math.inf)
    assert turns.order() == [1, 3, 2, 0, 4]


def test_a_deferred_session_is_passed_over_and_keeps_its_place() -> None:
    turns = waiting([("a", 0, 0.0), ("a", 0, 1.0), ("b", 0, 2.0)], patience=10)
    turns.defer("a", 7.0)
    assert turns.order() == [0, 1, 2]
    assert turns.first(6.0) == 2
    assert turns.first(7.0) == 0
    assert turns.seconds_to_next(5.0) == 2.0
    turns.remove(0)
    turns.remove(1)
    assert turns.seconds_to_next(5.0) is None


@given(arrivals(), st.sampled_from([0.0, 5.0, math.inf]))
def test_turns_of_a_session_never_change_their_order(came: Came, patience: float) -> None:
    order = waiting(came, patience).order()
    assert sorted(order) == list(range(len(came)))
    for session in "abc":
        own = [number for number in order if came[number][0] == session]
        assert own == sorted(own)


@given(arrivals(), st.sampled_from([0.0, 5.0, math.inf]))
def test_what_is_said_to_come_is_what_comes(came: Came, patience: float) -> None:
    turns = waiting(came, patience)
    said, run = turns.order(), []
    while (item := turns.first(1e9)) is not None:
        assert turns.remove(item)
        run.append(item)
    assert run == said
    assert len(turns) == 0


@given(arrivals(), st.sampled_from([1.0, 5.0]))
def test_nobody_is_overtaken_by_who_came_so_much_later(came: Came, patience: float) -> None:
    order = waiting(came, patience).order()
    highest = max((priority for _, priority, _ in came), default=0.0)
    for place, overtaken in enumerate(order):
        _, priority, since = came[overtaken]
        for other in order[:place]:
            # a turn that lends its rank came later still, so the bound holds for those that it takes along
            assert came[other][2] <= since + (highest - priority) * patience


@given(arrivals(), st.data())
def test_with_endless_patience_a_higher_priority_goes_first(came: Came, data: st.DataObject) -> None:
    alone: Came = [(None, priority, now) for _, priority, now in came]
    order = waiting(alone, math.inf).order()
    assert [alone[number][1] for number in order] == sorted((p for _, p, _ in alone), reverse=True)
    if came:
        turns, gone = waiting(came, math.inf), data.draw(st.integers(0, len(came) - 1))
        assert turns.remove(gone)
        assert not turns.remove(gone)
        assert gone not in turns.order()
