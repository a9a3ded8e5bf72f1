"""Rate-distortion choice of grid points in which later weights make up for earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.layer_inputs import find_owner, from_matrix, to_matrix, weight_name
from lightning_compress.pruning.one_shot import gather_statistics
from lightning_compress.pruning.optimal_brain_surgeon import OptimalBrainSurgeon, upper_factor
from lightning_compress.targets import select

__all__ = ["LayerHessian", "compensated", "compensated_choice", "layer_hessians", "symbol_bits"]

_BLOCK = 128  # columns at once
_LEAST = 1e-3  # of the mean importance, that a row has


class LayerHessian:
    """H of a weight's layer, group by group, and the weight as its matrix.

    Args:
        projected: the weight.
        hessians: (C, C) of each group, damped.
    """

    def __init__(self, projected: ProjectedWeight, hessians: Sequence[Tensor]) -> None:
        self.hessians, self._name = hessians, weight_name(projected)
        owner = find_owner(projected)
        assert owner is not None
        self._owner, self._shape = owner, tuple(projected.data.shape)

    def matrix(self, values: Tensor) -> Tensor:
        """Values of the weight's shape as (groups, rows, columns)."""
        return to_matrix(values, self._owner, self._name)

    def weight(self, matrix: Tensor) -> Tensor:
        """The reverse of `matrix`."""
        return from_matrix(matrix, self._owner, self._shape, self._name)


def layer_hessians(
    module: nn.Module, batches: Sequence[object], paths: Sequence[str]
) -> Iterator[tuple[str, LayerHessian]]:
    """Path and Hessian of the weights whose layers' inputs are known in full; the rest is left out.

    Args:
        module: that runs the batches; in any mode.
        batches: as `calibration_batches` has them.
        paths: of weights.
    """
    found = [one for one in select(module, frozen=True).targets if one.path in set(paths)]
    projected_weights = [ProjectedWeight(target) for target in found]
    if not projected_weights:
        return
    judge = OptimalBrainSurgeon(window=1)
    judge.begin(projected_weights)
    try:
        gather_statistics(module, projected_weights, judge, batches)
        for projected in projected_weights:
            if (hessians := judge.hessians(projected)) is not None:
                yield projected.path, LayerHessian(projected, hessians)
    finally:
        judge.end()


def symbol_bits(symbols: Tensor, zero: Tensor, size: Tensor) -> Tensor:
    """Bits of symbols, by the lengths that `code_lengths` gives.

    Args:
        symbols: steps from 0.
        zero: bits of a 0 at each place.
        size: bits of |q| = 0, 1, 2, ... where it is not 0; a larger one costs as the last.

    >>> symbol_bits(torch.tensor([0, -1]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 3.0]))
    tensor([1., 4.])
    """
    other = -(1 - torch.exp2(-zero)).clamp(min=1e-9).log2()  # of not being 0
    many = symbols.abs().long().clamp(max=len(size) - 1)
    return torch.where(symbols == 0, zero, other + size[many])


