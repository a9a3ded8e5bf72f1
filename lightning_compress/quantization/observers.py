"""Observers: the range of values that a grid has to cover."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["minmax_range"]


def minmax_range(values: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, widened to hold 0, each of shape (1,) or (size of axis,).

    Raises:
        ValueError: when a value is not finite.

    >>> minmax_range(torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), axis=0)
    (tensor([ 0., -3.]), tensor([2.0000, 0.5000]))
    """
    values = values.detach().to(torch.float32)
    if not torch.isfinite(values).all():
        raise ValueError("cannot find the range of values that are NaN or infinite")
    rows = values.reshape(1, -1) if axis is None else values.transpose(0, axis).flatten(1)
    if rows.shape[1] == 0:
        return torch.zeros(rows.shape[0]), torch.zeros(rows.shape[0])
    low, high = torch.aminmax(rows, dim=1)
    return low.clamp(max=0), high.clamp(min=0)
