"""Allocation against brute force, and what follows from sensitivities."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.budget.sensitivity import (
    Choice,
    LayerScan,
    Sensitivity,
    allocate,
    convex_hull,
)

whole = st.integers(0, 20)
choices = st.lists(st.builds(Choice, st.integers(1, 20), whole), min_size=1, max_size=5)


def best_of_all(layers, budget):
    """The least loss of all combinations that fit."""
    fitting = (
        sum(one.loss for one in picked)
        for picked in itertools.product(*layers)
        if sum(one.size for one in picked) <= budget
    )
    return min(fitting, default=None)


def total(layers, found):
    picked = [layer[index] for layer, index in zip(layers, found, strict=True)]
    return sum(one.size for one in picked), sum(one.loss for one in picked)


@settings(max_examples=300, deadline=None)
@given(st.lists(choices, min_size=1, max_size=4), st.integers(1, 80))
def test_it_fits_and_is_near_the_best_of_all(layers, budget):
    best = best_of_all(layers, budget)
    if best is None:
        with pytest.raises(ValueError, match="too small"):
            allocate(layers, budget)
        return
    size, loss = total(layers, allocate(layers, budget))
    assert size <= budget
    # What one step along a hull can be worth is what the bound of Lagrange leaves open.
    steps = [
        layer[small].loss - layer[large].loss
        for layer in layers
        for small, large in itertools.pairwise(convex_hull(layer))
    ]
    assert best <= loss <= best + max(steps, default=0)


@settings(max_examples=200, deadline=None)
@given(st.lists(choices, min_size=1, max_size=4))
def test_where_all_fits_each_layer_takes_its_best(layers):
    _, loss = total(layers, allocate(layers, 1000))
    assert loss == sum(min(one.loss for one in layer) for layer in layers)


@settings(max_examples=200, deadline=None)
@given(choices)
def test_the_hull_is_what_some_price_chooses(layer):
    hull = convex_hull(layer)
    gains = [
        (layer[a].loss - layer[b].loss) / (layer[b].size - layer[a].size)
        for a, b in itertools.pairwise(hull)
    ]
    assert all(one > other for one, other in itertools.pairwise(gains))
    for price in (0.0, 0.1, 0.5, 1.0, 3.0, 100.0):
        cost = [one.loss + price * one.size for one in layer]
        assert min(cost[index] for index in hull) == pytest.approx(min(cost))


def scan(path, weights, rate):
    sparsities, bits = (0.5, 0.75, 0.9), (2, 4)
    return LayerScan(
        path,
        weights,
        sparsities,
        tuple(rate * s for s in (0.1, 0.3, 1.0)),
        bits,
        tuple(rate * b for b in (0.5, 0.05)),
        tuple(tuple(weights * (1 - s) * b / 8 for b in bits) for s in (0.0, *sparsities)),
    )


def test_layers_that_bear_more_are_pruned_more():
    found = Sensitivity("loss", 1.0, "lower", [scan("a", 1000, 1.0), scan("b", 1000, 10.0)])
    for sparsity in (0.3, 0.6, 0.9):
        shares = found.sparsities(sparsity)
        assert shares["a"] > shares["b"]
        mean = (shares["a"] + shares["b"]) / 2
        assert sparsity <= mean + 1e-9 < sparsity + 0.06
    assert found.sparsities(0.0) == {"a": 0.0, "b": 0.0}
    rising = [found.sparsities(s)["a"] for s in (0.1, 0.4, 0.7, 0.9, 0.97)]
    assert rising == sorted(rising)


def test_a_recipe_fits_and_beats_what_is_the_same_everywhere():
    found = Sensitivity("loss", 1.0, "lower", [scan("a", 1000, 1.0), scan("b", 100, 30.0)])
    for budget in (60.0, 120.0, 250.0):
        recipe = found.recipe(budget)

        def cost(chosen):
            picked = [
                next(c for s, b, c in one.choices() if (s, b) == chosen[one.path])
                for one in found.layers
            ]
            return sum(c.size for c in picked), sum(c.loss for c in picked)

        plain = [
            cost({one.path: pair for one in found.layers})
            for pair in ((s, b) for s, b, _ in found.layers[0].choices())
        ]
        assert cost(recipe)[0] <= budget
        assert cost(recipe)[1] < min(loss for size, loss in plain if size <= budget)
    with pytest.raises(ValueError, match="too small"):
        found.recipe(1.0)


def test_a_file_of_sensitivities_reads_back(tmp_path):
    found = Sensitivity("loss", 1.0, "lower", [scan("a", 1000, 1.0)])
    assert Sensitivity.load(found.save(tmp_path / "new" / "s.json")) == found
    (tmp_path / "x.json").write_text(json.dumps({"metric": "loss"}))
    with pytest.raises(ValueError, match=r"x\.json holds no sensitivities"):
        Sensitivity.load(tmp_path / "x.json")
