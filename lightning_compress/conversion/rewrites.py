"""Exact rewrites: a transposed convolution as a convolution, a depth-to-space step and a crop.

ONNX Runtime has no int8 kernel for ConvTranspose, but fast ones for Conv.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

__all__ = ["TransposedAsConv", "transposed_as_conv"]


@dataclass(frozen=True)
class TransposedAsConv:
    """What replaces a transposed convolution of two spatial axes.

    Args:
        weight: (out * stride^2, in / groups, taps, taps) of the convolution; channel
            `o * stride^2 + i * stride + j` is the output channel o at offset (i, j).
        padding: zeros around the input, on both ends of (height, width).
        block: the stride; depth-to-space by it ("CRD", as `torch.pixel_shuffle`).
        crop: rows and columns to drop after it: (top, bottom, left, right).
    """

    weight: Tensor
    padding: tuple[int, int]
    block: int
    crop: tuple[int, int, int, int]

    def __call__(self, x: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """The transposed convolution's output, (N, out, H, W)."""
        spread = None if bias is None else bias.repeat_interleave(self.block**2)
        y = functional.conv2d(x, self.weight, spread, padding=self.padding, groups=groups)
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
) -> TransposedAsConv:
    """Rewrite a transposed convolution of dilation 1 and equal strides, exactly.

    With `k = stride * j + r`, output position `stride * t + r` of the uncropped result is
    `sum_j x[t - j] * weight[stride * j + r]`: one ordinary convolution for each offset r
    (Shi et al. 2016, arXiv:1609.07009). A kernel that the stride does not divide is filled up
    with zeros, which is exact too and costs their multiplications.

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
    ordered = split.permute(0, 2, 4, 6, 1, 3, 5).flip((5, 6))
    conv = ordered.reshape(-1, weight.shape[0] // groups, taps[0], taps[1]).contiguous()
    return TransposedAsConv(conv, (taps[0] - 1, taps[1] - 1), stride, (*crops[0], *crops[1]))
