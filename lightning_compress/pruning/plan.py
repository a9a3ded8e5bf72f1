"""MaskPlan: from the scores of several weights to their masks, by granularity and scope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_compress.errors import TargetError
from lightning_compress.projection import Slot
from lightning_compress.pruning.layout import Layout
from lightning_compress.pruning.normed import normed_axis, row_leaders
from lightning_compress.pruning.regrowth import exchange
from lightning_compress.pruning.scopes import Scope
from lightning_compress.pruning.units import Granularity, Units, largest

__all__ = ["MaskPlan"]


@dataclass
class MaskPlan:
    """How masks are made.

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
        """What part of all units that may go, goes."""
        return min(sparsity / self.granularity.limit, 1.0)

    def masks(
        self, slots: Sequence[Slot], scores: Sequence[Tensor], sparsity: float
    ) -> list[Tensor]:
        """A mask for each target, True where a weight stays.

        Args:
            slots: the targets.
            scores: of each, low ones go first.
            sparsity: of all together, of their weights; met to half a unit.
        """
        signed = self.granularity.pools and any(bool((one < 0).any()) for one in scores)
        units = [self._units(*pair, signed=signed) for pair in zip(slots, scores, strict=True)]
        floors = [self._floor(*pair) for pair in zip(slots, units, strict=True)]
        masks = self.scope(units, self.fraction(sparsity), floors)
        return [one.spread(mask) for one, mask in zip(units, masks, strict=True)]

    def exchanged(self, slot: Slot, mask: Tensor, growth: Tensor, fraction: float) -> Tensor:
        """A target's mask after RigL's exchange of a fraction of its active units."""
        layout, pools = self.layouts[slot.path], self.granularity.units
        size = slot.values().abs()
        if (axis := normed_axis(slot.target)) is not None:
            size = size.masked_fill(row_leaders(size, axis, ~mask), math.inf)
        magnitude = pools(size, layout, closed=~mask, signed=False)
        grown = pools(growth, layout, closed=None, signed=False)
        shut = magnitude.closed
        active = ~shut if shut is not None else mask
        return magnitude.spread(exchange(active, magnitude.scores, grown.scores, fraction))

    def check(self, slots: Sequence[Slot]) -> None:
        """Check that the granularity fits the targets, and tell them the size of its units.

        Raises:
            TargetError: where it would take whole rows of a weight_norm.
        """
        normed = [slot.path for slot in slots if normed_axis(slot.target) is not None]
        if normed and self.granularity.pools:
            raise TargetError(
                f"{normed} are under weight_norm, which divides by the norm of each row: single "
                "weights can be pruned there (granularity='unstructured' or 'n:m'), whole rows not"
            )
        for slot in slots:
            size = self.granularity.size(slot.parameter.shape, self.layouts[slot.path])
            slot.unit = largest(size)

    def notes(self, slots: Sequence[Slot]) -> list[str]:
        """What of the targets the granularity cannot take."""
        return self.granularity.rest({one.path: one.parameter.shape for one in slots}, self.layouts)

    def _units(self, slot: Slot, scores: Tensor, *, signed: bool) -> Units:
        if scores.shape != slot.values().shape:
            shapes = f"{tuple(scores.shape)}, the weight {tuple(slot.values().shape)}"
            raise ValueError(f"the criterion's scores of {slot.path} have shape {shapes}")
        closed = None if self.reopen else slot.pruned
        layout = self.layouts[slot.path]
        if (axis := normed_axis(slot.target)) is not None:
            scores = scores.masked_fill(row_leaders(slot.values(), axis, closed), math.inf)
        units = self.granularity.units(scores, layout, closed=closed, signed=signed)
        slot.unit = units.largest
        if slot.shards is None:
            return units
        weight = slot.parameter
        return replace(units, capacity=weight.numel(), shape=weight.shape, shards=slot.shards)

    def _floor(self, slot: Slot, units: Units) -> int:
        total = units.scores.numel() if units.shards is None else units.capacity
        kept = math.ceil(self.floors[slot.path] * total)
        if (axis := normed_axis(slot.target)) is not None:
            kept = max(kept, 1 if axis < 0 else slot.parameter.shape[axis])
        return max(0, min(kept, total) - (total - units.capacity))
