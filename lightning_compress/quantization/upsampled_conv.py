"""Convolutions behind an upsampling, and grids on which sums of their weights fit int8.

Behind nearest-neighbour upsampling several weights of a kernel meet the same pixel: their sum can
multiply it once, before it is repeated. An int8 file does so where all sums fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.hooks import hook_input

__all__ = ["LARGEST", "EnlargedReaders", "saves_by_sums", "step_for_sums", "summed_taps"]

LARGEST = 127
SLACK = 0.05  # weights that train on may have larger sums when their grids are settled


def summed_taps(weight: Tensor, factor: int) -> Tensor:
    """Kernel of a convolution on an image before it is upsampled by `factor`.

    Args:
        weight: (out, in / groups, kh, kw), of any dtype.
        factor: by which nearest-neighbour upsampling enlarges rows and columns.

    Returns:
        (out, in / groups, kh + factor - 1, kw + factor - 1): sums of up to `factor^2` weights.
    """
    kh, kw = (size + factor - 1 for size in weight.shape[2:])
    full = weight.new_zeros(*weight.shape[:2], kh, kw)
    for row in range(factor):
        for column in range(factor):
            full[:, :, row : row + weight.shape[2], column : column + weight.shape[3]] += weight
    return full


def step_for_sums(weight: Tensor, factor: int, axis: int | None, *, slack: float = SLACK) -> Tensor:
    """Smallest step, of shape (out,) or (1,), on whose grid sums of weights fit int8.

    Args:
        weight: (out, in / groups, kh, kw).
        factor: of the enlargement.
        axis: 0 for a step an output channel; None: one for all.
        slack: room for larger sums, as a fraction.

    >>> import torch
    >>> step_for_sums(torch.ones(1, 1, 3, 3), 2, None, slack=0.0) == 4 / 125
    tensor([True])
    """
    sums = summed_taps(weight.detach().float(), factor).abs()
    most = sums.amax().reshape(1) if axis is None else sums.flatten(1).amax(1)
    return most * (1 + slack) / (LARGEST - factor**2 / 2)  # rounding adds half a step for each


def saves_by_sums(kernel: tuple[int, ...], factor: int) -> bool:
    """Whether a kernel behind an enlargement multiplies less before it."""
    taps = 1
    for size in kernel:
        taps *= -(-(size + factor - 1) // factor)
    return factor > 1 and taps < kernel[0] * kernel[1]


class EnlargedReaders:
    """Finds convolutions behind a nearest-neighbour upsampling, as they run.

    Each is looked at once, when first a gradient is to flow through what it reads.

    Args:
        layers: by path.
        tell: is called with a path and the factor, for each that is found.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3))
    >>> finder = EnlargedReaders({"0": net[0], "2": net[2]}, lambda *found: print(found))
    >>> _ = net(torch.zeros(1, 1, 4, 4))
    ('2', 2)
    >>> finder.stop()
    """

    def __init__(self, layers: Mapping[str, nn.Module], tell: Callable[[str, int], None]) -> None:
        self._handles: dict[str, RemovableHandle] = {}
        for path, layer in layers.items():
            if _may_save(layer):
                look = partial(self._look, path, layer, tell)
                self._handles[path] = hook_input(layer, look, first=True)

    def _look(
        self, path: str, layer: nn.Module, tell: Callable[[str, int], None], x: Tensor
    ) -> Tensor:
        if x.grad_fn is not None and path in self._handles:
            self._handles.pop(path).remove()
            factor = _factor(x.grad_fn)
            if factor is not None and saves_by_sums(tuple(layer.weight.shape[2:]), factor):  # pyright: ignore
                tell(path, factor)
        return x

    @property
    def looking(self) -> bool:
        """Whether any layer is still to be looked at."""
        return bool(self._handles)

    def stop(self) -> None:
        """Remove the hooks that are left."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


def _may_save(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and set(layer.stride) == {1}
        and set(layer.dilation) == {1}
        and layer.padding_mode == "zeros"
    )


def _factor(node: Any) -> int | None:
    """How often each row and column stands in what a node of autograd's graph gives."""
    if type(node).__name__ != "UpsampleNearest2DBackward0":
        return None
    given = node._saved_self_sym_sizes
    (high, wide) = node._saved_output_size
    factor, rest = divmod(high, given[2])
    return factor if not rest and wide == factor * given[3] else None
