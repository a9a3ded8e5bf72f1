"""Measures of a module that need nothing but its weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_compress.targets import Pattern, select

__all__ = ["sparsity"]


def sparsity(module: nn.Module, include: Sequence[Pattern] | Pattern | None = None) -> float:
    """Fraction of zeros in the compressible weights, in [0, 1].

    Args:
        module: any module.
        include: path globs or layer classes; None: the weights of the part that ships.

    Raises:
        TargetError: for a pattern that matches nothing.

    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.fill_(0.0)[0].fill_(1.0)
    >>> sparsity(layer)
    0.5
    """
    targets = select(module, include).targets
    zeros = sum(int((target.parameter == 0).sum()) for target in targets)
    return zeros / sum(target.numel for target in targets)
