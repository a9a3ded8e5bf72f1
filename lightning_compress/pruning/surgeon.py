"""Optimal Brain Surgeon for the rows of one matrix: what to prune, and what the rest does then.

All rows share the Hessian H of the squared error of their outputs (Hassibi & Stork 1993;
Frantar & Alistarh 2022, arXiv:2208.11580). Everything is float64 on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compensate", "damped_hessian", "exact_update", "saliency", "sequential_update"]

_EXACT_WORK = 2e10  # sum over rows of min(kept, pruned)^3: a second or two on one core


def damped_hessian(gram: Tensor, damping: float) -> Tensor:
    """H = 2 X X^T + damping * mean(diagonal) * I, from X X^T (C, C) or its diagonal (C,).

    Inputs that were zero throughout say nothing: H is the identity then.

    >>> damped_hessian(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), 0.5)
    tensor([[4., 0.],
            [0., 8.]], dtype=torch.float64)
    """
    hessian = 2 * gram.detach().to("cpu", torch.float64)
    diagonal = hessian if hessian.dim() == 1 else hessian.diagonal()
    mean = diagonal.mean().item()
    diagonal += damping * mean if mean > 0 else 1.0
    return hessian


def saliency(weights: Tensor, hessian: Tensor) -> Tensor:
    """w^2 / [H^-1]_qq of each weight (R, C): twice the error that its best removal leaves.

    >>> saliency(torch.tensor([[2.0, 1.0]]), torch.eye(2, dtype=torch.float64))
    tensor([[4., 1.]], dtype=torch.float64)
    """
    weights = weights.detach().to("cpu", torch.float64)
    if hessian.dim() == 1:
        return weights.square() * hessian
    return weights.square() / _inverse(hessian).diagonal()


def compensate(
    weights: Tensor, keep: Tensor, hessian: Tensor, *, solver: str = "auto", block_size: int = 128
) -> Tensor:
    """The kept weights after those of the mask are gone, by the least added output error.

    Args:
        weights: (R, C) before pruning; weights that are zero already may be in the mask.
        keep: (R, C), True where a weight stays.
        hessian: (C, C), damped.
        solver: "exact" for each row's optimum, "sequential" for SparseGPT's pass over the
            columns (a row that masking alone serves better is just masked), "auto": exact while
            the rows' systems are small.
        block_size: columns at once in the sequential pass.
    """
    weights = weights.detach().to("cpu", torch.float64)
    keep = keep.cpu()
    if solver == "auto":
        kept = keep.sum(1, dtype=torch.float64)
        work = torch.minimum(kept, keep.shape[1] - kept).pow(3).sum().item()
        solver = "exact" if work <= _EXACT_WORK else "sequential"
    if solver == "exact":
        return exact_update(weights, keep, hessian)
    updated = sequential_update(weights, keep, hessian, block_size=block_size)
    masked = weights.masked_fill(~keep, 0.0)  # nothing bounds the pass: a row may come out worse
    worse = _added_error(updated - weights, hessian) > _added_error(masked - weights, hessian)
    return torch.where(worse.unsqueeze(1), masked, updated)


def exact_update(weights: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """Each row's optimum on its kept support K: w_K + H_KK^-1 H_KP w_P.

    The same as eliminating the pruned set P weight by weight with the classical formula
    `w - w_q / [H^-1]_qq * H^-1[:, q]`, with the smaller of the two systems solved.

    >>> hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> row = torch.tensor([[4.0, 2.0]], dtype=torch.float64)
    >>> exact_update(row, torch.tensor([[True, False]]), hessian)
    tensor([[5., 0.]], dtype=torch.float64)
    """
    gone = weights.masked_fill(keep, 0.0)
    pull = gone @ hessian
    updated = weights.masked_fill(~keep, 0.0)
    inverse = None
    for row in torch.nonzero(gone.any(1)).flatten().tolist():
        kept, pruned = keep[row].nonzero().flatten(), (~keep[row]).nonzero().flatten()
        if len(kept) == 0:
            continue
        if len(kept) <= len(pruned):
            updated[row, kept] += _solve(hessian[kept][:, kept], pull[row, kept])
        else:
            inverse = _inverse(hessian) if inverse is None else inverse
            amount = _solve(inverse[pruned][:, pruned], gone[row, pruned])
            updated[row, kept] -= inverse[kept][:, pruned] @ amount
    return updated


def sequential_update(
    weights: Tensor, keep: Tensor, hessian: Tensor, *, block_size: int = 128
) -> Tensor:
    """SparseGPT's pass (Frantar & Alistarh 2023, arXiv:2301.00774) with the mask fixed.

    Columns go from left to right, in blocks; each removal is made up for by the columns after
    it, so all rows share one factor of H^-1. An approximation of `exact_update`.

    >>> hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> row = torch.tensor([[4.0, 2.0]], dtype=torch.float64)
    >>> sequential_update(row, torch.tensor([[False, True]]), hessian).round(decimals=6)
    tensor([[0., 4.]], dtype=torch.float64)
    """
    factor = torch.linalg.cholesky(_inverse(hessian), upper=True)
    weights, columns = weights.clone(), weights.shape[1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = weights.new_zeros(len(weights), stop - start)
        for q in range(start, stop):
            error = weights[:, q].masked_fill(keep[:, q], 0.0) / factor[q, q]
            weights[:, q:stop] -= error.unsqueeze(1) * factor[q, q:stop]
            errors[:, q - start] = error
        weights[:, stop:] -= errors @ factor[start:stop, stop:]
    return weights.masked_fill_(~keep, 0.0)


def _added_error(change: Tensor, hessian: Tensor) -> Tensor:
    return (change @ hessian * change).sum(1)


def _inverse(hessian: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
