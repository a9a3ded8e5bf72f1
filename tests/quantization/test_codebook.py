"""One-dimensional k-means against scikit-learn and a search over all partitions."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from lightning_compress.grids import CodebookGrid
from lightning_compress.quantization.codebook import (
    CodebookGrids,
    centre_gradient,
    cluster,
    exact_centres,
    lloyd_centres,
    recluster,
)


def cost(points, mass, centres):
    return (mass * ((points[:, None] - centres) ** 2).min(1)).sum()


def least_cost(points, mass, count):
    """Over all ways to cut the points into intervals, of which each in turn has the centre 0."""
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(points) + 1), count - 1):
        edges = [0, *cuts, len(points)]
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        for zero in range(count):
            total = 0.0
            for index, part in enumerate(parts):
                if part.start < part.stop:
                    mean = (points[part] * mass[part]).sum() / mass[part].sum()
                    centre = 0.0 if index == zero else mean
                    total += (mass[part] * (points[part] - centre) ** 2).sum()
            best = min(best, total)
    return best


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(2, 4))
def test_the_exact_search_finds_the_least_cost(seed, size, count):
    draw = np.random.default_rng(seed)
    points, mass = np.sort(draw.normal(size=size)), draw.random(size) + 0.05
    centres = exact_centres(points, mass, count)
    assert len(centres) <= count
    assert 0.0 in centres
    assert cost(points, mass, centres) == pytest.approx(least_cost(points, mass, count), abs=1e-9)


def test_lloyd_ends_where_scikit_learns_ends_when_no_centre_is_bound_to_zero():
    points = np.sort(np.random.default_rng(0).normal(size=400)) + 10.0  # far from the centre 0
    mass = np.random.default_rng(1).random(400)
    start = np.array([8.5, 9.5, 10.5, 11.5])
    found = lloyd_centres(points, mass, np.append(0.0, start))
    reference = KMeans(4, init=start[:, None], n_init=1, tol=0, max_iter=500)
    reference.fit(points[:, None], sample_weight=mass)
    assert found[1:] == pytest.approx(np.sort(reference.cluster_centers_[:, 0]), abs=1e-9)


@pytest.mark.parametrize("count", [2, 4, 16, 256])
@pytest.mark.parametrize("size", [300, 20_000])
def test_clustering_is_no_worse_than_many_starts_of_scikit_learn(count, size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    centres = cluster(values, count).double().numpy()
    points = values.double().numpy()
    assert len(centres) <= count
    assert 0.0 in centres
    assert (np.diff(centres) > 0).all()
    # One centre is bound to 0, so one free centre less is the fair opponent.
    rival = KMeans(max(count - 1, 1), n_init=1, random_state=0).fit(points[:, None]).inertia_
    slack = 1.001 if count < 256 else 1.03
    assert cost(points, np.ones(size), centres) <= slack * rival


def test_importance_draws_the_centres():
    values = torch.tensor([1.0, 2.0, -1.0])
    weights = torch.tensor([3.0, 1.0, 1.0])
    assert cluster(values, 3, weights=weights).tolist() == pytest.approx([-1.0, 0.0, 1.25])


def test_zeros_move_no_centre_and_pruned_weights_stay_zero():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    values[::2] = 0.0
    grid = CodebookGrid(cluster(values, 8))
    assert torch.equal(grid.centres, cluster(values[1::2], 8))
    assert (grid.project(values)[::2] == 0).all()


@pytest.mark.parametrize("values", [torch.zeros(5), torch.full((4,), 2.0), torch.empty(0)])
def test_few_different_values_give_few_centres(values):
    centres = cluster(values, 16)
    assert 0.0 in centres
    assert 2 <= len(centres) <= 3
    assert torch.equal(CodebookGrid(centres).project(values), values)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="count=1: valid are 2 to 256"):
        cluster(torch.ones(3), 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        cluster(torch.tensor([1.0, float("nan")]), 4)


def test_reclustering_starts_from_the_centres_of_before():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(5))
    first = cluster(values, 8)
    assert torch.equal(recluster(values, first), first)  # nothing moved
    moved = recluster(values * 1.1, first)
    assert moved.allclose(first * 1.1, atol=0.05)


def test_events_cluster_again_from_the_weights_of_now():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(5))
    maker = CodebookGrids(bits=3, lr=0.1)
    maker.start(values)
    first = maker.grid(values).centres.clone()
    maker.step(1.3 * values, event=False)
    assert torch.equal(maker.grid(values).centres, first)
    maker.step(1.3 * values, event=True)
    assert torch.equal(maker.grid(values).centres, recluster(1.3 * values, first))
    points, mass = (1.3 * values).numpy(), np.ones(3000)
    after = cost(points, mass, maker.grid(values).centres.numpy())
    assert after < 0.95 * cost(points, mass, first.numpy())


def test_centres_get_the_gradient_of_autograd_and_zero_gets_none():
    grid = CodebookGrid(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    symbols, upstream = grid.quantize(values), torch.randn(7, 9)
    centres = grid.centres.clone().requires_grad_()
    (centres[symbols.long() + 1] * upstream).sum().backward()
    expected = centres.grad.clone()
    expected[1] = 0.0
    torch.testing.assert_close(centre_gradient(upstream, symbols, grid), expected)


def test_frozen_centres_learn_and_weights_keep_theirs():
    values = torch.tensor([-1.1, -0.9, 0.0, 0.02, 1.0, 1.2])
    quantizer = CodebookGrids(bits=2, lr=0.1)
    quantizer.start(values)
    quantizer.freeze(values)
    before = quantizer.centres.clone()
    symbols = quantizer.grid(values).quantize(values)
    for _ in range(50):  # the loss pulls every weight to 0.3
        gradient = quantizer.grid(values).dequantize(symbols) - 0.3
        quantizer.gradient(gradient, values)
        assert (gradient == 0).all()  # the weights have none of their own
        values = quantizer.step(values, event=False)
    assert torch.equal(quantizer.grid(values).quantize(values), symbols)
    assert (torch.diff(quantizer.centres) > 0).all()
    assert (quantizer.centres != before).sum() == len(before) - 1
    assert (values[symbols == 0] == 0).all()
