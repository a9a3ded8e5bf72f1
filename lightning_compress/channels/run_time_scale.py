"""Layers that scale their weight by its own size at run time.

PGAN and StyleGAN ("equalized learning rate", arXiv:1710.10196) multiply a weight by
`sqrt(2 / fan_in)` in each forward pass. Such a layer, cut to fewer inputs, computes another factor:
a power of the ratio of the sizes. Whatever formula stands in its forward, the power shows when
the layer is run with half of its inputs set to 0, and without them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.copies import copy_module

__all__ = ["size_power"]

_ALMOST = 1e-3  # powers are halves of integers, but for float32's rounding


@torch.no_grad()
def size_power(layer: Any, dim: int, x: Tensor, channel: int) -> float:
    """The power of n / n' by which a layer's response grows when n' of its n inputs stay.

    Args:
        layer: a Linear or convolution without groups.
        dim: the axis of its weight that reads inputs.
        x: what it received.
        channel: the axis of `x` that holds the inputs.

    Returns:
        0.0 for layers whose forward is torch's own, and where no power explains the change.

    >>> class Equalized(nn.Linear):
    ...     def forward(self, x):
    ...         return nn.functional.linear(x, self.weight / self.weight.shape[1] ** 0.5)
    >>> size_power(Equalized(8, 2), 1, torch.ones(1, 8), -1)
    0.5
    """
    count = x.shape[channel]
    if type(layer).forward.__module__.startswith("torch.nn.") or count < 2:
        return 0.0
    half = count // 2
    small, whole = copy_module(layer), x.clone()
    whole.narrow(channel, half, count - half).zero_()
    small.weight = nn.Parameter(layer.weight.narrow(dim, 0, half).contiguous())
    for name in ("in_channels", "in_features"):
        if hasattr(small, name):
            setattr(small, name, half)
    try:
        before, after = _response(layer, whole), _response(small, x.narrow(channel, 0, half))
    except Exception:  # whatever a forward raises: the removal is tried as a whole later
        return 0.0
    if not (before > 0 and after > 0):
        return 0.0
    power = math.log(after / before) / math.log(count / half)
    nearest = round(2 * power) / 2
    return nearest if abs(power - nearest) < _ALMOST else 0.0


def _response(layer: nn.Module, x: Tensor) -> float:
    """The size of what a layer makes of its input, without its bias and without hooks."""
    return float((layer.forward(x) - layer.forward(torch.zeros_like(x))).double().norm())
