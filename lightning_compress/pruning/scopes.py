"""Scopes: how one sparsity is shared among several weights, exact to the unit.

Where units differ in size, their weights are counted: as many of the lowest go as bring the number
of weights that are gone nearest to what is asked.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_compress.pruning.masks import lowest_pruned
from lightning_compress.pruning.units import Units

__all__ = ["SCOPES", "Scope", "erk_masks", "kept_counts", "layer_masks", "together_masks"]

Scope = Callable[[Sequence[Units], float, Sequence[int]], list[Tensor]]


def together_masks(units: Sequence[Units], fraction: float, keep: Sequence[int]) -> list[Tensor]:
    """Compare all units together: `round(fraction * total)` go, of weights where sizes differ.

    Args:
        units: of each weight.
        fraction: of all capacities that goes, in [0, 1].
        keep: units of each weight that stay, whatever the others score.

    Returns:
        A mask of units for each weight.
    """
    sizes = _sizes(units)
    goal = round(fraction * sum(map(_total, units, sizes)))
    masks: list[Tensor | None] = [None] * len(units)
    while True:
        rest = [index for index, mask in enumerate(masks) if mask is None]
        left = [units[index] for index in rest]
        found = _lowest(left, _nearest(left, [sizes[index] for index in rest], goal))
        # A weight that loses too much gets its own count; the others then lose more, never less.
        short = []
        for index, mask in zip(rest, found, strict=True):
            if units[index].count(~mask) > units[index].capacity - keep[index]:
                short.append(index)
                masks[index] = own = _keep(units[index], keep[index])
                goal -= _gone(units[index], sizes[index], own)
        if not short:
            break
    for index, mask in zip(rest, found, strict=True):
        masks[index] = mask
    return [mask for mask in masks if mask is not None]


def layer_masks(units: Sequence[Units], fraction: float, keep: Sequence[int]) -> list[Tensor]:
    """The same fraction of each weight, arguments as `together_masks`."""
    return [
        together_masks([one], fraction, [floor])[0] for one, floor in zip(units, keep, strict=True)
    ]


def erk_masks(units: Sequence[Units], fraction: float, keep: Sequence[int]) -> list[Tensor]:
    """Erdos-Renyi-Kernel, arguments as `together_masks`.

    A weight's density is in proportion to `sum(shape) / prod(shape)`, at most 1, scaled so that
    the total is exact. Evci et al. 2020, arXiv:1911.11134.
    """
    sizes = _sizes(units)
    totals = list(map(_total, units, sizes))
    raw = [
        sum(one.shape) / math.prod(one.shape) * all_
        for one, all_ in zip(units, totals, strict=True)
    ]
    floors = [
        math.ceil(low * all_ / max(one.capacity, 1))
        for one, low, all_ in zip(units, keep, totals, strict=True)
    ]
    ceilings = [
        all_ - (0 if one.closed is None else _gone(one, size, ~one.closed))
        for one, size, all_ in zip(units, sizes, totals, strict=True)
    ]
    counts = kept_counts(raw, sum(totals) - round(fraction * sum(totals)), floors, ceilings)
    masks: dict[int, Tensor] = {}
    owed = 0  # what whole units of one weight leave over is the next one's, large units first
    for index in sorted(range(len(units)), key=lambda index: -units[index].largest):
        one, size = units[index], sizes[index]
        goal = totals[index] - counts[index] + owed
        count = min(_nearest([one], [size], goal), one.capacity - keep[index])
        masks[index] = _lowest([one], count)[0]
        owed = goal - _gone(one, size, masks[index])
    return [masks[index] for index in range(len(units))]


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


def _sizes(units: Sequence[Units]) -> list[int | Tensor]:
    """Weights in the units of each weight; 1 where all of them are of one size."""
    sizes = [one.size for one in units]
    return [1] * len(sizes) if _equal(sizes) else sizes


def _equal(sizes: Sequence[int | Tensor]) -> bool:
    return all(isinstance(one, int) for one in sizes) and len(set(sizes)) <= 1


def _total(units: Units, size: int | Tensor) -> int:
    return units.capacity * size if isinstance(size, int) else int(size.sum())


def _gone(units: Units, size: int | Tensor, mask: Tensor) -> int:
    """Weights in the units that a mask prunes."""
    if isinstance(size, int):
        return units.count(~mask) * size
    return int(size.to(mask.device)[~mask].sum())


def _nearest(units: Sequence[Units], sizes: Sequence[int | Tensor], goal: int) -> int:
    """How many units, the lowest first, hold a number of weights that is nearest to a goal.

    Of two that are equally near, the smaller; never fewer than are closed.
    """
    capacity = sum(one.capacity for one in units)
    if _equal(sizes) and (not sizes or sizes[0] == 1):
        return min(max(goal, 0), capacity)
    ranked, held = [], []
    for one, size in zip(units, sizes, strict=True):
        scores = one.scores.float()
        if one.closed is not None:
            scores = scores.masked_fill(one.closed, -math.inf)
        ranked.append(scores.flatten())
        held.append(torch.as_tensor(size, device=scores.device).expand(len(ranked[-1])))
    steps = torch.cat(held)[torch.cat(ranked).argsort(stable=True)].cumsum(0)
    reached = [0, *steps.tolist()]
    above = min(bisect.bisect_left(reached, goal), capacity)
    count = above - 1 if above and 2 * goal <= reached[above] + reached[above - 1] else above
    return max(count, sum(one.capacity - one.open for one in units))


def _lowest(units: Sequence[Units], count: int) -> list[Tensor]:
    return lowest_pruned(
        [one.scores for one in units],
        count,
        closed=[one.closed for one in units],
        shards=units[0].shards if units else None,
    )


def _keep(units: Units, count: int) -> Tensor:
    return _lowest([units], units.capacity - count)[0]
