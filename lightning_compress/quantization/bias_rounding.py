"""Biases as int8 kernels hold them: int32 multiples of the input's step times the weight's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.grids import AffineGrid, channel_axis
from lightning_compress.modes import bare, own_random_stream
from lightning_compress.quantization.corrections import Dataflow
from lightning_compress.sharding import is_sharded
from lightning_compress.state import activation_grids, known_grid
from lightning_compress.targets import Coverage

__all__ = [
    "bias_change",
    "bias_changes",
    "bias_step",
    "round_bias",
    "round_biases",
    "round_biases_in",
    "stretch",
]

SEVEN_BITS, EIGHT = 63, 8
LARGEST = 2**31 - 1
FLOAT32 = 1e-6  # of a number: what float32 leaves of a rounded one


def stretch(most: int) -> int:
    """Power of 2 that an int8 file multiplies weights with, which leaves them 7 bits at most.

    Args:
        most: the largest magnitude of a weight, in its steps.

    >>> stretch(127), stretch(40), stretch(7)
    (1, 1, 8)
    """
    return 1 << max(0, (SEVEN_BITS // max(1, most)).bit_length() - 1)


def bias_step(layer: nn.Module, grid: AffineGrid, scale: Tensor) -> Tensor | None:
    """Step of a layer's sums, float64, (channels,) or (1,); None where channels share no step.

    Weights and inputs of few bits are stored in the upper bits of a byte (`stretch`), so that the
    sums' steps are as fine as those of 7 and 8 bits.

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
    steps = steps.repeat(groups) if shared else steps  # equal for the channels of each group
    return grid.scale.flatten()[:1].double() / 2 ** (EIGHT - grid.bits) * steps / stretch(most)


def _channels(layer: nn.Module) -> int:
    return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))


@torch.no_grad()
def bias_change(layer: nn.Module, norm: nn.Module | None, step: Tensor) -> Tensor | str:
    """What rounding adds to each output channel, float64, (channels,); or why it cannot be done.

    Where a BatchNorm alone reads the layer, the sum that an int8 file adds is rounded, which is
    `bias - mean + beta * sigma / gamma`.

    Args:
        layer: a linear layer or a convolution.
        norm: the BatchNorm that alone reads it.
        step: as from `bias_step`.

    >>> layer = nn.Linear(1, 1)
    >>> _ = layer.bias.data.fill_(0.75)
    >>> bias_change(layer, None, torch.tensor([0.5]))
    tensor([0.2500], dtype=torch.float64)
    """
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    if bias is None and norm is None:
        return "it has no bias"
    total = torch.zeros(_channels(layer), dtype=torch.float64)
    if bias is not None:
        total = total + bias.detach().cpu().double()
    if norm is not None:
        added = _offset(norm)
        if added is None or len(total) % len(added):
            return "the norm behind it has no running mean, or none for each of its channels"
        total = total + added.repeat_interleave(len(total) // len(added))
    parts = (total / step.cpu()).round()
    if not bool(torch.isfinite(parts).all()) or int(parts.abs().max()) > LARGEST:
        return "its bias is beyond what an int32 holds"
    change = parts * step.cpu() - total
    return torch.where(change.abs() <= FLOAT32 * total.abs(), 0.0, change)


@torch.no_grad()
def round_bias(layer: nn.Module, norm: nn.Module | None, step: Tensor) -> str:
    """Round a layer's bias in place; returns why it could not be done, or an empty text.

    The change of `bias_change` goes into the layer's bias, and where it has none into the running
    mean of the norm behind it.

    Args:
        layer: a linear layer or a convolution.
        norm: the BatchNorm that alone reads it.
        step: as from `bias_step`.

    >>> layer = nn.Linear(1, 1)
    >>> _ = layer.bias.data.fill_(0.7)
    >>> round_bias(layer, None, torch.tensor([0.5])), layer.bias.item()
    ('', 0.5)
    """
    change = bias_change(layer, norm, step)
    if isinstance(change, str):
        return change
    if not _add(layer, norm, change):
        return "it has no bias, and outputs share the channels of the norm behind it"
    return ""


@torch.no_grad()
def _add(layer: nn.Module, norm: nn.Module | None, change: Tensor) -> bool:
    """Add a change to a bias, or to what the norm adds; whether there is a number for each."""
    if isinstance(layer.bias, Tensor):
        layer.bias.copy_((layer.bias.double() + change.to(layer.bias.device)).to(layer.bias))
        return True
    mean = None if norm is None else norm.running_mean
    if not isinstance(mean, Tensor) or len(mean) != len(change):
        return False
    mean.copy_((mean.double() - change.to(mean.device)).to(mean))
    return True


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


def bias_changes(module: nn.Module) -> dict[str, Tensor]:
    """What int8 kernels add to the outputs of layers by rounding their biases, by path.

    Layers whose sum is rounded already, as `quantize_static` leaves it, have none. Of a module that
    cannot be traced, the parts that can be are.

    Returns:
        For each layer with grids of its weight and its input a float32 tensor that is added to
        its output, whose channels lie along axis 1 (of a linear layer, along the last one).
    """
    found: dict[str, Tensor] = {}
    for path, layer, _, change in _changes(module):
        spatial = [1] * (layer.weight.dim() - 2)  # type: ignore[operator]
        found[path] = change.float().reshape(-1, *spatial)
    return found


def _changes(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None, Tensor]]:
    """Each layer whose sum is not rounded, the norm behind it, and its `bias_change`."""
    holders = _holders(module)
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if _has_sums(layer) and not _obstacle(layer, holders)
    }
    for path, norm in _norms_behind(module, layers).items():
        step = _step_of(layers[path])
        change = "" if step is None else bias_change(layers[path], norm, step)
        if isinstance(change, Tensor) and change.any():
            yield path, layers[path], norm, change


