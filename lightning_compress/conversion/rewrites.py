"""Exact rewrites into a convolution, a depth-to-space step and a crop.

ONNX Runtime has no int8 kernel for ConvTranspose, but fast ones for Conv: they make 16 output
channels at a time, so that a convolution with one to four of them had better make four pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.quantization.enlarging import summed_taps

__all__ = ["InBlocks", "conv_in_blocks", "enlarged_as_conv", "transposed_as_conv"]


@dataclass(frozen=True)
class InBlocks:
    """A convolution that makes blocks of pixels, and what sets them apart.

    Args:
        weight: (out * block^2, in / groups, taps, taps) of the convolution; channel
            `o * block^2 + i * block + j` is the output channel o at offset (i, j), and channel
            `(i * block + j) * out + o` where `offsets_first`.
        padding: zeros around the input, on both ends of (height, width).
        block: rows and columns of a block; depth-to-space by it.
        crop: rows and columns to drop after it: (top, bottom, left, right).
        offsets_first: depth-to-space as "DCR", whose pixels are whole runs of channels where
            channels stand last; else "CRD", as `torch.pixel_shuffle`.
        stride: of the convolution.
    """

    weight: Tensor
    padding: tuple[int, int]
    block: int
    crop: tuple[int, int, int, int]
    offsets_first: bool = False
    stride: int = 1

    def spread(self, values: Tensor) -> Tensor:
        """A number of each output channel, (out,), for the convolution's channels."""
        times = self.block**2
        return values.repeat(times) if self.offsets_first else values.repeat_interleave(times)

    def __call__(self, x: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """What the replaced layer gives, (N, out, H, W)."""
        spread = None if bias is None else self.spread(bias)
        y = functional.conv2d(x, self.weight, spread, self.stride, self.padding, groups=groups)
        if self.offsets_first:
            y = y.unflatten(1, (self.block**2, -1)).transpose(1, 2).flatten(1, 2)
        y = functional.pixel_shuffle(y, self.block)
        top, bottom, left, right = self.crop
        return y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right]


def transposed_as_conv(
    weight: Tensor,
    *,
    stride: int,
    padding: tuple[int, int],
    output_padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> InBlocks:
    """Rewrite a transposed convolution of dilation 1 and equal strides, exactly.

    With `k = stride * j + r`, output position `stride * t + r` of the uncropped result is
    `sum_j x[t - j] * weight[stride * j + r]`: one ordinary convolution for each offset r
    (Shi et al. 2016, arXiv:1609.07009). A kernel that the stride does not divide is filled up
    with zeros, which is exact too and costs their multiplications. Without groups the offsets
    come first among the channels.

    Args:
        weight: (in, out / groups, kh, kw), of any dtype.
        stride: of both axes, 1 or more.
        padding: of (height, width), as `ConvTranspose2d` has it.
        output_padding: of (height, width), less than the stride.
        groups: of the convolution.

    >>> import torch
    >>> x, weight = torch.rand(2, 3, 5, 5), torch.rand(3, 4, 4, 4)
    >>> rewritten = transposed_as_conv(weight, stride=2, padding=(1, 1))
    >>> expected = functional.conv_transpose2d(x, weight, stride=2, padding=1)
    >>> torch.allclose(rewritten(x), expected, atol=1e-4)
    True
    """
    taps, crops, fills = [], [], []
    for kernel, pad, extra in zip(weight.shape[2:], padding, output_padding, strict=True):
        count = -(-kernel // stride)
        if extra > pad + count * stride - kernel:  # asks for rows beyond the kernel's reach
            count += 1
        taps.append(count)
        fills.append(count * stride - kernel)
        crops.append((pad, pad + count * stride - kernel - extra))
    full = functional.pad(weight, (0, fills[1], 0, fills[0]))
    split = full.reshape(
        groups, weight.shape[0] // groups, weight.shape[1], taps[0], stride, taps[1], stride
    )
    # (group, in, out, j, r, j', r') -> (group, out, r, r', in, j, j'), taps running backwards
    order = (0, 4, 6, 2, 1, 3, 5) if groups == 1 else (0, 2, 4, 6, 1, 3, 5)
    ordered = split.permute(order).flip((5, 6))
    conv = ordered.reshape(-1, weight.shape[0] // groups, taps[0], taps[1]).contiguous()
    padding = (taps[0] - 1, taps[1] - 1)
    return InBlocks(conv, padding, stride, (*crops[0], *crops[1]), groups == 1)


def conv_in_blocks(weight: Tensor, *, padding: tuple[int, int]) -> InBlocks:
    """Rewrite a convolution of stride 1 so that it makes 2 x 2 pixels at a time, exactly.

    The kernel stands at four places of a larger one, which is 0 elsewhere. The output must have an
    even number of rows and columns.

    Args:
        weight: (out, in, kh, kw), of any dtype.
        padding: of (height, width), as `Conv2d` has it.

    >>> import torch
    >>> x, weight = torch.rand(2, 3, 6, 8), torch.rand(1, 3, 3, 3)
    >>> rewritten = conv_in_blocks(weight, padding=(1, 1))
    >>> torch.allclose(rewritten(x), functional.conv2d(x, weight, padding=1), atol=1e-5)
    True
    """
    places = [functional.pad(weight, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]
    return InBlocks(torch.cat(places), padding, 2, (0, 0, 0, 0), offsets_first=True, stride=2)


def enlarged_as_conv(
    weight: Tensor, *, factor: int, padding: tuple[int, int], groups: int = 1
) -> InBlocks:
    """Rewrite nearest-neighbour upsampling and a convolution of stride 1, exactly.

    The two are a transposed convolution whose kernel holds sums of weights; a 3 x 3 kernel behind
    a factor of 2 then has 4 taps a pixel in place of 9.

    Args:
        weight: (out, in / groups, kh, kw), of any dtype.
        factor: of rows and columns, 2 or more.
        padding: of (height, width), as `Conv2d` has it, less than the kernel.
        groups: of the convolution.

    >>> import torch
    >>> x, weight = torch.rand(2, 3, 6, 8), torch.rand(4, 3, 3, 3)
    >>> rewritten = enlarged_as_conv(weight, factor=2, padding=(1, 1))
    >>> large = functional.interpolate(x, scale_factor=2)
    >>> torch.allclose(rewritten(x), functional.conv2d(large, weight, padding=1), atol=1e-4)
    True
    """
    full = summed_taps(weight.flip((2, 3)), factor)
    split = full.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (in, out / groups, ...)
    cropped = tuple(size - 1 - pad for size, pad in zip(weight.shape[2:], padding, strict=True))
    return transposed_as_conv(
        split.contiguous(), stride=factor, padding=(cropped[0], cropped[1]), groups=groups
    )
