"""Learned steps: their gradients against autograd through a plain LSQ fake quantization."""

import math

import pytest
import torch
from torch import nn

from lightning_compress import Projector
from lightning_compress.grids import AffineGrid
from lightning_compress.projection import ProjectedWeight
from lightning_compress.quantization.learned_step import (
    LearnedPositive,
    LearnedStepGrids,
    initial_step,
    step_gradient,
)
from lightning_compress.quantization.weights import WeightQuantizer
from lightning_compress.targets import Target


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def lsq(weight, step, bits, axis, mask=None):
    """The paper's quantizer, with its gradient scale, as autograd differentiates it."""
    qmax = 2 ** (bits - 1) - 1
    each = weight.numel() / step.numel()
    scale = 1 / math.sqrt(each * qmax)
    step = (step - step * scale).detach() + step * scale
    shape = [1] * weight.dim()
    if axis is not None:
        shape[axis] = -1
    step = step.reshape(shape)
    weight = weight if mask is None else weight * mask
    return Round.apply((weight / step).clamp(-qmax, qmax)) * step


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_equal_autograd_through_a_fake_quantization(bits, axis):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 5, 3, generator=generator, requires_grad=True)
    count = 1 if axis is None else weight.shape[axis]
    step = (0.2 + torch.rand(count, generator=generator)).requires_grad_()
    upstream = torch.randn(6, 5, 3, generator=generator)
    (lsq(weight, step, bits, axis) * upstream).sum().backward()
    grid = AffineGrid(step.detach(), torch.zeros(count, dtype=torch.int32), bits, True, axis)
    to_step, inside = step_gradient(upstream, weight.detach(), grid)
    torch.testing.assert_close(to_step, step.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(upstream * inside, weight.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_of_training_equal_autograds(kind, masked):
    """Projected weights and steps, update by update, beside a fake-quantized forward pass."""
    make = {
        "linear": lambda: nn.Linear(5, 4, bias=False),
        "conv": lambda: nn.Conv1d(5, 4, 2, bias=False),
        "transposed": lambda: nn.ConvTranspose1d(5, 4, 2, bias=False),
    }[kind]
    torch.manual_seed(0)
    layer = make()
    latent = layer.weight.detach().clone().requires_grad_()
    mask = (torch.rand_like(latent) > 0.4).float() if masked else torch.ones_like(latent)
    projected = Projector.of(layer).add(Target("weight", layer, "weight", layer.weight))
    projected.set_mask(mask.bool())
    with torch.no_grad():
        latent.mul_(mask)
    quantizer = LearnedStepGrids(bits=3, axis=None, lr=0.01)
    weights = WeightQuantizer([projected], lambda _: quantizer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    projector = Projector.of(layer)
    projector.attach([optimizer])
    projector.on_step(lambda: weights.follow(["weight"], event=False), order=1)
    projector.project()
    weights.start()
    small = initial_step(latent.detach(), bits=3) / 2  # so that many weights are clipped
    quantizer.learned.value = small
    projector.project()
    reference = LearnedPositive(small, 0.01)
    other = torch.optim.Adam([latent], lr=0.02)
    for seed in range(20):
        x = torch.randn((3, 5) if kind == "linear" else (3, 5, 6),
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        step = reference.value.clone().requires_grad_()
        visible = lsq(latent, step, 3, None, mask)
        other.zero_grad()
        torch.func.functional_call(layer, {"weight": visible}, (x,)).square().sum().backward()
        other.step()
        reference.step(step.grad)
        torch.testing.assert_close(quantizer.learned.value, reference.value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(projected.latent, latent.detach() * mask, rtol=1e-4, atol=1e-5)
    projector.detach()


def test_the_first_step_is_the_papers_over_weights_that_are_not_zero():
    weight = torch.tensor([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    assert initial_step(weight, bits=4).item() == pytest.approx(2 * 2.0 / math.sqrt(7))
    per_channel = initial_step(weight, bits=4, axis=0)
    assert per_channel.tolist() == pytest.approx([2 * 2.0 / math.sqrt(7), 1.0])


def test_a_learned_step_finds_the_least_error():
    """Trained on the squared error alone, the step ends near the best of a fine search."""
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    quantizer = LearnedStepGrids(bits=3, axis=None, lr=0.01)
    quantizer.start(values)
    for _ in range(400):
        visible = quantizer.grid(values).project(values)
        quantizer.gradient(2 * (visible - values), values)
        quantizer.step(values, event=False)
    zero = torch.zeros(1, dtype=torch.int32)

    def error(step):
        grid = AffineGrid(torch.tensor([step]), zero, 3, True, None)
        return (grid.project(values) - values).square().mean().item()

    best = min(error(step / 200) for step in range(20, 300))
    assert error(quantizer.learned.value.item()) < 1.02 * best


def test_learned_numbers_stay_positive_and_skip_what_is_not_finite():
    number = LearnedPositive(torch.tensor([0.1]), 0.5)
    for _ in range(50):
        number.step(torch.tensor([1e6]))
    assert 0 < number.value.item() < 1e-3
    before = number.value.clone()
    number.step(torch.tensor([float("inf")]))
    assert torch.equal(number.value, before)


def test_the_direction_is_adams():
    parameter = nn.Parameter(torch.tensor([0.0, 0.0]))
    adam = torch.optim.Adam([parameter], lr=1.0, eps=1e-12)
    number = LearnedPositive(torch.ones(2), 1.0)
    for seed in range(5):
        gradient = torch.randn(2, generator=torch.Generator().manual_seed(seed))
        parameter.grad = gradient.clone()
        adam.step()
        number.step(gradient / number.value)
        torch.testing.assert_close(number.value.log(), parameter.detach(), rtol=1e-5, atol=1e-6)


def test_projected_weights_take_one_rule_and_it_sees_the_final_gradient():
    layer = nn.Linear(2, 1, bias=False)
    projected = Projector.of(layer).add(Target("weight", layer, "weight", layer.weight))
    assert isinstance(projected, ProjectedWeight)
    seen = []
    projected.gradient_rule = lambda gradient: seen.append(gradient.clone()) or gradient.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    Projector.of(layer).attach([optimizer])
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 2)).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
    optimizer.step()
    assert seen[0].norm().item() == pytest.approx(0.1, rel=1e-4)
    assert torch.equal(layer.weight, before)
    Projector.of(layer).detach()
