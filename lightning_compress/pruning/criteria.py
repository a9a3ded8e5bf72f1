"""Criteria: a score for each weight; the weights with the lowest scores are pruned."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["CRITERIA", "Criterion", "magnitude"]

Criterion = Callable[[Tensor], Tensor]


def magnitude(weight: Tensor) -> Tensor:
    """Importance by absolute value, of the weight's own shape (Han et al. 2015).

    >>> import torch
    >>> magnitude(torch.tensor([-2.0, 1.0]))
    tensor([2., 1.])
    """
    return weight.detach().abs()


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude}
