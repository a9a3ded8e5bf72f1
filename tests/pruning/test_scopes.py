"""Scopes: exact totals, densities by the paper's formula, and bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.pruning.granularity import Units
from lightning_compress.pruning.masks import (
    erk_unit_masks,
    global_masks,
    global_unit_masks,
    kept_counts,
    layer_unit_masks,
)


def units(*scores, closed=None, sizes=None):
    closed, sizes = closed or [None] * len(scores), sizes or [1] * len(scores)
    return [
        Units(one, shut, one.numel(), one.shape, lambda mask: mask, size=size)
        for one, shut, size in zip(scores, closed, sizes, strict=True)
    ]


def random_scores(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 20, shape, generator=generator).float() for shape in shapes]


@given(st.floats(0, 0.85), st.integers(0, 1000), st.floats(0, 0.1))
@settings(deadline=None)
def test_together_equals_one_sort_with_the_best_of_each_out_of_reach(sparsity, seed, floor):
    scores = random_scores(seed, (7, 9), (3, 4, 5), (40,))
    scores[1] /= 100  # a layer that would die
    keep = [math.ceil(floor * one.numel()) for one in scores]
    protected = []
    for score, count in zip(scores, keep, strict=True):
        order = score.flatten().argsort(stable=True, descending=False)
        best = order[len(order) - count :]
        protected.append(score.flatten().index_fill(0, best, math.inf).view(score.shape))
    expected = global_masks(protected, sparsity)
    got = global_unit_masks(units(*scores), sparsity, keep)
    for one, other, count in zip(got, expected, keep, strict=True):
        assert torch.equal(one, other)
        assert int(one.sum()) >= count


@given(st.floats(0, 1), st.integers(0, 1000))
@settings(deadline=None)
def test_layer_counts_are_exact_but_for_floors(sparsity, seed):
    scores = random_scores(seed, (7, 9), (4,))
    big, small = layer_unit_masks(units(*scores), sparsity, [0, 1])
    assert int((~big).sum()) == round(sparsity * 63)
    assert int((~small).sum()) == min(round(sparsity * 4), 3)


def erk_by_the_paper(shapes, density):
    """Evci et al. 2020: epsilon from the layers that are not full, full ones taken out in turn."""
    full = set()
    while True:
        total = density * sum(map(math.prod, shapes))
        spent = sum(math.prod(shapes[index]) for index in full)
        share = sum(sum(one) for index, one in enumerate(shapes) if index not in full)
        epsilon = (total - spent) / share
        raw = [epsilon * sum(one) / math.prod(one) for one in shapes]
        over = {index for index, one in enumerate(raw) if one > 1} - full
        if not over:
            return [1.0 if index in full else one for index, one in enumerate(raw)]
        full |= over


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9, 0.98])
def test_erk_densities_follow_the_paper_and_the_total_is_exact(sparsity):
    shapes = [(64, 16, 3, 3), (8, 64), (10, 8), (32, 1, 5, 5)]
    masks = erk_unit_masks(units(*random_scores(0, *shapes)), sparsity, [0] * 4)
    total = sum(map(math.prod, shapes))
    assert sum(int((~mask).sum()) for mask in masks) == round(sparsity * total)
    expected = erk_by_the_paper(shapes, 1 - round(sparsity * total) / total)
    for mask, density, shape in zip(masks, expected, shapes, strict=True):
        assert abs(int(mask.sum()) - density * math.prod(shape)) <= 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.integers(0, 1000))
@settings(deadline=None)
def test_erk_that_rises_never_reopens(sparsities, seed):
    scores, closed = random_scores(seed, (8, 3, 3), (5, 17), (6, 2)), [None] * 3
    for sparsity in sorted(sparsities):
        masks = erk_unit_masks(units(*scores, closed=closed), sparsity, [1, 1, 1])
        for mask, shut in zip(masks, closed, strict=True):
            assert shut is None or not (mask & shut).any()
            assert mask.any()
        closed = [~mask for mask in masks]
        pruned = sum(int(one.sum()) for one in closed)
        assert pruned == min(round(sparsity * 169), 166)


def test_erk_does_not_reopen_where_rounding_would():
    shapes = [(4, 3), (5, 2), (5, 2), (3, 2)]
    raw, sizes = [float(sum(one)) for one in shapes], [12, 10, 10, 6]
    assert kept_counts(raw, 13, [0] * 4, sizes) == [4, 4, 3, 2]
    assert kept_counts(raw, 12, [0] * 4, sizes) == [3, 3, 3, 3]  # the last would gain one
    scores = random_scores(0, *shapes)
    first = erk_unit_masks(units(*scores), 25 / 38, [0] * 4)
    then = erk_unit_masks(units(*scores, closed=[~mask for mask in first]), 26 / 38, [0] * 4)
    assert sum(int(mask.sum()) for mask in then) == 12
    assert not any((new & ~old).any() for new, old in zip(then, first, strict=True))


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 9), st.integers(0, 99)), min_size=1),
    st.integers(0, 500),
)
@settings(deadline=None)
def test_kept_counts_add_up_within_their_bounds(rows, total):
    raw, floors, extra = zip(*rows, strict=True)
    ceilings = [low + more for low, more in zip(floors, extra, strict=True)]
    counts = kept_counts(raw, total, floors, ceilings)
    assert sum(counts) == min(max(total, sum(floors)), sum(ceilings))
    for count, low, high in zip(counts, floors, ceilings, strict=True):
        assert low <= count <= high


def weights_gone(masks, sizes):
    return sum(
        int((~mask).sum()) * size if isinstance(size, int) else int(size[~mask].sum())
        for mask, size in zip(masks, sizes, strict=True)
    )


@pytest.mark.parametrize("scope", [global_unit_masks, layer_unit_masks, erk_unit_masks])
@given(st.floats(0, 1), st.integers(0, 1000))
@settings(deadline=None)
def test_units_of_one_size_are_counted_whatever_it_is(scope, sparsity, seed):
    scores = random_scores(seed, (7, 9), (4, 5), (11,))
    one = scope(units(*scores), sparsity, [1, 2, 0])
    nine = scope(units(*scores, sizes=[9, 9, 9]), sparsity, [1, 2, 0])
    assert all(torch.equal(*pair) for pair in zip(one, nine, strict=True))


@given(st.floats(0, 1), st.integers(0, 1000))
@settings(deadline=None)
def test_of_units_of_several_sizes_the_lowest_go_until_the_weights_are_met(sparsity, seed):
    sizes = [3, torch.tensor([5, 5, 5, 5, 1]), 20]
    scores = random_scores(seed, (12,), (5,), (6,))
    masks = global_unit_masks(units(*scores, sizes=sizes), sparsity, [0] * 3)
    each = torch.cat([torch.tensor(3).expand(12), sizes[1], torch.tensor(20).expand(6)])
    order = torch.cat(scores).argsort(stable=True)
    wanted = round(sparsity * int(each.sum()))
    count = min(range(24), key=lambda count: abs(int(each[order[:count]].sum()) - wanted))
    expected = torch.ones(23, dtype=torch.bool).index_fill(0, order[:count], False)
    assert torch.equal(torch.cat(masks), expected)


@pytest.mark.parametrize("scope", [global_unit_masks, erk_unit_masks])
@given(st.lists(st.floats(0, 0.8), min_size=2, max_size=6), st.integers(0, 1000))
@settings(deadline=None)
def test_weights_are_met_to_half_a_unit_and_nothing_returns(scope, sparsities, seed):
    sizes, closed = [18, 2, torch.tensor([4] * 16 + [1])], [None] * 3
    scores, total = random_scores(seed, (20,), (40,), (17,)), 360 + 80 + 65
    for sparsity in sorted(sparsities):
        masks = scope(units(*scores, closed=closed, sizes=sizes), sparsity, [1, 1, 1])
        for mask, shut in zip(masks, closed, strict=True):
            assert shut is None or not (mask & shut).any()
            assert mask.any()
        assert abs(weights_gone(masks, sizes) - sparsity * total) <= 18 / 2 + 0.5
        closed = [~mask for mask in masks]
