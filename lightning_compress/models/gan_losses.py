"""Adversarial losses as pure functions of scores and pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LOSSES", "discriminator_loss", "generator_loss", "gradient_penalty"]

LOSSES = ("non_saturating", "hinge")


def discriminator_loss(real: Tensor, fake: Tensor, *, loss: str) -> Tensor:
    """Loss of the discriminator from its scores (N,) of real and fake pictures.

    `"non_saturating"`: Goodfellow et al. 2014; `"hinge"`: Lim and Ye 2017.

    >>> discriminator_loss(torch.tensor([2.0]), torch.tensor([-0.5]), loss="hinge").item()
    0.5
    """
    if loss == "hinge":
        return (functional.relu(1 - real) + functional.relu(1 + fake)).mean()
    return (functional.softplus(-real) + functional.softplus(fake)).mean()


def generator_loss(fake: Tensor, *, loss: str) -> Tensor:
    """Loss of the generator from the discriminator's scores (N,) of its pictures."""
    return -fake.mean() if loss == "hinge" else functional.softplus(-fake).mean()


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, *, mix: Tensor) -> Tensor:
    """Mean of (|gradient of the critic| - 1)^2 at mix * real + (1 - mix) * fake, in float32.

    Gulrajani et al. 2017, equation 3, https://arxiv.org/abs/1704.00028.

    Args:
        critic: pictures (N, C, H, W) -> scores (N,); no layer of it may mix examples.
        real: pictures (N, C, H, W).
        fake: pictures (N, C, H, W).
        mix: weights in [0, 1], (N, 1, 1, 1).
    """
    # Autocast off: half-precision gradients of gradients lose what the square needs.
    with torch.autocast(real.device.type, enabled=False):
        between = (mix * real + (1 - mix) * fake).detach().requires_grad_()
        scores = critic(between).sum()
        (gradient,) = torch.autograd.grad(scores, between, create_graph=True)
    norm = torch.linalg.vector_norm(gradient.float().flatten(1), dim=1)
    return (norm - 1).square().mean()
