"""Regrowth of pruned weights (RigL): the smallest weights give way to the largest gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.masks import lowest_pruned
from lightning_compress.pruning.statistics import over_processes

__all__ = [
    "DenseGradients",
    "Regrowth",
    "exchange",
    "exchanged_fraction",
    "make_regrowth",
    "reset_momenta",
]

_KINDS = ("straight_through", "gradient")


@dataclass(frozen=True, kw_only=True)
class Regrowth:
    """How pruned weights may return: `GradualPruning(regrow=...)`.

    Args:
        kind: "straight_through": pruned weights keep training by dense gradients and may return
            at a pruning event. "gradient": RigL (Evci et al. 2020, arXiv:1911.11134), at each
            event some of the smallest weights make room for the largest gradients.
        fraction: of the active weights, exchanged by "gradient" at `begin`; a cosine anneals it
            to 0 at `end`.

    Raises:
        ValueError: for an unknown kind, and a fraction outside (0, 1).

    >>> Regrowth(kind="gradient", fraction=0.5).fraction
    0.5
    """

    kind: str = "gradient"
    fraction: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"regrow={self.kind!r}: valid are {[None, *_KINDS]}")
        if not 0 < self.fraction < 1:
            raise ValueError(f"regrow: fraction={self.fraction!r} must lie between 0 and 1")


def make_regrowth(regrow: str | Regrowth | None, scope: str, *, fixed: bool) -> Regrowth | None:
    """Make the `Regrowth` of a kind, and check that scope and granularity allow it.

    Args:
        regrow: None, a kind, or a `Regrowth`.
        scope: how the targets share the sparsity.
        fixed: whether the granularity fixes the sparsity of each layer, as n:m does.

    Raises:
        ValueError: for an unknown kind, and for one that the granularity does not allow.

    >>> make_regrowth("gradient", "erk", fixed=False)
    Regrowth(kind='gradient', fraction=0.3)
    """
    found = regrow if regrow is None or isinstance(regrow, Regrowth) else Regrowth(kind=regrow)
    if fixed and (scope == "erk" or (found is not None and found.kind == "gradient")):
        raise ValueError(
            "a granularity of n:m fixes the sparsity of each layer: scope='erk' and "
            "regrow='gradient' would move it"
        )
    return found


class DenseGradients:
    """The gradient of the last step at every position, pruned or not: RigL's criterion."""

    window = 1

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._taps: list[tuple[ProjectedWeight, Callable[[Tensor], None]]] = []

    def begin(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        """Read the gradients from now on."""
        for projected in projected_weights:
            tap = self._tap(projected)
            projected.taps.append(tap)
            self._taps.append((projected, tap))

    def scores(self, projected: ProjectedWeight) -> Tensor:
        """Absolute gradients of a weight, of all processes' batches; zeros where none arrived."""
        gradient = self._gradients.get(projected.path)
        gradient = torch.zeros_like(projected.values()) if gradient is None else gradient
        return over_processes(gradient).abs()

    def end(self) -> None:
        """Stop reading."""
        for projected, tap in self._taps:
            if tap in projected.taps:
                projected.taps.remove(tap)
        self._taps.clear()
        self._gradients.clear()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: gradients are read within a step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""

    def _tap(self, projected: ProjectedWeight) -> Callable[[Tensor], None]:
        def read(gradient: Tensor) -> None:
            known, summed = self._gradients.get(projected.path), projected.parameter.grad
            # Where gradients accumulate over several batches, so do these.
            goes_on = known is not None and summed is not None and bool(summed.any())
            if known is not None and goes_on:
                known += gradient.detach()
            else:
                self._gradients[projected.path] = gradient.detach().clone()

        return read


def exchanged_fraction(fraction: float, done: float) -> float:
    """Share of the weights that is exchanged, by a cosine from `fraction` to 0.

    Args:
        fraction: at the beginning.
        done: part of the window that is done, from 0 to 1.

    >>> exchanged_fraction(0.3, 0.0), exchanged_fraction(0.3, 1.0)
    (0.3, 0.0)
    """
    return fraction / 2 * (1 + math.cos(math.pi * done))


def exchange(mask: Tensor, magnitude: Tensor, growth: Tensor, fraction: float) -> Tensor:
    """A mask with a fraction of its active weights exchanged, their number unchanged.

    Evci et al. 2020, arXiv:1911.11134, section 3: the smallest magnitudes leave, and of what is
    then not active the largest gradients come in; what has just left may come back.

    Args:
        mask: True where a unit stays, any shape.
        magnitude: of each unit, of the same shape.
        growth: absolute gradient of each unit.
        fraction: of the active units, rounded down.

    >>> mask = torch.tensor([True, True, False, False])
    >>> exchange(mask, torch.tensor([3.0, 1, 0, 0]), torch.tensor([9.0, 0, 1, 2]), 0.5)
    tensor([ True, False, False,  True])
    """
    count = int(fraction * int(mask.sum()))
    if count == 0:
        return mask
    survivors = mask & lowest_pruned([magnitude.masked_fill(~mask, math.inf)], count)[0]
    candidates = lowest_pruned([growth], growth.numel() - count, closed=[survivors])[0]
    return survivors | candidates


@torch.no_grad()
def reset_momenta(
    optimizers: Sequence[Optimizer], projected: ProjectedWeight, mask: Tensor
) -> None:
    """Zero the momenta of regrown weights, as RigL does.

    Args:
        optimizers: all of them.
        projected: the weight, with its mask until now.
        mask: its next mask, True where a weight stays.
    """
    if projected.pruned is None:
        return
    grown = mask & projected.pruned
    for optimizer in optimizers:
        for kept in optimizer.state.get(projected.parameter, {}).values():
            if isinstance(kept, Tensor) and kept.shape == grown.shape:
                kept.masked_fill_(grown, 0.0)
