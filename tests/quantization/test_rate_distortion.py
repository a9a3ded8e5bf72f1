"""Rate-distortion grids: gradients against autograd, steps in a file's units, and smaller files."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    GradualPruning,
    QuantizationAwareTraining,
    compression_state,
    load_compressed,
    save_compressed,
    sparsity,
)
from lightning_compress.budget.levers import LambdaLever, Limits, lever_of
from lightning_compress.quantization.rate_distortion import (
    RateDistortionGrids,
    RateTable,
    Settling,
    octave_steps,
)


@given(st.floats(1e-8, 1e8))
def test_a_step_is_the_nearest_sixteenth_of_an_octave(value):
    step = octave_steps(torch.tensor([value])).item()
    k = 16 * math.log2(step)
    assert k == pytest.approx(round(k), abs=1e-3)
    assert abs(math.log2(step / value)) <= 1 / 32 + 1e-4
    assert octave_steps(torch.tensor([step])).item() == step


@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.floats(-3.9, 3.9))
def test_the_slope_is_that_of_the_expected_length_under_noise(counts, place):
    table = RateTable(most=4)
    table.look(torch.tensor(counts))
    half = table.lengths().double().numpy()
    assert (np.diff(half) >= 0).all()
    q = np.arange(-5, 6)
    lengths = np.concatenate([half[4:], half[::-1], half[1:], half[4:]])

    def expected(v):  # of L(v + u), u uniform: the mean over many points of the linear pieces
        points = v + (np.arange(4000) + 0.5) / 4000 - 0.5
        return np.interp(points, q, lengths).mean()

    slope = (expected(place + 1e-3) - expected(place - 1e-3)) / 2e-3
    found = table.slope(torch.tensor([place], dtype=torch.float32)).item()
    assert found == pytest.approx(slope, abs=0.05 + 0.01 * half[-1])


def started(values, *, weight=0.0, axis=None, lr=0.01):
    maker = RateDistortionGrids(bits=8, axis=axis, lr=lr)
    maker.start(values)
    maker.weight = weight
    return maker


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_are_those_of_autograd_straight_through(axis):
    values, loss = torch.randn(6, 5, 3), torch.randn(6, 5, 3)
    maker = started(values, weight=0.3, axis=axis)
    scale = maker.grid(values).scale
    got = loss.clone()
    maker.gradient(got, values)

    log_step = scale.log().requires_grad_()
    weight = values.clone().requires_grad_()
    shape = [1] * 3
    if axis is not None:
        shape[axis] = -1
    step = log_step.exp().reshape(shape)
    ratio = weight / step
    visible = step * (ratio + (ratio.round() - ratio).detach())
    whole = ratio.detach().round()
    bits = maker.table.slope(ratio.detach(), whole) * ratio  # its gradient is the slope
    ((visible * loss).sum() + 0.3 * bits.sum()).backward()
    assert torch.allclose(got, weight.grad, atol=1e-5)
    assert torch.allclose(maker._gradient, log_step.grad, rtol=1e-3, atol=1e-3)


def test_a_large_weight_is_read_in_blocks_that_count_as_often_as_there_are():
    torch.manual_seed(0)
    values = torch.randn(300, 300).clamp(-2, 2)  # beyond what is known a step costs nothing
    maker = started(values, weight=1.0)
    scale, seen = maker.grid(values).scale, torch.zeros(300, 300)
    for _ in range(4):
        gradient = torch.zeros_like(values)
        maker.gradient(gradient, values)
        part = gradient != 0
        assert 0.2 < part.float().mean() <= 0.25
        whole = 4 * maker.table.slope(values / scale) / scale
        assert torch.allclose(gradient[part], whole[part], rtol=1e-4)
        seen += part
    assert (seen.max(), seen.sum()) == (1, seen.numel())


def test_a_heavier_rate_coarsens_the_step():
    values = torch.randn(40, 40)
    steps = []
    for weight in (0.0, 1e-3, 1.0):
        maker = started(values, weight=weight)
        for _ in range(50):
            # A loss that wants the visible weights where the latent ones are.
            gradient = 0.1 * (maker.grid(values).project(values) - values)
            maker.gradient(gradient, values)
            maker.step(values, event=False)
        steps.append(maker.grid(values).scale.item())
    assert steps[0] < steps[1] < steps[2]


def test_what_is_beyond_the_range_raises_the_step_at_an_event():
    values = torch.tensor([0.01] * 500 + [9.0])
    maker = RateDistortionGrids(bits=4, axis=None, lr=0.01)
    maker.start(values)
    assert maker.grid(values).project(values)[-1] < 5
    maker.step(values, event=True)
    assert maker.grid(values).project(values)[-1] == pytest.approx(9.0, rel=0.05)


def wide(seed=0):
    torch.manual_seed(seed)
    model = TinyAutoencoder()
    model.encoder, model.decoder = nn.Sequential(nn.Linear(6, 128), nn.ReLU()), nn.Linear(128, 6)
    return model


def trained(folder, lmbda, *more, **rules):
    model = wide()
    callback = QuantizationAwareTraining(
        activation_bits=None, scheme="rate_distortion", lmbda=lmbda, **rules
    )
    quiet_trainer(folder, callback, *more, max_epochs=12).fit(model, batches())
    return model, callback, save_compressed(model, folder / "model.lcz")


def test_lambda_trades_bytes(tmp_path):
    sizes = [trained(tmp_path, lmbda)[2].bytes for lmbda in (0.0, 0.3, 10.0)]
    assert sizes[0] > 1.05 * sizes[1] > 1.1 * sizes[2]


@pytest.mark.parametrize("per_channel", [None, True])
def test_the_file_holds_the_trained_steps(tmp_path, per_channel):
    model, callback, info = trained(tmp_path, 1.0, per_channel=per_channel)
    assert callback.per_channel is bool(per_channel)
    fresh = load_compressed(tmp_path / "model.lcz", wide(1))
    grids = compression_state(fresh).grids
    for path, grid in compression_state(model).grids.items():
        assert info.per_tensor[path].kind == "grid"
        k = 16 * grids[path].scale.log2()
        assert torch.allclose(k, k.round(), atol=1e-3)
        assert torch.equal(grids[path].scale, grid.scale)
        assert torch.equal(fresh.get_parameter(path), model.get_parameter(path))


def test_masks_stay_beside_it(tmp_path):
    model, _, _ = trained(tmp_path, 0.1, GradualPruning(final_sparsity=0.8))
    assert sparsity(model) >= 0.8


def test_the_loss_is_the_users_own(tmp_path):
    """Of a run whose rate weighs nothing and one whose rate weighs much, step 1 is the same."""
    first = []
    for lmbda in (0.0, 1e4):
        model = wide()
        rounding = QuantizationAwareTraining(
            activation_bits=None, scheme="rate_distortion", lmbda=lmbda
        )
        trainer = quiet_trainer(tmp_path, rounding, max_epochs=1, limit_train_batches=1)
        trainer.fit(model, batches())
        first.append(trainer.callback_metrics.copy())
    assert {k: v for k, v in first[0].items() if "quantize" not in k} == {
        k: v for k, v in first[1].items() if "quantize" not in k
    }


def test_a_budget_moves_lambda():
    callback = QuantizationAwareTraining(activation_bits=None, scheme="rate_distortion", lmbda=1.0)
    callback.weights = object()
    lever = lever_of(callback, Limits(lambdas=(1.0, 100.0)))
    assert isinstance(lever, LambdaLever)
    assert lever.setting(0.5) == "lambda 10"
    with pytest.raises(ValueError, match="lambdas"):
        Limits(lambdas=(3.0, 1.0))


def test_a_budget_searches_around_the_given_lambda():
    callback = QuantizationAwareTraining(activation_bits=None, scheme="rate_distortion", lmbda=0.02)
    callback.weights = object()
    lever = lever_of(callback, Limits())
    assert isinstance(lever, LambdaLever)
    callback.lmbda = 1.0  # a budget has moved it before
    levels = [lever.lmbda(level) for level in (0.0, 0.5, 1.0)]
    assert levels == pytest.approx([2e-4, 0.02, 2.0])
    callback.requested_lmbda = 0.0
    with pytest.raises(ValueError, match=r"lmbda=0.0.*lambdas"):
        lever_of(callback, Limits())


def test_bytes_that_never_settle_are_judged_after_two_changes_by_e():
    settling = Settling(lr=0.01)
    found = []
    for step in range(0, 210, 10):
        settling.read(step, 1e6 * 0.98**step)
        found.append(settling.settled)
    assert found == [False] * 20 + [True]
    settling.restart()
    assert not settling.settled
