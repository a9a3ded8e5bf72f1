"""Optimal Brain Surgeon (OBS): scores and weight updates by each layer's Hessian."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_compress.errors import check_choice
from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.layer_inputs import LayerCall, from_matrix, to_matrix, weight_name
from lightning_compress.pruning.statistics import ForwardStatistics

__all__ = [
    "SOLVERS",
    "OptimalBrainSurgeon",
    "compensate",
    "damped_hessian",
    "exact_update",
    "saliency",
    "sequential_update",
    "upper_factor",
]
_EXACT_WORK = 2e10  # sum over rows of min(kept, pruned)^3: a second or two on one core
SOLVERS = ("auto", "exact", "sequential")


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
    """Updated kept weights after pruning to the mask, of least added output error.

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
    factor = upper_factor(hessian)
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


def upper_factor(hessian: Tensor) -> Tensor:
    """U with H^-1 = U^T U: row q says how later weights make up for one of weight q."""
    return torch.linalg.cholesky(_inverse(hessian), upper=True)


def _inverse(hessian: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)


class OptimalBrainSurgeon(ForwardStatistics):
    """w^2 / [H^-1]_qq, with a Hessian-based update of the kept weights of each row.

    H = 2 X X^T + damping * mean(diagonal) * I, over the inputs X of the window, for each layer
    and each group of a grouped convolution (Hassibi & Stork 1993; Optimal Brain Compression,
    arXiv:2208.11580; SparseGPT, arXiv:2301.00774). A transposed convolution is unfolded over
    its spread-out input, so that a row of H belongs to an input channel and a kernel tap. Under
    weight_norm and spectral_norm the row's scale is taken as constant.

    Memory is columns^2 floats a layer and group in the window. Above `max_columns` inputs and
    taps, only the diagonal is gathered, with a warning, and nothing is updated; an embedding's H
    is diagonal by nature.

    Args:
        window: steps of the owning optimizer, before an event, in which X gathers.
        damping: share of the mean diagonal that is added, above 0.
        max_columns: the largest H.
        max_samples: output positions drawn from each call, weighted up to the sum over all.
        solver: "exact", "sequential" (SparseGPT's pass) or "auto": exact while that is cheap.
        block_size: columns at once in the sequential pass.

    Raises:
        ValueError: for values out of range.

    >>> OptimalBrainSurgeon(solver="magic")
    Traceback (most recent call last):
    ValueError: solver='magic': valid are ['auto', 'exact', 'sequential']
    """

    def __init__(
        self,
        *,
        window: int = 10,
        damping: float = 0.01,
        max_columns: int = 4096,
        max_samples: int = 1024,
        solver: str = "auto",
        block_size: int = 128,
    ) -> None:
        super().__init__(window=window)
        check_choice("solver", solver, SOLVERS)
        if not damping > 0:
            raise ValueError(f"damping={damping!r} must be above 0: H may be singular without")
        sizes = {"max_columns": max_columns, "max_samples": max_samples, "block_size": block_size}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r} must be an integer, 1 or more")
        self.damping, self.solver, self.block_size = damping, solver, block_size
        self.max_columns, self.max_samples = max_columns, max_samples
        self._before: dict[str, Tensor | None] = {}  # masks at the time of the scores
        self._diagonal_only: set[str] = set()  # told already

    def begin(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        """Start to gather the Hessians."""
        super().begin(projected_weights)
        self._before = {projected.path: projected.pruned for projected in projected_weights}

    def end(self) -> None:
        """Remove the hooks and free the Hessians."""
        super().end()
        self._before = {}

    def scores(self, projected: ProjectedWeight) -> Tensor:
        """Scores of a weight, in its shape; the lowest go first.

        Raises:
            RuntimeError: outside `begin` and `end`.
        """
        self._check(projected)
        self._before[projected.path] = projected.pruned
        return super().scores(projected)

    def hessians(self, projected: ProjectedWeight) -> list[Tensor] | None:
        """The damped H of each group, (C, C); None where it is not known in full.

        Raises:
            RuntimeError: outside `begin` and `end`.
        """
        self._check(projected)
        sums, calls = self._total(projected.path)
        if not calls or sums.dim() != 3:
            return None
        return [damped_hessian(gram, self.damping) for gram in sums]

    @torch.no_grad()
    def update(self, projected: ProjectedWeight, mask: Tensor) -> Tensor | None:
        """Weights after pruning to the mask (True: stays); None where H is not known in full.

        It may be called before or after the mask is set, once the scores were computed. In
        distributed training every process must ask, and gets what the first one found.

        Raises:
            RuntimeError: outside `begin` and `end`.
        """
        if (hessians := self.hessians(projected)) is None:
            return None
        values, before = projected.values(), self._before[projected.path]
        if before is not None:  # an optimizer's momentum may have moved them since
            values = values.masked_fill(before, 0.0)
        owner, name = self._owners[projected.path], weight_name(projected)
        matrix, keep = to_matrix(values, owner, name), to_matrix(mask, owner, name)
        options = {"solver": self.solver, "block_size": self.block_size}
        new = [
            compensate(rows, kept, hessian, **options)
            for rows, kept, hessian in zip(matrix, keep, hessians, strict=True)
        ]
        weight = from_matrix(torch.stack(new), owner, values.shape, name)
        return _of_first_process(weight.to(values).contiguous())

    def _blank(self, projected: ProjectedWeight, matrix: Tensor) -> Tensor:
        groups, _, columns = matrix.shape
        shape = (
            (groups, columns) if self._diagonal(projected, columns) else (groups, columns, columns)
        )
        return matrix.new_zeros(shape, dtype=torch.float32)

    def _diagonal(self, projected: ProjectedWeight, columns: int) -> bool:
        if isinstance(self._owners[projected.path], nn.Embedding):
            return True
        if columns <= self.max_columns:
            return False
        if projected.path not in self._diagonal_only:
            self._diagonal_only.add(projected.path)
            warnings.warn(
                f"OptimalBrainSurgeon keeps only the diagonal of the Hessian of {projected.path}: "
                f"{columns} columns are more than max_columns={self.max_columns}",
                UserWarning,
                stacklevel=2,
            )
        return True

    def _seen(self, projected: ProjectedWeight, call: LayerCall) -> Tensor | None:
        inputs = call.inputs(weight_name(projected))
        if inputs is None:
            return None
        if self._sums[projected.path].dim() != 3:
            return inputs.energy()
        seed = zlib.crc32(f"{projected.path} {self._calls[projected.path]}".encode())
        return inputs.gram(self.max_samples, seed)

    def _score(self, projected: ProjectedWeight, sums: Tensor, calls: int) -> Tensor:  # noqa: ARG002
        matrix = self._matrix(projected)
        rows = [
            saliency(rows, damped_hessian(gram, self.damping))
            for rows, gram in zip(matrix, sums, strict=True)
        ]
        return self._weight(projected, torch.stack(rows).to(matrix.device, torch.float32))


def _of_first_process(weight: Tensor) -> Tensor:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(weight, 0)
    return weight
