"""Sensitivity: what each layer's compression costs while all other layers stay dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.budget.sensitivity import LayerScan, Sensitivity
from lightning_compress.errors import check_choice
from lightning_compress.grids import check_bits
from lightning_compress.modes import evaluating
from lightning_compress.pruning.masks import global_masks
from lightning_compress.quantization.entropy import entropy_bits
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.targets import Pattern, Target, clean_path, select

__all__ = ["BITS", "SPARSITIES", "check_scan", "scan_sensitivity"]

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
BITS = (2, 3, 4, 6)


@torch.no_grad()
def scan_sensitivity(
    module: nn.Module,
    score: Callable[[Any], float],
    *,
    metric: str = "score",
    better: str = "lower",
    sparsities: Sequence[float] = SPARSITIES,
    bits: Sequence[int] = BITS,
    include: Sequence[Pattern] | Pattern | None = None,
    exclude: Sequence[Pattern] | Pattern = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Score a model with one layer pruned or rounded at a time; nothing trains, nothing stays.

    Args:
        module: the trained dense model; in eval mode while it is scored.
        score: of the module, the same rows and latents each time: noise would be taken for loss.
        metric: what the score is called.
        better: "lower" or "higher".
        sparsities: by magnitude, in [0, 1), rising.
        bits: of one symmetric grid a tensor, 2 to 8.
        include: path globs or layer classes; None: the weights of the deployed part.
        exclude: the same, taken away again.
        progress: called with each layer's path.

    Raises:
        ValueError: for values out of range.
        TargetError: for patterns that match nothing.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 3.0]]))
    >>> found = scan_sensitivity(layer, lambda one: float(one(torch.ones(2))), better="higher",
    ...     sparsities=[0.5], bits=[2])
    >>> found.dense, found.layers[0].sparse_loss
    (4.0, (1.0,))
    """
    check_scan(sparsities, bits, better)
    sign = 1.0 if better == "lower" else -1.0
    targets = select(module, include, exclude, frozen=True).targets
    with evaluating(module):
        dense = float(score(module))
        layers = []
        for target in targets:
            progress(clean_path(target.path))
            layers.append(
                _scan_layer(target, lambda: sign * (float(score(module)) - dense), sparsities, bits)
            )
    return Sensitivity(metric, dense, better, layers)


def _scan_layer(
    target: Target, loss: Callable[[], float], sparsities: Sequence[float], bits: Sequence[int]
) -> LayerScan:
    weight = target.parameter.detach().clone()
    pruned = [weight, *(_pruned(weight, one) for one in sparsities)]
    sparse_loss, bits_loss = [], []
    for values in pruned[1:]:
        with _in_place(target, values):
            sparse_loss.append(loss())
    for count in bits:
        with _in_place(target, affine_grid(weight, bits=count).project(weight)):
            bits_loss.append(loss())
    return LayerScan(
        clean_path(target.path),
        target.numel,
        tuple(sparsities),
        tuple(sparse_loss),
        tuple(bits),
        tuple(bits_loss),
        tuple(tuple(_bytes(values, count) for count in bits) for values in pruned),
    )


def _pruned(weight: Tensor, sparsity: float) -> Tensor:
    (mask,) = global_masks([weight.abs()], sparsity)
    return weight.masked_fill(~mask, 0.0)


def _bytes(values: Tensor, bits: int) -> float:
    return entropy_bits(affine_grid(values, bits=bits).quantize(values)) / 8


@contextmanager
def _in_place(target: Target, values: Tensor) -> Iterator[None]:
    before = target.parameter.detach().clone()
    target.parameter.copy_(values)
    try:
        yield
    finally:
        target.parameter.copy_(before)


def check_scan(sparsities: Sequence[float], bits: Sequence[int], better: str = "lower") -> None:
    """Check what is to be tried, before anything is trained for it.

    Raises:
        ValueError: naming the value and the valid ones.
    """
    check_choice("better", better, ("lower", "higher"))
    rising = all(a < b for a, b in pairwise(sparsities))
    if not rising or not all(0 < one < 1 for one in sparsities):
        raise ValueError(f"sparsities={list(sparsities)}: fractions in (0, 1), each above the last")
    for one in bits:
        check_bits("bits", one)