def round_biases_in(plain: nn.Module) -> None:
    """Round the biases of a copy in place as `bias_changes` says, where it has numbers for that.

    Outputs that share a channel of a norm have none of their own: a kernel rounds those as it
    reads the file, which one number a channel keeps small.
    """
    for _, layer, norm, change in _changes(plain):
        _add(layer, norm, change)


def _norms_behind(
    module: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[str, nn.Module | None]:
    """The BatchNorm that alone reads each layer, or None; without those nobody can tell of."""
    normed = any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in module.modules())
    if not (layers and normed):
        return dict.fromkeys(layers)
    with own_random_stream(module), bare(module):
        flow = Dataflow.of(module)
    norms = flow.norms | flow.shared_norms
    found = {
        path: module.get_submodule(norms[path]) if path in norms else None
        for path in layers
        if path in flow.next_layer or path in flow.stopped
    }
    for name, child in module.named_children():
        start = f"{name}."
        unseen = {
            path.removeprefix(start): layer
            for path, layer in layers.items()
            if path.startswith(start) and path not in found
        }
        if unseen:
            found |= {start + path: norm for path, norm in _norms_behind(child, unseen).items()}
    return found


def _holders(module: nn.Module) -> Counter[int]:
    """How many layers hold each parameter."""
    return Counter(id(one) for layer in module.modules() for one in layer.parameters(recurse=False))


def _has_sums(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))


def _obstacle(layer: nn.Module, holders: Mapping[int, int]) -> str:
    """Why the step of a layer's sums is not known, or its bias not its own; else empty."""
    if not isinstance(_read_grid(layer), AffineGrid) or not isinstance(
        known_grid(layer, "weight"), AffineGrid
    ):
        return "its weight or its input has no scale"
    if is_sharded(layer.weight):  # type: ignore[arg-type]
        return "its weight is sharded"
    if isinstance(layer.bias, Tensor) and holders[id(layer.bias)] > 1:
        return "it shares its bias with another layer"
    return ""


def _read_grid(layer: nn.Module) -> object:
    grids = activation_grids(layer)
    return None if grids is None else grids.input


def _step_of(layer: nn.Module) -> Tensor | None:
    read, weight = _read_grid(layer), known_grid(layer, "weight")
    assert isinstance(read, AffineGrid)
    assert isinstance(weight, AffineGrid)
    return bias_step(layer, read, weight.scale)


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
    holders, untraced = _holders(module), flow.stopped.get("", "")
    for path, layer in layers.items():
        norm = flow.norms.get(path)
        why = _obstacle(layer, holders) or untraced
        step = None if why else _step_of(layer)
        if step is not None:
            why = round_bias(layer, module.get_submodule(norm) if norm else None, step)
        elif not why:
            why = "groups share the steps of its weight"
        rows.append(Coverage(path, (), not why, why or "in steps of input times weight"))
    return rows
