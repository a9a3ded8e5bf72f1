"""Schedules at their endpoints and beyond, and their error messages."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.schedules import (
    Constant,
    Cosine,
    EventClock,
    Linear,
    Polynomial,
    Staircase,
)

KINDS = [Constant, Cosine, Linear, Polynomial, Staircase]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("begin", "end"), [(10, 20), (0.1, 0.2)])
def test_zero_before_begin_and_final_after_end(kind, begin, end):
    schedule = kind(final_sparsity=0.8, initial_sparsity=0.2, begin=begin, end=end)
    assert schedule(begin / 2) == 0.0
    assert schedule(end) == 0.8
    assert schedule(end * 5) == 0.8
    assert schedule(begin) == pytest.approx(0.8 if kind is Constant else 0.2)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (Linear(final_sparsity=0.9, begin=0, end=90), 30, 0.3),
        (Polynomial(final_sparsity=0.9, begin=0, end=90), 30, 0.9 * (1 - (2 / 3) ** 3)),
        (Polynomial(final_sparsity=0.9, begin=0, end=90, power=1), 30, 0.3),
        (Cosine(final_sparsity=0.9, begin=0, end=90), 30, 0.9 * (1 - math.cos(math.pi / 3)) / 2),
        (Staircase(final_sparsity=0.9, begin=0, end=90, stairs=4), 31, 0.3),
        (Staircase(final_sparsity=0.9, begin=0, end=90, stairs=4), 29, 0.0),
    ],
)
def test_values_between(schedule, step, expected):
    assert schedule(step) == pytest.approx(expected)


@given(
    st.sampled_from(KINDS),
    st.floats(0, 0.99),
    st.lists(st.integers(0, 200), min_size=2, max_size=20),
)
def test_never_falls_and_never_overshoots(kind, final, steps):
    schedule = kind(final_sparsity=final, begin=20, end=120)
    values = [schedule(step) for step in sorted(steps)]
    assert values == sorted(values)
    assert all(0 <= value <= final for value in values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_sparsity": 1.0}, r"final_sparsity=1.0: a sparsity lies in \[0, 1\)"),
        ({"final_sparsity": -0.1}, "final_sparsity=-0.1"),
        ({"final_sparsity": True}, "final_sparsity=True"),
        ({"initial_sparsity": 1.5}, "initial_sparsity=1.5"),
        ({"begin": 0.5, "end": 0.5}, "begin=0.5 must be smaller than end=0.5"),
        ({"begin": 100, "end": 50}, "begin=100 must be smaller than end=50"),
        ({"begin": 100, "end": 0.5}, "begin=100 must be smaller"),
        ({"begin": 0.5, "end": 100}, "mix steps"),
        ({"begin": -1, "end": 50}, "begin=-1"),
        ({"end": 1.5}, "end=1.5"),
        ({"end": float("nan")}, "end=nan"),
        ({"end": "0.5"}, "end='0.5'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Polynomial(**arguments)


def test_bad_power_and_stairs():
    with pytest.raises(ValueError, match="power=0"):
        Polynomial(power=0)
    with pytest.raises(ValueError, match="stairs=1"):
        Staircase(stairs=1)


@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.parametrize(("steps", "events"), [(8, 8), (35, 10), (200, 50), (1000, 100)])
def test_short_windows_have_fewer_events(steps, events, fractions):
    clock = EventClock(0, 1.0 if fractions else steps, None, spacing=4)
    due = [
        step
        for step in range(1, steps)
        if clock.tick(step / steps if fractions else step, step).due(unfinished=True)
    ]
    assert len(due) in (events - 1, events)  # the one at the end comes with it
    gaps = [after - before for before, after in itertools.pairwise(due)]
    assert max(gaps) - min(gaps) <= 2  # fractions are not exact
    known = clock.state_dict()
    clock.reset()
    clock.load_state_dict(known)
    assert clock.tick(1.0 if fractions else steps, steps).due(unfinished=True)


def test_a_clock_of_an_earlier_version_goes_on():
    clock = EventClock(0, 40, None)
    earlier = {name: value for name, value in clock.state_dict().items() if name != "_buckets"}
    clock.load_state_dict(earlier)
    assert clock.tick(1, 1).due(unfinished=True)
