"""Ranges against numpy and brute force, and observers that settle once a step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.grids import grid_of_range
from lightning_compress.quantization.ranges import (
    MOMENTUM,
    OBSERVERS,
    RangeObserver,
    affine_grid,
    find_range,
    merge_ranges,
    minmax_range,
    mse_range,
    percentile_range,
)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_percentiles_equal_numpys(seed, percentile):
    values = draw(seed, 301) + 0.3
    low, high = percentile_range(values, percentile=percentile)
    tails = [50 - 50 * percentile, 50 + 50 * percentile]
    expected = np.percentile(values.numpy(), tails, method="nearest")
    ordered = values.sort().values
    for found, wanted, bound in ((low, expected[0], "max"), (high, expected[1], "min")):
        near = (ordered - wanted).abs().argmin()
        around = ordered[max(near - 1, 0) : near + 2].clamp(**{bound: 0})
        assert (found - around).abs().min() < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_mse_range_has_the_least_error_of_all_shares(bits, symmetric):
    values = draw(bits, 4, 500) ** 3
    rules = {"bits": bits, "symmetric": symmetric, "axis": 0}
    low, high = mse_range(values, axis=0, bits=bits, symmetric=symmetric)
    grid = grid_of_range(low, high, **rules)
    error = (grid.project(values) - values).square().sum(1)
    full_low, full_high = minmax_range(values, axis=0)
    if symmetric:
        full_high = torch.maximum(-full_low, full_high)
        full_low = -full_high
    for part in np.arange(1, 33) / 32:
        rival = grid_of_range(part * full_low, part * full_high, **rules)
        assert (error <= (rival.project(values) - values).square().sum(1) * 1.0001).all()
    clipped = affine_grid(values, **rules).project(values)
    if bits <= 4:  # heavy tails: the whole range is a bad one
        assert error.sum() < 0.95 * (clipped - values).square().sum()


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_all_ranges_hold_zero_and_lie_within_the_extremes(observer, axis):
    values = draw(3, 5, 7, 11) + 5
    low, high = find_range(observer, values, axis, symmetric=False)
    least, most = minmax_range(values, axis)
    assert low.shape == high.shape == ((1,) if axis is None else (values.shape[axis],))
    assert (low == 0).all()
    assert (high <= most).all()
    assert (low >= least).all()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_values_that_are_not_finite_are_refused(observer):
    for bad in (float("nan"), float("inf"), -float("inf")):
        values = torch.ones(9)
        values[3] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            find_range(observer, values)
        with pytest.raises(ValueError, match="NaN or infinite"):
            RangeObserver(observer).observe(values)


def test_a_step_settles_all_that_it_saw_at_once():
    widest, moving = RangeObserver("minmax"), RangeObserver("moving_average")
    steps = [[draw(1, 50), draw(2, 50)], [3 * draw(3, 50)], [draw(4, 50), draw(5, 50)]]
    expected = None
    for step in steps:
        for values in step:
            widest.observe(values)
            moving.observe(values)
        before = widest.range
        assert moving.range == expected  # unmoved until the step ends
        merge_ranges([widest])
        merge_ranges([moving])
        joined = torch.cat(step)
        bounds = joined.min().item(), joined.max().item()
        if expected is None:
            expected = bounds
        else:
            pairs = zip(expected, bounds, strict=True)
            expected = tuple(old + MOMENTUM * (new - old) for old, new in pairs)
        assert before is None or widest.range[0] <= before[0] <= before[1] <= widest.range[1]
        assert moving.range == pytest.approx(expected)
    everything = torch.cat([one for step in steps for one in step])
    assert widest.range == (everything.min().item(), everything.max().item())


@pytest.mark.parametrize("observer", OBSERVERS)
def test_processes_agree_on_what_they_saw_together(observer):
    """Two observers, each with half of the rows, and a reduction between them."""
    rows = draw(7, 2, 4000)
    halves = [RangeObserver(observer) for _ in range(2)]
    for half, values in zip(halves, rows, strict=True):
        half.observe(values)
    both = [half.gathered.clone()[None] for half in halves]

    def reduce(values, how):
        part = slice(0, 2) if values.shape[1] == 2 else slice(2, 3)
        stacked = torch.stack([one[:, part] for one in both])
        return stacked.min(0).values if how == "min" else stacked.sum(0)

    for half in halves:
        merge_ranges([half], reduce)
    assert halves[0].range == halves[1].range
    alone = [find_range(observer, values, symmetric=False) for values in rows]
    lows, highs = (torch.cat(bounds) for bounds in zip(*alone, strict=True))
    if observer in ("minmax", "moving_average"):
        expected = lows.min().item(), highs.max().item()
    else:
        expected = lows.mean().item(), highs.mean().item()
    assert halves[0].range == pytest.approx(expected)


def test_nothing_seen_is_no_range_and_states_come_back():
    one = RangeObserver("minmax")
    one.observe(torch.empty(0))
    merge_ranges([one])
    assert one.range is None
    one.observe(draw(1, 9))
    merge_ranges([one])
    one.observe(5 * draw(2, 9))
    other = RangeObserver("minmax")
    other.load_state_dict(one.state_dict())
    merge_ranges([one])
    merge_ranges([other])
    assert one.range == other.range
