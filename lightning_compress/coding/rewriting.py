"""Other tensors for the same function: BatchNorms without statistics, hidden units in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_compress.coding.chains import Chain, chains
from lightning_compress.coding.contents import Contents, shared_memory, stored_name
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import Grid

__all__ = ["batchnorm_folded", "reordered"]


def batchnorm_folded(module: nn.Module, contents: Contents) -> Contents:
    """Contents in which each BatchNorm is one scale and one shift, its statistics 0 and 1.

    `y = (x - mean) / sqrt(var + eps) * weight + bias` is `scale * x + shift`. A bias right before
    it goes into the shift. BatchNorms without weights, or with weights on grids, stay as they are.
    """
    tensors = dict(contents.tensors)
    twice = _shared(tensors)
    before = {chain.norms[0]: chain.first for chain in chains(module) if chain.adjacent}
    for path, layer in module.named_modules():
        names = {key: _name(path, key) for key in ("weight", "bias", "running_mean", "running_var")}
        own = set(names.values())
        if not isinstance(layer, _BatchNorm) or not own <= set(tensors):
            continue
        if own & set(contents.grids) or own & twice:
            continue
        bias = _name(before[path], "bias") if path in before else ""
        tensors |= _folded(names, tensors, layer.eps, "" if bias in twice else bias)
        if (count := _name(path, "num_batches_tracked")) in tensors:
            tensors[count] = torch.zeros_like(tensors[count])
    return replace(contents, tensors=tensors)


def _folded(
    names: dict[str, str], tensors: dict[str, Tensor], eps: float, bias: str
) -> dict[str, Tensor]:
    weight, shift, mean, var = (tensors[name].detach().double() for name in names.values())
    scale = weight / torch.sqrt(var + eps)
    found = {}
    if bias in tensors:
        mean = mean - tensors[bias].detach().double()
        found[bias] = torch.zeros_like(tensors[bias])
    new = {
        "weight": scale * (1 + eps) ** 0.5,
        "bias": shift - mean * scale,
        "running_mean": torch.zeros_like(mean),
        "running_var": torch.ones_like(var),
    }
    return found | {names[key]: value.to(tensors[names[key]].dtype) for key, value in new.items()}


def reordered(module: nn.Module, contents: Contents) -> Contents:
    """Contents in which the channels between two layers are sorted, the densest first."""
    tensors, grids = dict(contents.tensors), dict(contents.grids)
    twice = _shared(tensors)
    for chain in chains(module):
        axes = _axes(module, chain)
        if chain.last is None or not axes or not set(axes) <= set(tensors) or set(axes) & twice:
            continue
        order = torch.argsort(_density(tensors, axes), descending=True, stable=True)
        for name, axis in axes.items():
            tensors[name] = (
                tensors[name].detach().index_select(axis, order.to(tensors[name].device))
            )
            if name in grids:
                grids[name] = _sorted_grid(grids[name], axis, order)
    return replace(contents, tensors=tensors, grids=grids)


def _axes(module: nn.Module, chain: Chain) -> dict[str, int]:
    """By stored name: the axis of the channels; nothing where some part has no plain weight."""
    first, last = module.get_submodule(chain.first), module.get_submodule(chain.last or "")
    axes = {_name(chain.first, "weight"): int(isinstance(first, _ConvTransposeNd))}
    axes[_name(chain.last or "", "weight")] = 1 - int(isinstance(last, _ConvTransposeNd))
    vectors = [(chain.first, key) for key, _ in first.named_parameters() if key == "bias"]
    for path in chain.norms:
        norm = module.get_submodule(path)
        vectors += [(path, key) for key, value in norm.state_dict().items() if value.dim() == 1]
    return axes | {_name(path, key): 0 for path, key in vectors}


def _density(tensors: dict[str, Tensor], axes: dict[str, int]) -> Tensor:
    weights = [(tensors[name].detach(), axis) for name, axis in axes.items()]
    counts = [
        (weight != 0).transpose(0, axis).flatten(1).sum(1).cpu()
        for weight, axis in weights
        if weight.dim() > 1
    ]
    return torch.stack(counts).sum(0)


def _sorted_grid(grid: Grid, axis: int, order: Tensor) -> Grid:
    if not isinstance(grid, AffineGrid) or grid.axis != axis:
        return grid
    order = order.to(grid.scale.device)
    return replace(grid, scale=grid.scale[order], zero_point=grid.zero_point[order])


def _name(path: str, key: str) -> str:
    return stored_name(f"{path}.{key}" if path else key)


def _shared(tensors: dict[str, Tensor]) -> set[str]:
    pairs: Iterator[tuple[str, str]] = iter(shared_memory(tensors).items())
    return {name for pair in pairs for name in pair}
