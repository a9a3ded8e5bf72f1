"""Which layers have their activations on grids, and how a module computes with those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.quantization.fake_quantize import fake_quantize
from lightning_compress.quantization.hooks import hook_input, hook_output
from lightning_compress.state import activation_grids
from lightning_compress.targets import Coverage, Target

__all__ = ["activation_layers", "fake_quantized", "why_float"]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_FUSED = "attention runs inside one fused operation, in float"
_REASONS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.RNNBase, nn.RNNCellBase), "its gates run inside one fused operation, in float"),
    ((nn.Embedding, nn.EmbeddingBag), "its input are indices"),
    ((nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear), _FUSED),
)


def activation_layers(
    module: nn.Module, targets: Sequence[Target]
) -> tuple[dict[str, nn.Module], list[Coverage]]:
    """Layers with a target weight whose input goes onto a grid, by path, and why others do not.

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
        path = _owner(parameter)
        layer = module.get_submodule(path)
        reason = why_float(layer)
        rows[path] = Coverage(path, (), not reason, reason)
        if not reason:
            layers[path] = layer
    return layers, list(rows.values())


def _owner(path: str) -> str:
    """Path of the layer behind a parameter's path."""
    head, found, _ = path.partition("parametrizations.")
    return (head if found else path.rpartition(".")[0]).rstrip(".")


def why_float(layer: nn.Module) -> str:
    """Why a layer's activations go onto no grid; empty for one whose do."""
    for kinds, why in _REASONS:
        if isinstance(layer, kinds):
            return f"weights only, {type(layer).__name__}: {why}"
    if isinstance(layer, _LAYERS):
        return ""
    return f"weights only, {type(layer).__name__}: no linear layer or convolution"


@contextmanager
def fake_quantized(module: nn.Module) -> Iterator[nn.Module]:
    """Let a module compute with the activation grids that its layers remember, for a while.

    The weights lie on their grids already; this makes the forward pass what an integer engine
    computes. A module whose layers remember none computes as ever.

    >>> import torch
    >>> from lightning_compress.quantization.quantizers import grid_of_range
    >>> from lightning_compress.state import ActivationGrids, set_activation_grids
    >>> layer = nn.Linear(1, 1)
    >>> grid = grid_of_range(torch.zeros(1), torch.ones(1), bits=2, symmetric=False)
    >>> set_activation_grids(layer, ActivationGrids(output=grid))
    >>> with fake_quantized(layer) as quantized:
    ...     (3 * quantized(torch.rand(9, 1))).frac().abs().max().item() < 1e-6
    True
    """
    handles: list[RemovableHandle] = []
    for layer in module.modules():
        grids = activation_grids(layer)
        if grids is not None and grids.input is not None:
            handles.append(hook_input(layer, partial(fake_quantize, grid=grids.input)))
        if grids is not None and grids.output is not None:
            handles.append(hook_output(layer, partial(fake_quantize, grid=grids.output)))
    try:
        yield module
    finally:
        for handle in handles:
            handle.remove()
