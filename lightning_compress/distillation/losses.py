"""Losses between outputs of a student and its teacher, as pure functions of tensors.

Each takes the student first and returns a scalar; the teacher's side gets no gradient, since it
arrives without a graph. Temperatures divide logits, and `T^2` keeps the size of the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["bernoulli_kl", "cross_entropy", "gaussian_kl", "kl_divergence", "l1", "mse"]

Gaussian = tuple[Tensor, Tensor]


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of squared differences over all elements.

    >>> mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).item()
    2.0
    """
    return functional.mse_loss(student, teacher)


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of absolute differences over all elements.

    >>> l1(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).item()
    1.0
    """
    return functional.l1_loss(student, teacher)


def cross_entropy(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """Cross-entropy in nats of the student's classes under the teacher's soft targets, times T^2.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531. Its gradient is that of `kl_divergence`.

    Args:
        student: logits, classes along `dim`.
        teacher: logits of the same shape.
        temperature: T, above 0.
        dim: axis of the classes; the mean goes over all others.
    """
    targets = (teacher / temperature).softmax(dim)
    loss = -(targets * (student / temperature).log_softmax(dim)).sum(dim)
    return temperature**2 * loss.mean()


def kl_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """KL in nats of the student's classes from the teacher's, both softened, times T^2.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531.

    Args:
        student: logits, classes along `dim`.
        teacher: logits of the same shape.
        temperature: T, above 0.
        dim: axis of the classes; the mean goes over all others.

    >>> kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), temperature=3.0).item()
    0.0
    """
    targets = (teacher / temperature).log_softmax(dim)
    ours = (student / temperature).log_softmax(dim)
    return temperature**2 * (targets.exp() * (targets - ours)).sum(dim).mean()


def bernoulli_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL in nats between independent pixels given as logits, times T^2.

    Summed over the pixels of a picture and averaged over pictures: the unit of a VAE's loss.

    Args:
        student: logits, (N, ...).
        teacher: logits, (N, ...).
        temperature: T, above 0.

    >>> bernoulli_kl(torch.zeros(1, 3), torch.zeros(1, 3)).item()
    0.0
    """
    ours, theirs = student / temperature, teacher / temperature
    # log p = t - softplus(t) and log(1 - p) = -softplus(t), for a logit t.
    kl = theirs.sigmoid() * (theirs - ours)
    kl = kl + functional.softplus(ours) - functional.softplus(theirs)
    return temperature**2 * kl.flatten(1).sum(1).mean()


def gaussian_kl(student: Gaussian, teacher: Gaussian) -> Tensor:
    """KL in nats of the teacher's diagonal normal from the student's, closed form.

    KL(teacher || student), summed over the latent units and averaged over examples: the student's
    posterior has to cover the teacher's.

    Args:
        student: (mu, logvar), each (N, L).
        teacher: (mu, logvar), each (N, L).

    >>> gaussian_kl((torch.zeros(1, 1), torch.zeros(1, 1)), (torch.ones(1, 1), torch.zeros(1, 1)))
    tensor(0.5000)
    """
    (mu, logvar), (mu_t, logvar_t) = student, teacher
    ratio = (logvar_t - logvar).exp() + (mu_t - mu).square() * torch.exp(-logvar)
    return 0.5 * (ratio - 1 - logvar_t + logvar).sum(1).mean()
