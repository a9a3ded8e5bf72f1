"""Fake quantization of activations with a straight-through gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.grids import AffineGrid
from lightning_compress.hooks import hook_input, hook_output
from lightning_compress.quantization.bias_rounding import bias_changes
from lightning_compress.quantization.learned_step import double_of
from lightning_compress.state import activation_grids, rounds_dynamically
from lightning_compress.targets import Coverage, CoverageTable, Target, split_path

__all__ = [
    "activation_layers",
    "batch_norms",
    "clipped_fake_quantize",
    "dynamic_fake_quantize",
    "fake_quantize",
    "fake_quantize_by",
    "fake_quantized",
    "why_float",
]
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_FUSED = "attention runs inside one fused operation, in float"
_REASONS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.RNNBase, nn.RNNCellBase), "its gates run inside one fused operation, in float"),
    ((nn.Embedding, nn.EmbeddingBag), "its input are indices"),
    ((nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear), _FUSED),
)


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


class _FakeQuantizeThere(torch.autograd.Function):
    """The same bit for bit where numbers of Python would wait for another device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, least: Tensor, most: Tensor) -> Tensor:
        wide = scale.to(double_of(scale))
        ctx.save_for_backward(
            x, ((least - 0.5) * wide).to(x.dtype), ((most + 0.5) * wide).to(x.dtype)
        )
        steps = torch.round(x.float() * (1 / wide).to(torch.float32))
        steps = steps.clamp(least.to(steps.dtype), most.to(steps.dtype))
        return (steps * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, low, high = ctx.saved_tensors
        return gradients[0].masked_fill((x <= low) | (x >= high), 0.0), None, None, None


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
    if x.device.type != "cpu":
        zero = grid.zero_point.to(x.device)
        least, most = (bound - zero for bound in (grid.qmin, grid.qmax))
        return _FakeQuantizeThere.apply(x, grid.scale.to(x.device), least, most)  # type: ignore[no-any-return]
    return _FakeQuantize.apply(x, *_bounds(grid))  # type: ignore[no-any-return]


def fake_quantize_by(x: Tensor, scale: float, least: int, most: int) -> Tensor:
    """The same on a CPU, by the numbers of `numbers_of_range`."""
    return _FakeQuantize.apply(x, scale, least, most)  # type: ignore[no-any-return]


class _ClippedFakeQuantize(torch.autograd.Function):
    """PACT: clipped values pass their gradient to the clip value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, clip)
        levels = 2**bits - 1
        if x.device.type != "cpu":
            wide = clip.to(double_of(clip)) / levels
            steps = torch.round(x.float() * (1 / wide).to(torch.float32)).clamp(0, levels)
            return (steps * wide.to(torch.float32)).to(x.dtype)
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


def dynamic_fake_quantize(x: Tensor) -> Tensor:
    """Values of 8 bits over the range of x and 0, as ONNX's DynamicQuantizeLinear has them.

    >>> dynamic_fake_quantize(torch.tensor([0.0, 0.3, 2.55]))
    tensor([0.0000, 0.3000, 2.5500])
    """
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    if not scale > 0:
        return x
    zero = (-low / scale).round().clamp(0, 255)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


def activation_layers(
    module: nn.Module, targets: Sequence[Target]
) -> tuple[dict[str, nn.Module], CoverageTable]:
    """Layers with a target weight whose input is quantized, by path, and why others are skipped.

    All layers that hold a tied weight are among them: each reads something else.

    >>> from lightning_compress.targets import select
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2))
    >>> layers, coverage = activation_layers(net, select(net).targets)
    >>> list(layers), coverage[1].reason
    (['0'], 'weights only, GRU: its gates run inside one fused operation, in float')
    """
    layers: dict[str, nn.Module] = {}
    rows: dict[str, Coverage] = {}
    for parameter in (path for target in targets for path in (target.path, *target.tied)):
        path = split_path(parameter)[0]
        layer = module.get_submodule(path)
        reason = why_float(layer)
        rows[path] = Coverage(path, (), not reason, reason)
        if not reason:
            layers[path] = layer
    return layers, CoverageTable(rows.values())


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm layers by path: an int8 file folds one into the product that it follows."""
    kind = nn.modules.batchnorm._BatchNorm
    return {path: one for path, one in module.named_modules() if isinstance(one, kind)}


def why_float(layer: nn.Module) -> str:
    """Why a layer's activations are not quantized; empty for one whose are."""
    for kinds, why in _REASONS:
        if isinstance(layer, kinds):
            return f"weights only, {type(layer).__name__}: {why}"
    if isinstance(layer, _LAYERS):
        return ""
    return f"weights only, {type(layer).__name__}: no linear layer or convolution"


@contextmanager
def fake_quantized(module: nn.Module) -> Iterator[nn.Module]:
    """Context in which a module computes with the activation grids attached to its layers.

    The weights lie on their grids already; this makes the forward pass what an integer engine
    computes, whose biases are integers too: multiples of the input's step times the weight's
    (Jacob et al. 2018, arXiv:1712.05877, equation 11). A module without attached grids computes as
    before.

    >>> import torch
    >>> from lightning_compress.grids import grid_of_range
    >>> from lightning_compress.state import ActivationGrids, set_activation_grids
    >>> layer = nn.Linear(1, 1)
    >>> grid = grid_of_range(torch.zeros(1), torch.ones(1), bits=2, symmetric=False)
    >>> set_activation_grids(layer, ActivationGrids(output=grid))
    >>> with fake_quantized(layer) as quantized:
    ...     (3 * quantized(torch.rand(9, 1))).frac().abs().max().item() < 1e-6
    True
    """
    handles: list[RemovableHandle] = []
    changes = bias_changes(module)
    for path, layer in module.named_modules():
        grids = activation_grids(layer)
        if rounds_dynamically(layer):
            handles.append(hook_input(layer, dynamic_fake_quantize))
        if grids is not None and grids.input is not None:
            handles.append(hook_input(layer, partial(fake_quantize, grid=grids.input)))
        if path in changes:
            handles.append(hook_output(layer, partial(_shifted, change=changes[path])))
        if grids is not None and grids.output is not None:
            handles.append(hook_output(layer, partial(fake_quantize, grid=grids.output)))
    try:
        yield module
    finally:
        for handle in handles:
            handle.remove()


def _shifted(output: Tensor, change: Tensor) -> Tensor:
    return output + change.to(output)
