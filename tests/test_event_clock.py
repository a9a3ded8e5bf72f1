"""When events are due, what is ahead, and a clock that can be held."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.schedules import EventClock

windows = st.tuples(st.integers(0, 40), st.integers(1, 300)).map(lambda w: (w[0], w[0] + w[1]))


@given(windows, st.one_of(st.none(), st.integers(1, 50)))
@settings(deadline=None)
def test_ahead_says_in_steps_when_the_next_event_is(window, frequency):
    events = EventClock(*window, frequency)
    due = []
    for step in range(1, window[1] + 1):
        told = events.ahead()
        events.tick(step, step)
        if events.due(unfinished=True):
            due.append(step)
            assert told == 1
        else:
            assert told > 1
    if frequency is not None:
        first = window[0] or frequency
        assert due == [*(s for s in range(first, window[1], frequency)), window[1]]
    assert due[-1] == window[1]


@pytest.mark.parametrize("frequency", [None, 7])
def test_fractions_see_events_ahead_by_the_pace(frequency):
    events, told = EventClock(0.25, 0.75, frequency), {}
    for step in range(1, 601):
        told[step] = events.tick(step / 800, step).ahead() + step
        if events.due(unfinished=True) and step > 201:
            assert abs(told[step - 2] - step) <= 1


def test_a_held_clock_stands_still_and_shifts_what_follows():
    events, due = EventClock(2, 12, 4), []
    for step in range(1, 20):
        hold = 5 <= step < 8
        events.tick(step, step, hold=hold, total=20)
        if not hold and events.due(unfinished=True) and not events.over:
            due.append(step)
        if hold:
            assert events.position == 4
    assert due == [2, 9, 13]
    assert events.position == 16


@pytest.mark.parametrize(("raw", "end", "total"), [(None, 0.7, 1.0), (int, 70, 100)])
def test_a_clock_that_is_always_held_still_ends_with_the_run(raw, end, total):
    begin = 0 if raw else 0.0
    events = EventClock(begin, end, None)
    for step in range(1, 101):
        events.tick(step if raw else step / 100, step, hold=True, total=total)
    assert events.position >= end
    assert events.position == pytest.approx(end, abs=1.5 if raw else 0.015)


def test_nothing_is_held_outside_the_window():
    events = EventClock(10, 20, 5)
    for step in range(1, 10):
        events.tick(step, step, hold=True)
    assert events.position == 9
    for step in range(10, 40):
        events.tick(step, step)
    assert events.tick(40, 40, hold=True).position == 40


def test_state_returns():
    one, other = EventClock(0.1, 0.9, None), EventClock(0.1, 0.9, None)
    for step in range(1, 50):
        one.tick(step / 100, step, hold=step % 7 == 0, total=1.0)
        one.due(unfinished=False)
    other.load_state_dict(one.state_dict())
    for step in range(50, 100):
        answers = []
        for events in (one, other):
            events.tick(step / 100, step)
            answers.append((events.position, events.due(unfinished=False), events.ahead()))
        assert answers[0] == answers[1]


def test_ahead_is_infinite_when_nothing_comes_or_nothing_is_known():
    assert EventClock(0.5, 0.9, None).ahead() == math.inf
    assert EventClock(0.0, 0.9, None).ahead() == 1
    assert EventClock(0, 10, 2).tick(11, 11).ahead() == math.inf
