import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress.lab.models.gan import discriminator_loss, generator_loss, gradient_penalty


def test_non_saturating_is_binary_cross_entropy():
    real, fake = torch.randn(8), torch.randn(8)
    cross_entropy = functional.binary_cross_entropy_with_logits
    expected = cross_entropy(real, torch.ones(8)) + cross_entropy(fake, torch.zeros(8))
    torch.testing.assert_close(discriminator_loss(real, fake, loss="non_saturating"), expected)
    expected = cross_entropy(fake, torch.ones(8))
    torch.testing.assert_close(generator_loss(fake, loss="non_saturating"), expected)


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake, loss="hinge").item() == pytest.approx((0.5 + 1.0) / 2)
    assert generator_loss(fake, loss="hinge").item() == pytest.approx(1.5)


class Flat(nn.Module):
    """Lets a plain function of flat pictures act as a critic."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1))


def test_penalty_of_a_linear_critic():
    weight = torch.tensor([3.0, 0.0, 4.0, 0.0])
    critic = Flat(lambda x: x @ weight)
    real, fake = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    penalty = gradient_penalty(critic, real, fake, mix=torch.rand(5, 1, 1, 1))
    assert penalty.item() == pytest.approx((5.0 - 1.0) ** 2)


def test_penalty_equals_finite_differences_at_the_mixed_picture():
    torch.manual_seed(0)
    critic = Flat(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0))
    ).double()
    real, fake = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    mix = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64).view(3, 1, 1, 1)
    between, step, columns = mix * real + (1 - mix) * fake, 1e-5, []
    for i in range(4):
        move = step * functional.one_hot(torch.tensor(i), 4).double().view(1, 1, 2, 2)
        columns.append((critic(between + move) - critic(between - move)) / (2 * step))
    expected = (torch.stack(columns, 1).norm(dim=1) - 1).square().mean()
    penalty = gradient_penalty(critic, real, fake, mix=mix)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)


def test_penalty_trains_the_critic_and_nothing_else():
    critic = Flat(nn.Linear(4, 1))
    fake = torch.randn(3, 1, 2, 2, requires_grad=True)
    gradient_penalty(critic, torch.randn(3, 1, 2, 2), fake, mix=torch.rand(3, 1, 1, 1)).backward()
    assert fake.grad is None
    assert critic.function.weight.grad.abs().sum() > 0
