"""Masks: from scores and a sparsity to what stays, exact to the weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_compress.sharding import Shards

__all__ = ["global_masks", "layer_masks", "lowest_pruned", "pack_mask", "unpack_mask"]

_CHUNK = 1 << 18  # elements handled at once: bounds the extra memory of a prune event
_HALF = 1 << 16
_Pairs = Sequence[tuple[Tensor, Tensor | None]]


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


def layer_masks(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Keep the highest scores of each tensor by itself, the same sparsity everywhere.

    Raises:
        ValueError: as `global_masks`.

    >>> layer_masks([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])], 0.5)
    [tensor([ True, False]), tensor([ True, False])]
    """
    return [global_masks([score], sparsity)[0] for score in scores]


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
    total = int(total if shards is None else shards.sum(total))
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
    """Chunks of int32 that sort as the float32 scores do (radix keys)."""
    shut = [] if closed is None else closed.reshape(-1).split(_CHUNK)
    for index, chunk in enumerate(scores.detach().reshape(-1).split(_CHUNK)):
        floats = chunk.to(torch.float32)
        if closed is not None:
            floats = floats.masked_fill(shut[index], -math.inf)
        if torch.isnan(floats).any():
            raise ValueError("a pruning score is NaN: the weights or their statistics are broken")
        # Adding 0 turns -0.0 into 0.0. Positive floats sort as their bits do, negative ones
        # backwards: flip all of their bits but the sign.
        bits = (floats + 0.0).view(torch.int32)
        yield bits ^ ((bits >> 31) & 0x7FFF_FFFF)


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
        counts = counts if shards is None else shards.sum(counts)
        cumulative = below + counts.cumsum(0)
        bucket = int(torch.searchsorted(cumulative, rank, right=True))
        below = int(cumulative[bucket] - counts[bucket])
        prefix = prefix * _HALF + bucket if level else bucket - _HALF // 2
    return prefix, below


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
