"""Mask plan: from the scores of several weights to their masks, by granularity and scope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from lightning_compress.errors import TargetError
from lightning_compress.projection import ProjectedWeight
from lightning_compress.pruning.criteria import CRITERIA, Stateless
from lightning_compress.pruning.granularity import Granularity, Layout, Units, largest
from lightning_compress.pruning.masks import Scope, lowest_pruned
from lightning_compress.pruning.regrowth import exchange
from lightning_compress.pruning.statistics import Criterion
from lightning_compress.targets import Target

__all__ = [
    "MaskPlan",
    "check_sharded",
    "largest_in_rows",
    "normed_axis",
    "threshold_mask",
]
WHOLE = -1  # one norm for all weights, as torch calls it


def normed_axis(target: Target) -> int | None:
    """The axis along which weight_norm holds a norm each (-1: one for all); None without it.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> free = layer.parametrizations.weight
    >>> normed_axis(Target("", free, "original1", free.original1))
    0
    """
    if target.name == "original1":
        steps = [one for one in target.layer.children() if type(one).__name__ == "_WeightNorm"]
        return int(steps[0].dim) if steps else None  # type: ignore[arg-type]
    for hook in target.layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and target.name == f"{hook.name}_v":
            return WHOLE if hook.dim is None else int(hook.dim)
    return None


def largest_in_rows(values: Tensor, axis: int, closed: Tensor | None) -> Tensor:
    """True at the largest value of each index of the axis, of those that are not closed.

    Args:
        values: of any shape.
        axis: -1: of the whole tensor.
        closed: True where a weight is pruned and must not return; or None.

    >>> import torch
    >>> largest_in_rows(torch.tensor([[1.0, -3.0], [0.0, 0.0]]), 0, None)
    tensor([[False,  True],
            [ True, False]])
    """
    size = values.detach().abs()
    if closed is not None:
        size = size.masked_fill(closed, -1.0)
    rows = size.reshape(1, -1) if axis == WHOLE else size.movedim(axis, 0).flatten(1)
    flags = nn.functional.one_hot(rows.argmax(dim=1), rows.shape[1]).bool()
    if axis == WHOLE:
        return flags.view_as(size)
    return flags.view_as(size.movedim(axis, 0)).movedim(0, axis)


@dataclass
class MaskPlan:
    """Mask plan: granularity, scope and floors that turn scores into masks.

    Args:
        granularity: what is pruned together.
        scope: how the targets share the sparsity.
        reopen: whether what is pruned may return.
        layouts: of each target, by path.
        floors: fraction of each target that stays, by path.
    """

    granularity: Granularity
    scope: Scope
    reopen: bool
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)

    def fraction(self, sparsity: float) -> float:
        """Fraction of all removable units that is removed."""
        return min(sparsity / self.granularity.limit, 1.0)

    def masks(
        self,
        projected_weights: Sequence[ProjectedWeight],
        scores: Sequence[Tensor],
        sparsity: float,
    ) -> list[Tensor]:
        """A mask for each target, True where a weight stays.

        Args:
            projected_weights: the targets.
            scores: of each, low ones go first.
            sparsity: of all together, of their weights; met to half a unit.
        """
        signed = self.granularity.pools and any(bool((one < 0).any()) for one in scores)
        units = [
            self._units(*pair, signed=signed)
            for pair in zip(projected_weights, scores, strict=True)
        ]
        floors = [self._floor(*pair) for pair in zip(projected_weights, units, strict=True)]
        masks = self.scope(units, self.fraction(sparsity), floors)
        return [one.spread(mask) for one, mask in zip(units, masks, strict=True)]

    def exchanged(
        self, projected: ProjectedWeight, mask: Tensor, growth: Tensor, fraction: float
    ) -> Tensor:
        """A target's mask after RigL's exchange of a fraction of its active units."""
        layout, pools = self.layouts[projected.path], self.granularity.units
        size = projected.values().abs()
        if (axis := normed_axis(projected.target)) is not None:
            size = size.masked_fill(largest_in_rows(size, axis, ~mask), math.inf)
        magnitude = pools(size, layout, closed=~mask, signed=False)
        grown = pools(growth, layout, closed=None, signed=False)
        shut = magnitude.closed
        active = ~shut if shut is not None else mask
        return magnitude.spread(exchange(active, magnitude.scores, grown.scores, fraction))

    def check(self, projected_weights: Sequence[ProjectedWeight]) -> None:
        """Check that the granularity fits the targets, and set the size of its units.

        Raises:
            TargetError: where it would take whole rows of a weight_norm.
        """
        normed = [
            projected.path
            for projected in projected_weights
            if normed_axis(projected.target) is not None
        ]
        if normed and self.granularity.pools:
            raise TargetError(
                f"{normed} are under weight_norm, which divides by the norm of each row: single "
                "weights can be pruned there (granularity='unstructured' or 'n:m'), whole rows not"
            )
        for projected in projected_weights:
            size = self.granularity.size(projected.parameter.shape, self.layouts[projected.path])
            projected.unit = largest(size)

    def notes(self, projected_weights: Sequence[ProjectedWeight]) -> list[str]:
        """Targets that the granularity cannot prune, in words."""
        return self.granularity.rest(
            {one.path: one.parameter.shape for one in projected_weights}, self.layouts
        )

    def _units(self, projected: ProjectedWeight, scores: Tensor, *, signed: bool) -> Units:
        if scores.shape != projected.values().shape:
            shapes = f"{tuple(scores.shape)}, the weight {tuple(projected.values().shape)}"
            raise ValueError(f"the criterion's scores of {projected.path} have shape {shapes}")
        closed = None if self.reopen else projected.pruned
        layout = self.layouts[projected.path]
        if (axis := normed_axis(projected.target)) is not None:
            scores = scores.masked_fill(largest_in_rows(projected.values(), axis, closed), math.inf)
        units = self.granularity.units(scores, layout, closed=closed, signed=signed)
        projected.unit = units.largest
        if projected.shards is None:
            return units
        weight = projected.parameter
        return replace(units, capacity=weight.numel(), shape=weight.shape, shards=projected.shards)

    def _floor(self, projected: ProjectedWeight, units: Units) -> int:
        total = units.scores.numel() if units.shards is None else units.capacity
        kept = math.ceil(self.floors[projected.path] * total)
        if (axis := normed_axis(projected.target)) is not None:
            kept = max(kept, 1 if axis < 0 else projected.parameter.shape[axis])
        return max(0, min(kept, total) - (total - units.capacity))


def check_sharded(*, criterion: Criterion, pooled: bool, regrow: str | None, rewind: bool) -> None:
    """Check a way of pruning that is asked for on sharded parameters (FSDP2).

    Args:
        criterion: what scores; a user's own object is trusted.
        pooled: whether the granularity is another than single weights.
        regrow: how weights return.
        rewind: whether weights go back to earlier ones.

    Raises:
        TargetError: naming everything that does not work there.

    >>> check_sharded(criterion=Stateless(abs), pooled=False, regrow=None, rewind=False)
    """
    ours = type(criterion).__module__.startswith(__name__.rsplit(".", 1)[0])
    faults = {
        f"criterion {type(criterion).__name__}": ours and not isinstance(criterion, Stateless),
        "a granularity other than 'unstructured'": pooled,
        "regrow='gradient'": regrow == "gradient",
        "rewind": rewind,
    }
    if found := [what for what, wrong in faults.items() if wrong]:
        known = sorted(name for name in CRITERIA if name.startswith("magnitude"))
        raise TargetError(
            f"sharded parameters (FSDP2) cannot be pruned with {', '.join(found)}: valid are "
            f"criterion {known} or a function of the weight, granularity 'unstructured', and "
            "regrow None or 'straight_through'"
        )


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
