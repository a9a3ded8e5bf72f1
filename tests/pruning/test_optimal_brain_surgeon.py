"""Optimal Brain Surgeon against least squares, the classical formula and SparseGPT's own steps."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.projection import Projector
from lightning_compress.pruning.masks import global_masks
from lightning_compress.pruning.optimal_brain_surgeon import (
    OptimalBrainSurgeon,
    compensate,
    damped_hessian,
    exact_update,
    saliency,
    sequential_update,
)
from lightning_compress.targets import select

TINY = 1e-9  # a damping that least squares does not notice


def problem(rows=3, columns=8, samples=40, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    weights = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    keep = torch.rand(rows, columns, generator=generator) < density
    return x, weights, keep


def least_squares(x, weights, keep):
    """argmin ||X w' - X w|| over each row's kept support, by numpy."""
    best = np.zeros_like(weights.numpy())
    for row, (w, mask) in enumerate(zip(weights.numpy(), keep.numpy(), strict=True)):
        best[row, mask] = np.linalg.lstsq(x.numpy()[:, mask], x.numpy() @ w, rcond=None)[0]
    return torch.from_numpy(best)


def error(x, weights, updated):
    return (x @ (weights - updated).T).square().sum().item()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 0.95))
@example(363, 0.9375)  # nearly singular on its support: weights are far larger than before
def test_the_exact_update_is_least_squares_on_the_kept_support(seed, density):
    x, weights, keep = problem(density=density, seed=seed)
    updated = exact_update(weights, keep, damped_hessian(x.T @ x, TINY))
    best = least_squares(x, weights, keep)
    torch.testing.assert_close(updated, best, rtol=1e-3, atol=1e-3)
    little = 1e-9 * (x @ weights.T).square().sum().item()
    assert error(x, weights, updated) <= error(x, weights, best) * (1 + 1e-6) + little
    assert (updated[~keep] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 0.9))
def test_the_sequential_pass_lies_between_masking_alone_and_the_optimum(seed, density):
    x, weights, keep = problem(rows=20, columns=16, samples=200, density=density, seed=seed)
    hessian = damped_hessian(x.T @ x, 0.01)
    updated = compensate(weights, keep, hessian, solver="sequential", block_size=5)
    assert (updated[~keep] == 0).all()
    best = exact_update(weights, keep, hessian)
    low, reached, high = (
        ((one - weights) @ hessian * (one - weights)).sum(1)
        for one in (best, updated, weights.masked_fill(~keep, 0))
    )
    assert (low <= reached * (1 + 1e-9)).all()
    assert (reached <= high * (1 + 1e-9)).all()
    assert reached.sum() < high.sum()


def test_the_sequential_pass_stays_within_a_factor_of_the_optimum():
    ratios = []
    for seed in range(10):
        x, weights, keep = problem(rows=20, columns=16, samples=200, seed=seed)
        updated = sequential_update(weights, keep, damped_hessian(x.T @ x, 0.001))
        best = least_squares(x, weights, keep)
        ratios.append(error(x, weights, updated) / error(x, weights, best))
    assert max(ratios) < 10


@pytest.mark.parametrize("q", [0, 3, 7])
def test_one_weight_gone_is_the_classical_formula(q):
    x, weights, _ = problem(rows=2)
    keep = torch.ones_like(weights, dtype=torch.bool)
    keep[1, q] = False
    hessian = damped_hessian(x.T @ x, 0.01)
    inverse = torch.linalg.inv(hessian)
    expected = weights.clone()
    expected[1] -= weights[1, q] / inverse[q, q] * inverse[:, q]
    updated = exact_update(weights, keep, hessian)
    torch.testing.assert_close(updated, expected)
    torch.testing.assert_close(saliency(weights, hessian)[1, q], weights[1, q] ** 2 / inverse[q, q])
    change = updated[1] - weights[1]  # the score is the increase of the quadratic error
    torch.testing.assert_close(change @ hessian @ change, saliency(weights, hessian)[1, q])
    if q == 0:  # the columns after it are all others
        torch.testing.assert_close(sequential_update(weights, keep, hessian), expected)


def test_eliminating_weight_by_weight_gives_the_exact_update():
    x, weights, keep = problem(rows=1)
    hessian = damped_hessian(x.T @ x, 0.01)
    row, inverse = weights[0].clone(), torch.linalg.inv(hessian)
    for q in (~keep[0]).nonzero().flatten().tolist():
        row -= row[q] / inverse[q, q] * inverse[:, q]
        inverse -= torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1.0  # gone: whatever, but not a division by 0
        inverse[q, :q] = inverse[q, q + 1 :] = inverse[:q, q] = inverse[q + 1 :, q] = 0.0
    torch.testing.assert_close(exact_update(weights, keep, hessian)[0], row)


def test_the_sequential_pass_eliminates_column_by_column_and_blocks_do_not_matter():
    x, weights, keep = problem()
    hessian = damped_hessian(x.T @ x, 0.01)
    rows = weights.clone()
    for q in range(8):  # SparseGPT, equation 3: H^-1 of the columns that remain
        inverse = torch.linalg.inv(hessian[q:, q:])
        amount = rows[:, q].masked_fill(keep[:, q], 0.0) / inverse[0, 0]
        rows[:, q:] -= torch.outer(amount, inverse[0])
    expected = rows.masked_fill(~keep, 0.0)
    for size in (1, 3, 8, 128):
        torch.testing.assert_close(
            sequential_update(weights, keep, hessian, block_size=size), expected
        )


def test_edges():
    hessian = damped_hessian(torch.zeros(3, 3), 0.01)
    assert torch.equal(hessian, torch.eye(3, dtype=torch.float64))
    assert damped_hessian(torch.tensor([1.0, 3.0]), 0.5).tolist() == [4.0, 8.0]
    weights = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 6.0]])
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert compensate(weights, none, hessian).tolist() == [[0.0] * 3] * 2
    assert compensate(weights, ~none, hessian).tolist() == weights.tolist()


def test_auto_takes_the_sequential_pass_where_exact_is_dear(monkeypatch):
    x, weights, keep = problem()
    hessian = damped_hessian(x.T @ x, 0.01)
    exact, sequential = (
        compensate(weights, keep, hessian, solver=solver) for solver in ("exact", "sequential")
    )
    assert not torch.allclose(exact, sequential)
    assert torch.equal(compensate(weights, keep, hessian), exact)
    monkeypatch.setattr("lightning_compress.pruning.optimal_brain_surgeon._EXACT_WORK", 1.0)
    assert torch.equal(compensate(weights, keep, hessian), sequential)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (40, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (8, 4, 7, 7)),
    "grouped": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding_mode="circular", padding=1),
        (8, 4, 6, 6),
    ),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), (8, 4, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (8, 4, 5, 5)),
    "transposed-grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2),
        (8, 4, 5, 5),
    ),
    "spectral": (lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), (40, 6)),
}


def pruned(layer, x, criterion, sparsity=0.5):
    """Gather, score, mask and update one layer; returns (before, mask, after)."""
    (projected,) = [Projector.of(layer).add(target) for target in select(layer).targets]
    criterion.begin([projected])
    for batch in x.split(4):
        layer(batch)
    (mask,) = global_masks([criterion.scores(projected)], sparsity)
    before = projected.values().clone()
    projected.set_mask(mask)
    after = criterion.update(projected, mask)
    criterion.end()
    return before, mask, after


@pytest.mark.parametrize("solver", ["exact", "sequential"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_update_lowers_the_real_output_error_of_every_layer(name, solver):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape) + 0.5
    criterion = OptimalBrainSurgeon(damping=1e-4, max_samples=10**6, solver=solver)
    before, mask, after = pruned(layer, x, criterion)
    weight = getattr(layer, "parametrizations", None)
    weight = layer.weight if weight is None else weight.weight.original
    layer.eval()
    with torch.no_grad():
        dense = layer(x)
        errors = []
        for values in (before * mask, after):
            weight.copy_(values)
            errors.append((layer(x) - dense).square().sum().item())
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert (after[~mask] == 0).all()
    if name != "spectral":  # there, the norm moves too
        assert errors[1] < 1.001 * errors[0]
        assert solver == "sequential" or errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("name", ["conv", "grouped", "transposed", "transposed-grouped"])
def test_the_layers_update_is_a_local_optimum_of_its_own_output(name):
    """Independent of any unfolding: the gradient of the real error vanishes where weights stay."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.double)
    dense = layer(x).detach()
    criterion = OptimalBrainSurgeon(damping=1e-7, max_samples=10**6, solver="exact")
    before, mask, after = pruned(layer, x, criterion)
    gradients = []
    for values in (before * mask, after):
        layer.weight.data.copy_(values)
        (gradient,) = torch.autograd.grad((layer(x) - dense).square().sum(), layer.weight)
        gradients.append(gradient[mask].norm().item())
    assert gradients[1] < 1e-4 * gradients[0]


