"""Scopes: how one sparsity is shared among several weights, exact to the unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_compress.pruning.masks import lowest_pruned
from lightning_compress.pruning.units import Units

__all__ = ["SCOPES", "Scope", "erk_masks", "kept_counts", "layer_masks", "together_masks"]

Scope = Callable[[Sequence[Units], float, Sequence[int]], list[Tensor]]


def together_masks(units: Sequence[Units], fraction: float, keep: Sequence[int]) -> list[Tensor]:
    """Compare all units together: exactly `round(fraction * capacity)` of them go.

    Args:
        units: of each weight.
        fraction: of all capacities that goes, in [0, 1].
        keep: units of each weight that stay, whatever the others score.

    Returns:
        A mask of units for each weight.
    """
    capacity = sum(one.capacity for one in units)
    count = min(round(fraction * capacity), capacity - sum(keep))
    masks: list[Tensor | None] = [None] * len(units)
    while True:
        rest = [index for index, mask in enumerate(masks) if mask is None]
        found = _lowest([units[index] for index in rest], count)
        # A weight that loses too much gets its own count; the others then lose more, never less.
        short = []
        for index, mask in zip(rest, found, strict=True):
            if units[index].count(~mask) > units[index].capacity - keep[index]:
                short.append(index)
                masks[index] = _keep(units[index], keep[index])
                count -= units[index].capacity - keep[index]
        if not short:
            break
    for index, mask in zip(rest, found, strict=True):
        masks[index] = mask
    return [mask for mask in masks if mask is not None]


def layer_masks(units: Sequence[Units], fraction: float, keep: Sequence[int]) -> list[Tensor]:
    """The same fraction of each weight, arguments as `together_masks`."""
    counts = [
        max(one.capacity - round(fraction * one.capacity), floor)
        for one, floor in zip(units, keep, strict=True)
    ]
    return [_keep(one, count) for one, count in zip(units, counts, strict=True)]


def erk_masks(units: Sequence[Units], fraction: float, keep: Sequence[int]) -> list[Tensor]:
    """Erdos-Renyi-Kernel, arguments as `together_masks`.

    A weight's density is in proportion to `sum(shape) / prod(shape)`, at most 1, scaled so that
    the total is exact. Evci et al. 2020, arXiv:1911.11134.
    """
    total = sum(one.capacity for one in units)
    raw = [sum(one.shape) / math.prod(one.shape) * one.capacity for one in units]
    ceilings = [one.open for one in units]
    counts = kept_counts(raw, total - round(fraction * total), keep, ceilings)
    return [_keep(one, count) for one, count in zip(units, counts, strict=True)]


def kept_counts(
    raw: Sequence[float], total: int, floors: Sequence[int], ceilings: Sequence[int]
) -> list[int]:
    """Whole counts in proportion to `raw` within bounds, that add up to the total.

    The sum is exact wherever the bounds allow it; what rounding leaves goes to the largest rests.

    >>> kept_counts([1.0, 3.0], 10, [0, 0], [100, 6])
    [4, 6]
    """
    bounds = [(min(low, high), high) for low, high in zip(floors, ceilings, strict=True)]
    total = min(max(total, sum(low for low, _ in bounds)), sum(high for _, high in bounds))

    def shares(scale: float) -> list[float]:
        clipped = zip(raw, bounds, strict=True)
        return [min(max(scale * one, low), high) for one, (low, high) in clipped]

    least, most = 0.0, max((high / one for one, (_, high) in zip(raw, bounds, strict=True)))
    for _ in range(100):  # bisection, to the last bit
        middle = (least + most) / 2
        least, most = (middle, most) if sum(shares(middle)) < total else (least, middle)
    exact = shares(most)
    counts = [math.floor(one + 1e-9) for one in exact]
    by_rest = sorted(range(len(raw)), key=lambda index: counts[index] - exact[index])
    while (missing := total - sum(counts)) > 0:
        room = [index for index in by_rest if counts[index] < bounds[index][1]][:missing]
        for index in room:
            counts[index] += 1
    return counts


SCOPES: dict[str, Scope] = {"global": together_masks, "layer": layer_masks, "erk": erk_masks}


def _lowest(units: Sequence[Units], count: int) -> list[Tensor]:
    return lowest_pruned(
        [one.scores for one in units],
        count,
        closed=[one.closed for one in units],
        shards=units[0].shards if units else None,
    )


def _keep(units: Units, count: int) -> Tensor:
    return _lowest([units], units.capacity - count)[0]
