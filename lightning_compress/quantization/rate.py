"""How many bits symbols cost, and how that changes with the weights behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.sharding import ONE_PIECE, Spread

__all__ = ["entropy_bits", "rate_gradient"]

_MOST = 255  # steps from 0 on any grid of 8 bits


def entropy_bits(symbols: Tensor, *, spread: Spread = ONE_PIECE) -> float:
    """Bits of all symbols together at their zero-order entropy.

    Args:
        symbols: steps from 0, none below -255.
        spread: over which processes, when these are one process's: bits are the whole's.

    >>> entropy_bits(torch.tensor([0, 0, 1, -1]))
    6.0
    """
    flat = symbols.reshape(-1).long() + _MOST
    counts = spread.sum(torch.bincount(flat, minlength=2 * _MOST + 1)).double()
    counts = counts[counts > 0]
    return float((counts * (counts.sum().log2() - counts.log2())).sum())


def rate_gradient(symbols: Tensor, step: Tensor | float, *, spread: Spread = ONE_PIECE) -> Tensor:
    """Change of the code length, in bits, with the latent value of each weight.

    Central differences of the code lengths `-log2 p(|symbol|)` of the histogram as it is, with
    half a count more everywhere: a weight is drawn to where symbols are common, mostly to 0. What
    is at 0 already stays there.

    Args:
        symbols: whole steps from 0.
        step: size of a step.
        spread: over which processes, when the symbols are one process's; one of theirs may have
            none, all together have some.

    >>> rate_gradient(torch.tensor([0, 0, 0, 0, 1, -2]), 0.5).round(decimals=2)
    tensor([0.0000, 0.0000, 0.0000, 0.0000, 2.5800, -0.0000])
    """
    size = symbols.abs().long()
    counts = spread.sum(torch.bincount(size.reshape(-1), minlength=_MOST + 1))
    counts = counts[: int(counts.nonzero()[-1]) + 1].float() + 0.5
    counts[1:] /= 2  # either sign
    lengths = -(counts / counts.sum()).log2()
    # A step beyond the largest symbol costs no more than the largest: nothing is known there.
    ahead, behind = torch.roll(lengths, -1), torch.roll(lengths, 1)
    ahead[-1] = lengths[-1]
    slope = (ahead - behind) / 2
    slope[0] = 0.0
    return slope[size] * symbols.sign() / step