@torch.no_grad()
def compensated_choice(
    symbols: Tensor,
    scale: Tensor,
    hessian: Tensor,
    bits: tuple[Tensor, Tensor],
    worth: Tensor,
    limits: tuple[int, int],
) -> Tensor:
    """Symbols of least `error / 2 + worth * bits`, column by column; later ones make up for each.

    A column's candidates are the nearest grid point of what is left to make up for, the one
    next to it on the way to 0, and 0; a zero stays one. A change e of column q costs
    `e^2 / (2 U_qq^2)` and moves the columns r behind it by `-e U_qr / U_qq`, where H^-1 = U^T U
    (GPTQ, arXiv:2210.17323, equations 2 and 3, with the rate of DeepCABAC, arXiv:1907.11900).

    Args:
        symbols: (R, C) steps from 0 before.
        scale: (R, C) size of a step.
        hessian: (C, C), damped.
        bits: of a zero at each place, (R, C); and of |q| = 0, 1, 2, ... where it is none.
        worth: (R, 1) what a bit is worth in each row, in units of the row's error.
        limits: smallest and largest symbol.

    >>> hessian = torch.tensor([[2.0, 1.9], [1.9, 2.0]], dtype=torch.float64)
    >>> lengths = torch.tensor([[0.1, 0.1]]), torch.tensor([0.0, 3.0, 3.0, 3.0])
    >>> one, worth = torch.ones(1, 2), torch.tensor([[0.1]])
    >>> compensated_choice(torch.tensor([[1, 2]]), one, hessian, lengths, worth, (-3, 3))
    tensor([[0, 3]])
    """
    zero, size = (one.double() for one in bits)
    factor, columns = upper_factor(hessian), symbols.shape[1]
    scale, worth = scale.double(), worth.double().reshape(-1)
    left, free = symbols.double() * scale, symbols != 0
    chosen = torch.zeros_like(symbols)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = left.new_zeros(len(left), stop - start)
        for q in range(start, stop):
            wanted = left[:, q] / scale[:, q]
            nearest = wanted.round().clamp(*limits)
            lower = nearest.abs().sub(1).clamp(min=0).copysign(nearest)
            best = torch.full_like(wanted, torch.inf)
            taken = torch.zeros_like(wanted)
            for candidate in (nearest, lower, torch.zeros_like(wanted)):
                rate = symbol_bits(candidate, zero[:, q], size)
                change = (wanted - candidate) * scale[:, q] / factor[q, q]
                cost = change.square() / 2 + worth * rate
                better = (cost < best) & (free[:, q] | (candidate == 0))
                best, taken = torch.where(better, cost, best), torch.where(better, candidate, taken)
            chosen[:, q] = taken.to(chosen.dtype)
            error = (left[:, q] - taken * scale[:, q]) / factor[q, q]
            left[:, q:stop] -= error.unsqueeze(1) * factor[q, q:stop]
            errors[:, q - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return chosen


@torch.no_grad()
def compensated(
    symbols: Tensor,
    plain: Tensor,
    scale: Tensor,
    importance: Tensor,
    layer: LayerHessian,
    lengths: tuple[Tensor, Tensor],
    rdoq: float,
    limits: tuple[int, int],
) -> Tensor:
    """Symbols of a weight after `compensated_choice`, in the rows where that is the better one.

    H says what the changes of a layer's weights do to its own output; a row's importances say
    what that is worth beside other rows and layers: each row's error is scaled to their mean.

    Args:
        symbols: of the weight, steps from 0, before.
        plain: the choice without compensation, to compare with.
        scale: size of a step, of the weight's shape.
        importance: of a change of one step, of the weight's shape.
        layer: the weight's Hessian.
        lengths: what `code_lengths` gives of `plain`.
        rdoq: what a bit is worth.
        limits: smallest and largest symbol.
    """
    zero, size = lengths
    parts = [layer.matrix(one) for one in (symbols, plain, scale, importance, zero)]
    found = []
    for old, other, step, matters, free, hessian in zip(*parts, layer.hessians, strict=True):
        own = (step.double().square() * hessian.diagonal()).mean(1)
        unit = matters.double().mean(1)
        unit = unit.clamp(min=_LEAST * float(unit.mean())) / own.clamp(min=torch.finfo().tiny)
        new = compensated_choice(old, step, hessian, (free, size), (rdoq / unit)[:, None], limits)
        costs = [
            unit * _added_error((one - old) * step, hessian)
            + rdoq * symbol_bits(one, free.double(), size.double()).sum(1)
            for one in (new, other)
        ]
        found.append(torch.where((costs[0] < costs[1])[:, None], new, other))
    return layer.weight(torch.stack(found))


def _added_error(change: Tensor, hessian: Tensor) -> Tensor:
    """(R,) `d^T H d / 2` of changes (R, C) of a layer's rows."""
    change = change.double()
    return (change @ hessian * change).sum(1) / 2
