"""Masks: from scores and a sparsity to what stays, exact to the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["SCOPES", "global_masks", "keep_best", "layer_masks", "pack_mask", "unpack_mask"]

_CHUNK = 1 << 22  # elements handled at once: bounds the extra memory of a prune event
_HALF = 1 << 16


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
    return _lowest_pruned(scores, round(sparsity * total))


def layer_masks(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Keep the highest scores of each tensor by itself, the same sparsity everywhere.

    Raises:
        ValueError: as `global_masks`.

    >>> layer_masks([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])], 0.5)
    [tensor([ True, False]), tensor([ True, False])]
    """
    return [global_masks([score], sparsity)[0] for score in scores]


def keep_best(scores: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """Scores in which the best of each tensor are infinite: no mask takes them.

    Args:
        scores: one tensor a layer.
        fraction: of each tensor, rounded up to whole weights.

    >>> keep_best([torch.tensor([3.0, 1.0]), torch.tensor([0.2, 0.1])], 0.5)
    [tensor([inf, 1.]), tensor([   inf, 0.1000])]
    """
    if fraction == 0:
        return list(scores)
    kept = []
    for score in scores:
        count = min(math.ceil(fraction * score.numel()), score.numel())
        mask = _lowest_pruned([score], score.numel() - count)[0]
        kept.append(score.float().masked_fill(mask, math.inf))
    return kept


SCOPES: dict[str, Callable[[Sequence[Tensor], float], list[Tensor]]] = {
    "global": global_masks,
    "layer": layer_masks,
}


def _ordered(scores: Tensor) -> Iterator[Tensor]:
    """Chunks of whole numbers in [0, 2^32) that sort as the float32 scores do (radix keys)."""
    for chunk in scores.detach().reshape(-1).split(_CHUNK):
        floats = chunk.to(torch.float32)
        if torch.isnan(floats).any():
            raise ValueError("a pruning score is NaN: the weights or their statistics are broken")
        # Adding 0 turns -0.0 into 0.0. Positive floats sort as their bits do, negative ones
        # backwards: flip all their bits, and shift the positive ones above them.
        bits = (floats + 0.0).view(torch.int32).to(torch.int64)
        yield torch.where(bits < 0, -bits - 1, bits + (1 << 31))


def _kth_key(scores: Sequence[Tensor], rank: int) -> tuple[int, int]:
    """Key of the score at a rank (0 is the lowest), and how many keys are smaller.

    Two passes of histograms over 16 bits each: no sort, no copy of all scores.
    """
    below, prefix = 0, 0
    for level in range(2):
        counts = torch.zeros(_HALF, dtype=torch.int64)
        for score in scores:
            for keys in _ordered(score):
                keys = keys[keys // _HALF == prefix] % _HALF if level else keys // _HALF
                counts += torch.bincount(keys, minlength=_HALF).cpu()
        cumulative = below + counts.cumsum(0)
        bucket = int(torch.searchsorted(cumulative, rank, right=True))
        below = int(cumulative[bucket] - counts[bucket])
        prefix = prefix * _HALF + bucket
    return prefix, below


def _lowest_pruned(scores: Sequence[Tensor], pruned: int) -> list[Tensor]:
    masks = [torch.ones(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    if pruned == 0:
        return masks
    threshold, below = _kth_key(scores, pruned - 1)
    ties = pruned - below  # of the keys that equal the threshold, so many go as well
    for score, mask in zip(scores, masks, strict=True):
        flat, start = mask.view(-1), 0
        for keys in _ordered(score):
            part = flat[start : start + keys.numel()]
            part.copy_(keys >= threshold)
            equal = torch.nonzero(keys == threshold).squeeze(1)[:ties]
            part[equal] = False
            ties -= equal.numel()
            start += keys.numel()
    return masks


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
