"""Threshold masks: what is as large as a threshold stays."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_compress.pruning.masks import lowest_pruned

__all__ = ["threshold_mask"]


def threshold_mask(
    weight: Tensor,
    threshold: float,
    *,
    relative: bool = False,
    min_keep: float = 0.0,
    closed: Tensor | None = None,
) -> Tensor:
    """True where `|weight| >= threshold`.

    Args:
        weight: of any shape.
        threshold: in units of the weights, or of their standard deviation.
        relative: the latter.
        min_keep: fraction that stays at least, rounded up: the largest.
        closed: True where a weight is pruned and must not return; or None.

    Raises:
        ValueError: for a weight that is NaN.

    >>> import torch
    >>> threshold_mask(torch.tensor([0.5, -2.0, 1.0]), 1.0)
    tensor([False,  True,  True])
    """
    size = weight.detach().abs()
    if relative:
        threshold = threshold * weight.detach().float().std(correction=0).item()
    mask = size >= threshold
    if closed is not None:
        mask &= ~closed
    least = min(math.ceil(min_keep * size.numel()), size.numel())
    if int(mask.sum()) >= least and not size.isnan().any():
        return mask
    return lowest_pruned([size], size.numel() - least, closed=[closed])[0]