def test_the_update_is_the_same_before_and_after_the_projected_has_the_mask():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(40, 6)
    (projected,) = [Projector.of(layer).add(target) for target in select(layer).targets]
    criterion = OptimalBrainSurgeon()
    criterion.begin([projected])
    layer(x)
    (mask,) = global_masks([criterion.scores(projected)], 0.5)
    early = criterion.update(projected, mask)
    projected.set_mask(mask)
    late = criterion.update(projected, mask)
    assert torch.equal(early, late)
    scores = criterion.scores(projected)  # the next event: what the mask took stays out of it
    projected.parameter.data.add_(1.0)  # momentum, say
    (more,) = global_masks([scores.masked_fill(~mask, -torch.inf)], 0.6)
    expected = compensate(
        (projected.values() * mask), more, damped_hessian(x.T @ x, 0.01), solver="exact"
    )
    torch.testing.assert_close(
        criterion.update(projected, more), expected.float(), rtol=1e-3, atol=1e-4
    )
    criterion.end()


def test_too_many_columns_keep_the_diagonal_and_say_so():
    layer, x = nn.Linear(6, 5), torch.randn(40, 6)
    (projected,) = [Projector.of(layer).add(target) for target in select(layer).targets]
    criterion = OptimalBrainSurgeon(max_columns=5)
    with pytest.warns(UserWarning, match=r"diagonal of the Hessian of weight: 6 columns"):
        criterion.begin([projected])
    criterion.begin([projected])  # told once
    layer(x)
    diagonal = 2 * x.square().sum(0)
    expected = layer.weight.detach() ** 2 * (diagonal + 0.01 * diagonal.mean())
    torch.testing.assert_close(criterion.scores(projected), expected)
    assert criterion.update(projected, torch.ones(5, 6, dtype=torch.bool)) is None
    criterion.end()


def test_an_embedding_has_a_diagonal_by_nature():
    layer, tokens = nn.Embedding(4, 3), torch.tensor([0, 1, 1, 3])
    (projected,) = [Projector.of(layer).add(t) for t in select(layer, ["weight"]).targets]
    criterion = OptimalBrainSurgeon()
    criterion.begin([projected])
    layer(tokens)
    one_hot = nn.functional.one_hot(tokens, 4).double()
    inverse = torch.linalg.inv(damped_hessian(one_hot.T @ one_hot, 0.01))
    expected = layer.weight.detach() ** 2 / inverse.diagonal().float().unsqueeze(1)
    torch.testing.assert_close(criterion.scores(projected), expected)
    assert criterion.update(projected, torch.ones(4, 3, dtype=torch.bool)) is None
    criterion.end()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, r"damping=0\.0 must be above 0"),
        ({"solver": "magic"}, r"solver='magic': valid are \['auto', 'exact', 'sequential'\]"),
        ({"max_columns": 0}, "max_columns=0"),
        ({"max_samples": 1.5}, r"max_samples=1\.5"),
        ({"block_size": -1}, "block_size=-1"),
        ({"window": 0}, "window=0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        OptimalBrainSurgeon(**arguments)
