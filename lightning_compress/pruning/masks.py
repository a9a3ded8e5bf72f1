"""Pruning masks from scores: exact top-k, global, per layer or Erdos-Renyi-Kernel; bit-packing."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_compress.pruning.granularity import Units
from lightning_compress.sharding import Shards

__all__ = [
    "SCOPES",
    "Scope",
    "erk_unit_masks",
    "global_masks",
    "global_unit_masks",
    "kept_counts",
    "layer_unit_masks",
    "lowest_pruned",
    "pack_mask",
    "unpack_mask",
    "were_pruned",
]
_CHUNK = 1 << 18  # elements handled at once: bounds the extra memory of a prune event
_HALF = 1 << 16
_LOWEST, _HIGHEST = -0x7F80_0001, 0x7F80_0000  # keys of the infinities; those of NaNs lie beyond
_FEW_ZEROS = 0.3  # below, rounding to few bits may have made them
_HEAVY = 2.5  # tails heavier than Laplace's, which trained weights may have
_Pairs = Sequence[tuple[Tensor, Tensor | None]]
Scope = Callable[[Sequence[Units], float, Sequence[int]], list[Tensor]]


def global_masks(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Keep the highest scores over all tensors together.

    Exactly `round(sparsity * total)` positions are pruned; of equal scores the first go first.

    Raises:
        ValueError: for a sparsity outside [0, 1] or a score that is NaN.

    >>> global_masks([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])], 0.5)
    [tensor([ True, False]), tensor([ True, False])]
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity!r} must lie in [0, 1]")
    total = sum(score.numel() for score in scores)
    return lowest_pruned(scores, round(sparsity * total))


def lowest_pruned(
    scores: Sequence[Tensor],
    count: int,
    *,
    closed: Sequence[Tensor | None] = (),
    shards: Shards | None = None,
) -> list[Tensor]:
    """Masks (True stays) that prune the lowest scores over all tensors together.

    No sort and no copy of the scores: two passes of histograms find the threshold.

    Args:
        scores: one tensor a layer, of any shapes.
        count: positions to prune, from 0 to all; of equal scores the first go first.
        closed: for each tensor None, or True where a position goes before all others.
        shards: when the scores are one process's parts of tensors that are spread over several:
            the count is of all of them together, the masks are of these parts.

    Raises:
        ValueError: for a count out of range or a score that is NaN.

    >>> lowest_pruned([torch.tensor([3.0, 1.0, 2.0])], 1)
    [tensor([ True, False,  True])]
    >>> lowest_pruned([torch.tensor([3.0, 1.0])], 1, closed=[torch.tensor([True, False])])
    [tensor([False,  True])]
    """
    total = torch.tensor(sum(score.numel() for score in scores))
    total = int(total if shards is None else shards.all_reduce_sum(total))
    if not 0 <= count <= total:
        raise ValueError(f"cannot prune {count} of {total} scores")
    masks = [torch.ones(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    if count == 0:
        return masks
    pairs = list(zip(scores, closed or [None] * len(scores), strict=True))
    threshold, below = _kth_key(pairs, count - 1, shards)
    ties = count - below  # of the keys that equal the threshold, so many go as well
    quotas = None if shards is None else shards.quotas(_equal(pairs, threshold), ties)
    for index, ((score, shut), mask) in enumerate(zip(pairs, masks, strict=True)):
        flat, start = mask.view(-1), 0
        ties = ties if quotas is None else quotas[index]
        for keys in _ordered(score, shut):
            part = flat[start : start + keys.numel()]
            part.copy_(keys >= threshold)
            if ties:
                equal = torch.nonzero(keys == threshold).squeeze(1)[:ties]
                part[equal] = False
                ties -= equal.numel()
            start += keys.numel()
    return masks


def _ordered(scores: Tensor, closed: Tensor | None) -> Iterator[Tensor]:
    """Chunks of int32 that sort as the float32 scores do (radix keys).

    Whole numbers are moved by bits: `masked_fill` and `isnan` take many times as long on a CPU.
    """
    shut = [] if closed is None else closed.reshape(-1).split(_CHUNK)
    for index, chunk in enumerate(scores.detach().reshape(-1).split(_CHUNK)):
        # Adding 0 turns -0.0 into 0.0. Positive floats sort as their bits do, negative ones
        # backwards: flip all of their bits but the sign.
        keys = (chunk.to(torch.float32) + 0.0).view(torch.int32)
        keys ^= (keys >> 31) & 0x7FFF_FFFF
        if closed is not None:
            ones = -shut[index].to(torch.int32)  # all bits, or none
            keys = (keys & ~ones) | (ones & _LOWEST)
        if keys.numel():
            low, high = keys.aminmax()
            if low < _LOWEST or high > _HIGHEST:
                raise ValueError(
                    "a pruning score is NaN: the weights or their statistics are broken"
                )
        yield keys


def _equal(pairs: _Pairs, threshold: int) -> Tensor:
    """How many keys of each tensor equal the threshold."""
    counts = [sum(int((keys == threshold).sum()) for keys in _ordered(*pair)) for pair in pairs]
    return torch.tensor(counts)


def _kth_key(pairs: _Pairs, rank: int, shards: Shards | None) -> tuple[int, int]:
    """Key of the score at a rank (0 is the lowest), and how many keys are smaller.

    Two passes of histograms over 16 bits each: no sort, no copy of all scores.
    """
    below, prefix = 0, 0
    for level in range(2):
        counts = torch.zeros(_HALF, dtype=torch.int64)
        for score, closed in pairs:
            for keys in _ordered(score, closed):
                upper = keys >> 16
                half = keys[upper == prefix] & (_HALF - 1) if level else upper + _HALF // 2
                counts += torch.bincount(half, minlength=_HALF).cpu()
        counts = counts if shards is None else shards.all_reduce_sum(counts)
        cumulative = below + counts.cumsum(0)
        bucket = int(torch.searchsorted(cumulative, rank, right=True))
        below = int(cumulative[bucket] - counts[bucket])
        prefix = prefix * _HALF + bucket if level else bucket - _HALF // 2
    return prefix, below


def were_pruned(steps: Tensor) -> bool:
    """Whether weights on a grid hold more zeros than rounding makes, so that some were pruned.

    Rounding a Laplace distribution makes a fraction `z` of zeros, and of what is left a fraction
    `(1 - z)^2` lies further than one step from 0; of a Gaussian it is less. Pruned weights leave a
    gap: what is left lies far out.

    Args:
        steps: whole steps from 0.

    >>> far = torch.tensor([0, 0, 0, 0, 0, 0, 7, -5, 3, -4])
    >>> were_pruned(far), were_pruned(far.clamp(-1, 1))
    (True, False)
    """
    sizes = steps.abs()
    zeros = float((sizes == 0).float().mean())
    left = int((sizes > 0).sum())
    if zeros < _FEW_ZEROS or not left:
        return False
    return int((sizes > 1).sum()) / left > _HEAVY * (1 - zeros) ** 2


def pack_mask(mask: Tensor) -> Tensor:
    """A mask as bytes, eight positions in each, for checkpoints.

    >>> pack_mask(torch.tensor([True, False, True])).tolist()
    [160]
    """
    flat = mask.detach().reshape(-1).to("cpu", torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of a shape from its bytes; the reverse of `pack_mask`.

    Raises:
        ValueError: when the bytes are too few or too many for the shape.

    >>> unpack_mask(torch.tensor([160], dtype=torch.uint8), (3,))
    tensor([ True, False,  True])
    """
    count = int(torch.Size(shape).numel())
    if packed.numel() != -(-count // 8):
        raise ValueError(f"{packed.numel()} bytes cannot hold a mask of shape {tuple(shape)}")
    bits = packed.view(-1, 1) >> torch.arange(7, -1, -1, dtype=torch.uint8)
    return (bits & 1).to(torch.bool).reshape(-1)[:count].reshape(tuple(shape))


def global_unit_masks(units: Sequence[Units], fraction: float, keep: Sequence[int]) -> list[Tensor]:
    """Compare all units together: `round(fraction * total)` go, of weights where sizes differ.

    Args:
        units: of each weight.
        fraction: of all capacities that goes, in [0, 1].
        keep: units of each weight that stay, whatever the others score.

    Returns:
        A mask of units for each weight.
    """
    sizes = _sizes(units)
    target = round(fraction * sum(map(_total, units, sizes)))
    masks: list[Tensor | None] = [None] * len(units)
    while True:
        rest = [index for index, mask in enumerate(masks) if mask is None]
        left = [units[index] for index in rest]
        found = _lowest(left, _nearest(left, [sizes[index] for index in rest], target))
        # A weight that loses too much gets its own count; the others then lose more, never less.
        short = []
        for index, mask in zip(rest, found, strict=True):
            if units[index].count(~mask) > units[index].capacity - keep[index]:
                short.append(index)
                masks[index] = own = _keep(units[index], keep[index])
                target -= _gone(units[index], sizes[index], own)
        if not short:
            break
    for index, mask in zip(rest, found, strict=True):
        masks[index] = mask
    return [mask for mask in masks if mask is not None]


def layer_unit_masks(units: Sequence[Units], fraction: float, keep: Sequence[int]) -> list[Tensor]:
    """The same fraction of each weight, arguments as `global_unit_masks`."""
    return [
        global_unit_masks([one], fraction, [floor])[0]
        for one, floor in zip(units, keep, strict=True)
    ]


def erk_unit_masks(units: Sequence[Units], fraction: float, keep: Sequence[int]) -> list[Tensor]:
    """Erdos-Renyi-Kernel, arguments as `global_unit_masks`.

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
        target = totals[index] - counts[index] + owed
        count = min(_nearest([one], [size], target), one.capacity - keep[index])
        masks[index] = _lowest([one], count)[0]
        owed = target - _gone(one, size, masks[index])
    return [masks[index] for index in range(len(units))]


def kept_counts(
    raw: Sequence[float], total: int, floors: Sequence[int], ceilings: Sequence[int]
) -> list[int]:
    """Integer counts in proportion to `raw` within bounds, that add up to the total.

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


SCOPES: dict[str, Scope] = {
    "global": global_unit_masks,
    "layer": layer_unit_masks,
    "erk": erk_unit_masks,
}


def _sizes(units: Sequence[Units]) -> list[int | Tensor]:
    """Weights in the units of each weight; 1 where all of them are of one size."""
    sizes = [one.size for one in units]
    return [1] * len(sizes) if _equal_sizes(sizes) else sizes


def _equal_sizes(sizes: Sequence[int | Tensor]) -> bool:
    return all(isinstance(one, int) for one in sizes) and len(set(sizes)) <= 1


def _total(units: Units, size: int | Tensor) -> int:
    return units.capacity * size if isinstance(size, int) else int(size.sum())


def _gone(units: Units, size: int | Tensor, mask: Tensor) -> int:
    """Weights in the units that a mask prunes."""
    if isinstance(size, int):
        return units.count(~mask) * size
    return int(size.to(mask.device)[~mask].sum())


def _nearest(units: Sequence[Units], sizes: Sequence[int | Tensor], target: int) -> int:
    """How many units, the lowest first, hold a number of weights that is nearest to a target.

    Of two that are equally near, the smaller; never fewer than are closed.
    """
    capacity = sum(one.capacity for one in units)
    if _equal_sizes(sizes) and (not sizes or sizes[0] == 1):
        return min(max(target, 0), capacity)
    ranked, held = [], []
    for one, size in zip(units, sizes, strict=True):
        scores = one.scores.float()
        if one.closed is not None:
            scores = scores.masked_fill(one.closed, -math.inf)
        ranked.append(scores.flatten())
        held.append(torch.as_tensor(size, device=scores.device).expand(len(ranked[-1])))
    steps = torch.cat(held)[torch.cat(ranked).argsort(stable=True)].cumsum(0)
    reached = [0, *steps.tolist()]
    above = min(bisect.bisect_left(reached, target), capacity)
    count = above - 1 if above and 2 * target <= reached[above] + reached[above - 1] else above
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
