"""Fake quantization of activations: values of the grid in floating point, straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compress.quantization.quantizers import AffineGrid

__all__ = ["clipped_fake_quantize", "fake_quantize"]


class _FakeQuantize(torch.autograd.Function):
    """As `torch.fake_quantize_per_tensor_affine`, which takes several times as long on a CPU.

    One scalar loop there is five vectorized passes here, and a clamp's backward pass one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, least: int, most: int) -> Tensor:
        ctx.save_for_backward(x)
        # What rounds into the range counts as inside.
        ctx.bounds = (least - 0.5) * scale, (most + 0.5) * scale
        steps = torch.mul(x.float(), 1 / scale).round_().clamp_(least, most)
        return steps.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        passed = torch.ops.aten.hardtanh_backward(gradients[0], x, *ctx.bounds)
        return passed, None, None, None


def _bounds(grid: AffineGrid) -> tuple[float, int, int]:
    zero = int(grid.zero_point)
    return float(grid.scale), grid.qmin - zero, grid.qmax - zero


def fake_quantize(x: Tensor, grid: AffineGrid) -> Tensor:
    """Nearest grid points of an activation; the gradient passes where the grid does not clip.

    Args:
        x: of any shape and floating dtype.
        grid: one scale for the whole tensor.

    >>> grid = AffineGrid(torch.tensor([0.5]), torch.tensor([0]), 2, False, None)
    >>> fake_quantize(torch.tensor([-1.0, 0.6, 9.0]), grid)
    tensor([0.0000, 0.5000, 1.5000])
    """
    return _FakeQuantize.apply(x, *_bounds(grid))  # type: ignore[no-any-return]


class _ClippedFakeQuantize(torch.autograd.Function):
    """PACT: the gradient of what is clipped goes to the clip value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, clip)
        levels = 2**bits - 1
        scale = float(clip) / levels
        return torch.mul(x.float(), 1 / scale).round_().clamp_(0, levels).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, clip = ctx.saved_tensors
        over = x >= clip.to(x.dtype)
        to_clip = gradients[0].float().masked_fill(~over, 0.0).sum().reshape(clip.shape)
        inside = ~over & (x >= 0)
        return gradients[0] * inside, to_clip, None


def clipped_fake_quantize(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Fake quantization over [0, clip] with a learned clip (PACT, arXiv:1805.06085, equation 3).

    Args:
        x: an activation that is never below 0.
        clip: of shape (1,); it gets the sum of the gradients of what is at or over it.
        bits: 2 to 8.

    >>> clip = torch.tensor([1.5], requires_grad=True)
    >>> y = clipped_fake_quantize(torch.tensor([0.6, 9.0]), clip, 2)
    >>> y.sum().backward()
    >>> y.tolist(), clip.grad
    ([0.5, 1.5], tensor([1.]))
    """
    return _ClippedFakeQuantize.apply(x, clip, bits)  # type: ignore[no-any-return]
