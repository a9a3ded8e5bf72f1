"""Any weighted layer as a matrix product: `output = columns @ matrix.T`, group by group.

A convolution multiplies the windows of its input (Chellapilla et al. 2006). A transposed
convolution is the ordinary one of its input spread out by the stride, with the kernel turned
around: an output pixel is then a sum over the input channels and the kernel taps that reach it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["from_matrix", "gather", "groups_of", "to_matrix", "windows"]

_CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


def groups_of(layer: nn.Module, name: str = "weight") -> int:
    """Number of independent products that a layer's weight takes part in."""
    if isinstance(layer, nn.MultiheadAttention) and name == "in_proj_weight":
        return 3  # queries, keys and values, each with inputs of its own
    return layer.groups if isinstance(layer, _CONV) else 1


def to_matrix(weight: Tensor, layer: nn.Module, name: str = "weight") -> Tensor:
    """A weight as (groups, rows, columns): rows are outputs, columns are inputs and taps.

    >>> to_matrix(torch.zeros(6, 2, 4, 4), nn.ConvTranspose2d(6, 4, 4, groups=2)).shape
    torch.Size([2, 2, 48])
    """
    groups = groups_of(layer, name)
    if isinstance(layer, nn.Embedding):  # a one-hot row times the table
        return weight.t().unsqueeze(0)
    if isinstance(layer, _TRANSPOSED):
        taps = weight.flip(_spatial(weight)).flatten(2)  # (in, out / groups, taps)
        split = taps.view(groups, -1, taps.shape[1], taps.shape[2]).transpose(1, 2)
        return split.flatten(2)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_matrix(
    matrix: Tensor, layer: nn.Module, shape: Sequence[int], name: str = "weight"
) -> Tensor:
    """The weight of a shape from its matrix; the reverse of `to_matrix`.

    >>> layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
    >>> matrix = to_matrix(layer.weight, layer)
    >>> torch.equal(from_matrix(matrix, layer, layer.weight.shape), layer.weight)
    True
    """
    if isinstance(layer, nn.Embedding):
        return matrix[0].t()
    if isinstance(layer, _TRANSPOSED):
        groups = groups_of(layer, name)
        split = matrix.view(groups, shape[1], shape[0] // groups, -1).transpose(1, 2)
        weight = split.reshape(tuple(shape))
        return weight.flip(_spatial(weight))
    return matrix.reshape(tuple(shape))


def windows(layer: nn.Module, x: Tensor, size: Sequence[int] = ()) -> Tensor:
    """What each output position of a convolution reads: (N, *output, C, *kernel), a view.

    Args:
        layer: a convolution, transposed or not, of any dimension.
        x: its input (N, C, *spatial); zeros and borders commute with squaring, so that the
            windows of squares are the squares of windows.
        size: spatial size of the output; only a transposed convolution needs it, since its
            `output_padding` may come from the call.

    >>> windows(nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 4, 4, 3, 3, 3])
    """
    if not isinstance(layer, _CONV):
        raise TypeError(f"{type(layer).__name__} is no convolution")
    if isinstance(layer, _TRANSPOSED):
        return _slide(_spread(layer, x, size), layer.kernel_size, None, layer.dilation)
    pads = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, pads, mode=mode) if any(pads) else x
    return _slide(x, layer.kernel_size, layer.stride, layer.dilation)


def gather(view: Tensor, spatial: int, index: Tensor) -> Tensor:
    """Rows (len(index), features) of a window view at flat output positions."""
    where = torch.unravel_index(index, view.shape[: 1 + spatial])
    return view[where].flatten(1)


def _spatial(weight: Tensor) -> list[int]:
    return list(range(2, weight.dim()))


def _spread(layer: nn.modules.conv._ConvTransposeNd, x: Tensor, size: Sequence[int]) -> Tensor:
    """The input with stride - 1 zeros between its values, padded to give `size` outputs."""
    stride = layer.stride
    inner = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *inner)
    spread[(..., *(slice(None, None, step) for step in stride))] = x
    pads: list[int] = []
    for axis in reversed(range(len(inner))):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        left = reach - int(layer.padding[axis])
        pads += [left, size[axis] + reach - left - inner[axis]]  # negative: cropped
    return F.pad(spread, pads)


def _slide(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] | None, dilation: Sequence[int]
) -> Tensor:
    dims = len(kernel)
    for axis in range(dims):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        step = 1 if stride is None else stride[axis]
        x = x.unfold(2 + axis, reach, step)[..., :: dilation[axis]]
    return x.movedim(1, 1 + dims)
