"""How far a file's outputs are from the module's, counted in steps of the output's grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["SAME", "Parity", "compare"]

SAME = 0.02  # of a step: floats that differ in their last digits


@dataclass(frozen=True)
class Parity:
    """Differences of single numbers, over all outputs and checked inputs.

    Args:
        equal: share that agree up to float rounding.
        one_step: share that differ by up to one step.
        more: share that differ by more.
        largest: largest difference, in steps.
        max_abs_error: the same in the output's own unit.
        elements: how many numbers were compared.
    """

    equal: float
    one_step: float
    more: float
    largest: float
    max_abs_error: float
    elements: int


def compare(
    run: Callable[[tuple[torch.Tensor, ...]], Sequence[NDArray]],
    batches: Sequence[tuple[torch.Tensor, ...]],
    expected: Sequence[Sequence[torch.Tensor]],
    steps: Sequence[float],
) -> Parity:
    """Compare a runtime's outputs with the expected ones.

    Args:
        run: inputs -> outputs.
        batches: inputs.
        expected: outputs of each batch.
        steps: the step of each output.
    """
    counts, largest, error = np.zeros(3, np.int64), 0.0, 0.0
    for batch, wanted in zip(batches, expected, strict=True):
        for got, want, step in zip(run(batch), wanted, steps, strict=True):
            if tuple(got.shape) != tuple(want.shape):
                return Parity(0.0, 0.0, 1.0, float("inf"), float("inf"), want.numel())
            apart = np.abs(got.astype(np.float64) - want.double().numpy())
            apart = np.where(np.isnan(apart), np.inf, apart)
            away = apart / step
            counts += [(away <= SAME).sum(), ((away > SAME) & (away <= 1 + SAME)).sum(), 0]
            counts[2] += (away > 1 + SAME).sum()
            largest = max(largest, float(away.max(initial=0)))
            error = max(error, float(apart.max(initial=0)))
    shares = counts / max(1, counts.sum())
    equal, one, more = (float(share) for share in shares)
    return Parity(equal, one, more, largest, error, int(counts.sum()))
