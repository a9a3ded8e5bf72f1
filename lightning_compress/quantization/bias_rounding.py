"""Biases as int8 kernels hold them: int32 multiples of the input's step times the weight's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_compress.grids import AffineGrid, channel_axis
from lightning_compress.quantization.corrections import Dataflow
from lightning_compress.sharding import is_sharded
from lightning_compress.state import activation_grids, known_grid
from lightning_compress.targets import Coverage

__all__ = ["bias_step", "round_bias", "round_biases"]

SEVEN_BITS, EIGHT = 127, 8
LARGEST = 2**31 - 1


def bias_step(layer: nn.Module, grid: AffineGrid, scale: Tensor) -> Tensor | None:
    """Step of a layer's sums, float64, (channels,) or (1,); None where channels share no step.

    Weights and inputs of few bits are stored in the upper bits of a byte, so that the sums' steps
    are as fine as those of 7 and 8 bits.

    Args:
        layer: a linear layer or a convolution.
        grid: of what it reads.
        scale: of its weight: one number, or one a channel.

    >>> layer = nn.Linear(1, 1)
    >>> _ = layer.weight.data.fill_(0.5)
    >>> grid = AffineGrid(torch.tensor([0.25]), torch.tensor([0]), 8, False, None)
    >>> bias_step(layer, grid, torch.tensor([0.5 / 127])) * 127
    tensor([0.1250], dtype=torch.float64)
    """
    steps = scale.detach().flatten().double()
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = _channels(layer) // max(1, len(steps))
    shared = isinstance(layer, nn.modules.conv._ConvTransposeNd) and groups == layer.groups
    if len(steps) not in (1, _channels(layer)) and not shared:
        return None
    along = [1] * weight.dim()
    along[channel_axis(layer)] = len(steps)
    most = int((weight.detach().double() / steps.reshape(along)).round().abs().max())
    finer = max(1, 2 ** ((SEVEN_BITS // max(1, most)).bit_length() - 1))
    steps = steps.repeat(groups) if shared else steps  # equal for the channels of each group
    return grid.scale.flatten()[:1].double() / 2 ** (EIGHT - grid.bits) * steps / finer


def _channels(layer: nn.Module) -> int:
    return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))


@torch.no_grad()
def round_bias(layer: nn.Module, norm: nn.Module | None, step: Tensor) -> str:
    """Round a layer's bias in place; returns why it could not be done, or an empty text.

    Where a BatchNorm alone reads the layer, the sum that an int8 file adds is rounded, which is
    `bias - mean + beta * sigma / gamma`: the change goes into the layer's bias, and where it has
    none into the norm's running mean.

    Args:
        layer: a linear layer or a convolution.
        norm: the BatchNorm that alone reads it.
        step: as from `bias_step`.

    >>> layer = nn.Linear(1, 1)
    >>> _ = layer.bias.data.fill_(0.7)
    >>> round_bias(layer, None, torch.tensor([0.5])), layer.bias.item()
    ('', 0.5)
    """
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    mean = None if norm is None else norm.running_mean
    if bias is None and not isinstance(mean, Tensor):
        return "it has no bias"
    total = torch.zeros(_channels(layer), dtype=torch.float64)
    if bias is not None:
        total = total + bias.detach().cpu().double()
    if norm is not None:
        added = _offset(norm)
        if added is None or len(total) % len(added):
            return "the norm behind it has no running mean, or none for each of its channels"
        if bias is None and len(added) != len(total):
            return "it has no bias, and outputs share the channels of the norm behind it"
        total = total + added.repeat_interleave(len(total) // len(added))
    parts = (total / step.cpu()).round()
    if not bool(torch.isfinite(parts).all()) or int(parts.abs().max()) > LARGEST:
        return "its bias is beyond what an int32 holds"
    change = parts * step.cpu() - total
    if bias is not None:
        bias.copy_((bias.double() + change.to(bias.device)).to(bias))
    else:
        assert isinstance(mean, Tensor)
        mean.copy_((mean.double() - change.to(mean.device)).to(mean))
    return ""


def _offset(norm: nn.Module) -> Tensor | None:
    """What a norm adds to each channel before it multiplies: `beta * sigma / gamma - mean`."""
    mean, variance = norm.running_mean, norm.running_var
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return None
    offset = -mean.detach().cpu().double()
    if isinstance(norm.bias, Tensor) and isinstance(norm.weight, Tensor):
        sigma = (variance.detach().cpu().double() + float(norm.eps)).sqrt()  # type: ignore[arg-type]
        gamma = norm.weight.detach().cpu().double()
        scaled = norm.bias.detach().cpu().double() * sigma / gamma
        offset = offset + torch.where(gamma == 0, torch.zeros_like(scaled), scaled)
    return offset


def round_biases(module: nn.Module, layers: Mapping[str, nn.Module]) -> list[Coverage]:
    """Round the biases of layers that have grids for their weight and for what they read.

    int8 kernels add biases as int32 in steps of input times weight: rounded here, the module
    computes what they compute, to the last step. Jacob et al. 2018, arXiv:1712.05877, equation 11.

    Args:
        module: with its grids attached.
        layers: by path.

    Returns:
        A row a layer: whether its bias was rounded, or why not.
    """
    flow, rows = Dataflow.of(module), []
    holders = Counter(
        id(one) for layer in module.modules() for one in layer.parameters(recurse=False)
    )
    untraced = flow.stopped.get("", "")
    for path, layer in layers.items():
        grids, weight = activation_grids(layer), known_grid(layer, "weight")
        read = None if grids is None else grids.input
        norm = flow.norms.get(path)
        if not isinstance(read, AffineGrid) or not isinstance(weight, AffineGrid):
            why = "its weight or its input has no scale"
        elif is_sharded(layer.weight):  # type: ignore[arg-type]
            why = "its weight is sharded"
        elif isinstance(layer.bias, Tensor) and holders[id(layer.bias)] > 1:
            why = "it shares its bias with another layer"
        elif untraced:
            why = untraced
        elif (step := bias_step(layer, read, weight.scale)) is None:
            why = "groups share the steps of its weight"
        else:
            why = round_bias(layer, module.get_submodule(norm) if norm else None, step)
        rows.append(Coverage(path, (), not why, why or "in steps of input times weight"))
    return rows
