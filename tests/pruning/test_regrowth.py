"""RigL's exchange by hand, its counts, and the gradients it grows by."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.projection import Projector
from lightning_compress.pruning.regrowth import (
    DenseGradients,
    Regrowth,
    exchange,
    exchanged_fraction,
    make_regrowth,
    reset_momenta,
)
from lightning_compress.targets import select


def test_the_smallest_leave_and_the_largest_gradients_come():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    magnitude = torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 0.0]])
    growth = torch.tensor([[100.0, 0.1, 100.0], [0.3, 0.2, 0.5]])
    # Half of 4 leave: 1.0 and 2.0. Of the inactive, 0.5 and 0.3 are largest: one comes back.
    expected = torch.tensor([[True, False, True], [True, False, True]])
    assert torch.equal(exchange(mask, magnitude, growth, 0.5), expected)
    assert torch.equal(exchange(mask, magnitude, growth, 0.24), mask)


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 0.99))
@settings(deadline=None)
def test_the_number_stays_and_survivors_are_the_largest(seed, density, fraction):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(5, 8, generator=generator) < density
    magnitude = torch.rand(5, 8, generator=generator) * mask
    growth = torch.randint(0, 3, (5, 8), generator=generator).float()
    new = exchange(mask, magnitude, growth, fraction)
    assert int(new.sum()) == int(mask.sum())
    moved = int(fraction * int(mask.sum()))
    stays = magnitude.masked_fill(~mask, -1).flatten().topk(int(mask.sum()) - moved).indices
    assert new.flatten()[stays].all()
    grown = new & ~mask
    if grown.any() and (~new & ~mask).any():
        assert growth[grown].min() >= growth[~new & ~mask].max()


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 1.0])
def test_the_fraction_falls_by_a_cosine(done):
    expected = 0.3 / 2 * (1 + math.cos(math.pi * done))
    assert exchanged_fraction(0.3, done) == pytest.approx(expected)


def test_gradients_are_dense_of_the_last_step_and_add_up_over_accumulation():
    layer = nn.Linear(3, 2, bias=False)
    projector = Projector.of(layer)
    projected = projector.add(select(layer).targets[0])
    projected.set_mask(torch.tensor([[True, False, True], [False, True, False]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    projector.attach([optimizer])
    projector.project()
    growth, x = DenseGradients(), torch.tensor([[1.0, 2.0, 3.0]])
    assert growth.window == 1
    assert torch.equal(growth.scores(projected), torch.zeros(2, 3))
    growth.begin([projected])
    for set_to_none in (True, False):
        layer(x).sum().backward()
        assert torch.equal(growth.scores(projected), x.expand(2, 3))
        layer(-2 * x).sum().backward()
        assert torch.equal(growth.scores(projected), x.expand(2, 3))  # |1 - 2|
        assert torch.equal(layer.weight.grad == 0, projected.pruned)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    growth.end()
    growth.end()
    assert projected.taps == []
    assert not growth.scores(projected).any()
    projector.detach()


def test_weights_that_come_back_have_no_momentum():
    layer = nn.Linear(3, 2, bias=False)
    projector = Projector.of(layer)
    projected = projector.add(select(layer).targets[0])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    projector.attach([optimizer])
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    projected.set_mask(torch.tensor([[True, False, True], [False, True, False]]))
    mask = torch.tensor([[False, True, True], [False, True, False]])
    reset_momenta([optimizer], projected, mask)
    state = optimizer.state[layer.weight]
    for kept in (state["exp_avg"], state["exp_avg_sq"]):
        assert (kept == 0).tolist() == [[False, True, False], [False, False, False]]
    assert int(state["step"]) == 1
    projector.detach()


def test_ways_that_cannot_go_together_are_named():
    with pytest.raises(ValueError, match=r"regrow='magic': valid are \[None"):
        make_regrowth("magic", "layer", fixed=False)
    with pytest.raises(ValueError, match=r"fraction=1\.0"):
        make_regrowth(Regrowth(fraction=1.0), "layer", fixed=False)
    with pytest.raises(ValueError, match="fixes the sparsity of each layer"):
        make_regrowth("gradient", "layer", fixed=True)
