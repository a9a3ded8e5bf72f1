"""Draws from a latent's prior, from a stream of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compress.errors import TargetError

__all__ = ["PriorDraws"]


class PriorDraws:
    """Standard normal inputs in the shape of what a module receives, but for the batch.

    Args:
        count: examples a draw.
        seed: of the stream.

    >>> PriorDraws(5, seed=0)((torch.zeros(2, 3),))[0].shape
    torch.Size([5, 3])
    """

    def __init__(self, count: int, *, seed: int) -> None:
        self.count = count
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, args: tuple[Any, ...]) -> tuple[Tensor]:
        """Draw.

        Raises:
            TargetError: when the module's first input is no floating-point tensor.
        """
        like = args[0] if args else None
        if len(args) != 1 or not isinstance(like, Tensor) or not like.is_floating_point():
            raise TargetError(
                "prior draws take the place of one floating-point tensor, a latent; this module "
                f"receives {[type(one).__name__ for one in args]}"
            )
        drawn = torch.randn(self.count, *like.shape[1:], generator=self.generator)
        return (drawn.to(like.device, like.dtype),)
