"""Losses between features: where a student looks, and how it relates the examples of a batch.

Student and teacher may have different channel counts: no adapter is needed. The last two compare
the examples of one batch, so under DDP each process compares its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attention_transfer", "linear_cka", "similarity_preserving"]


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of normalized attention maps.

    A map is the mean over channels of squared activations, flattened, of norm 1. Zagoruyko and
    Komodakis 2017, equation 2 with p = 2, https://arxiv.org/abs/1612.03928.

    Args:
        student: features (N, C, H, W).
        teacher: features (N, C', H, W).

    >>> x = torch.rand(2, 3, 4, 4)
    >>> attention_transfer(x, 5 * x).item() < 1e-12
    True
    """
    return (_attention(student) - _attention(teacher)).square().mean()


def _attention(features: Tensor) -> Tensor:
    return functional.normalize(features.square().mean(1).flatten(1), dim=1)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of row-normalized similarity matrices over the batch, divided by N^2.

    Tung and Mori 2019, equations 1 to 4, https://arxiv.org/abs/1907.09682.

    Args:
        student: features (N, ...).
        teacher: features (N, ...), of any other size.
    """
    difference = _similarity(student) - _similarity(teacher)
    return difference.square().sum() / difference.shape[0] ** 2


def _similarity(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return functional.normalize(rows @ rows.T, dim=1)


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - CKA with linear kernels: 0 for equal representations up to rotation and scale.

    Kornblith et al. 2019, equation 4, https://arxiv.org/abs/1905.00414.

    Args:
        student: features (N, ...), N of at least 2.
        teacher: features (N, ...), of any other size.

    >>> x = torch.rand(8, 3)
    >>> abs(linear_cka(x, 7 * x.flip(1)).item()) < 1e-5
    True
    """
    ours, theirs = _centered_gram(student), _centered_gram(teacher)
    norms = torch.linalg.vector_norm(ours) * torch.linalg.vector_norm(theirs)
    return 1 - (ours * theirs).sum() / norms.clamp_min(torch.finfo(ours.dtype).tiny)


def _centered_gram(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    rows = rows - rows.mean(0)
    return rows @ rows.T
