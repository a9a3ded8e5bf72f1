"""Which weights of a module an int8 file stores as whole numbers, and on which grids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.conversion.integers import IntegerWeight, StoredWeight, stored_weight
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import Grid, compression_state

__all__ = ["put_on_grids", "weight_grids"]

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
OFF_GRID = 1e-2  # of a step: what float rounding explains


def weight_grids(module: nn.Module, plain: nn.Module) -> dict[str, Grid]:
    """Grids by the names that parameters have in the plain copy.

    A parametrization that scales a weight (spectral_norm, weight_norm) scales its steps.
    """
    weights = dict(plain.named_parameters(remove_duplicate=False))
    grids: dict[str, Grid] = {}
    for path, grid in compression_state(module).grids.items():
        head, found, tail = path.partition("parametrizations.")
        if not found:
            grids[path] = grid
            continue
        name = head + tail.split(".")[0]
        original = module.get_parameter(path).detach().cpu().float()
        scaled = _scaled(grid, original, weights[name].detach().float())
        if scaled is not None:
            grids[name] = scaled
    return grids


def _scaled(grid: Grid, original: Tensor, weight: Tensor) -> AffineGrid | None:
    """The grid of `weight`, a multiple of `original` in each of the grid's channels."""
    if not isinstance(grid, AffineGrid) or original.shape != weight.shape:
        return None
    rows = (
        part.reshape(1, -1) if grid.axis is None else part.transpose(0, grid.axis).flatten(1)
        for part in (original, weight)
    )
    before, after = rows
    factor = after.abs().amax(1) / before.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    factor = torch.where(factor > 0, factor, torch.ones_like(factor))
    scale = grid.scale.cpu() * factor
    return AffineGrid(scale, grid.zero_point.cpu(), grid.bits, grid.symmetric, grid.axis)


@torch.no_grad()
def put_on_grids(
    plain: nn.Module, grids: dict[str, Grid], *, everything: bool
) -> tuple[dict[str, StoredWeight], dict[str, str]]:
    """Put a module's weights on their grids in place; (what is stored, why others are not).

    Args:
        plain: a copy with ordinary parameters.
        grids: by parameter name.
        everything: whether weights without a grid get one over their min/max range.
    """
    stored: dict[str, StoredWeight] = {}
    left: dict[str, str] = {}
    done: dict[int, StoredWeight] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        layer = plain.get_submodule(name.rpartition(".")[0])
        if parameter.dim() < 2 or isinstance(layer, NORMS) or not parameter.is_floating_point():
            continue
        grid = _fresh(grids.get(name), parameter)
        if grid is None and not everything and id(parameter) not in done:
            left[name] = "it has no grid, while other weights have: it was left out on purpose"
            continue
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds values that are NaN or infinite")
        found = done.get(id(parameter)) or stored_weight(layer, parameter, grid)
        if name in grids and grid is None:
            found = _restated(found)
        done[id(parameter)] = stored[name] = found
        parameter.copy_(torch.from_numpy(found.values))
    return stored, left


def _fresh(grid: Grid | None, parameter: Tensor) -> Grid | None:
    """The grid, unless the weights have left it since."""
    if grid is None:
        return None
    weight = parameter.float()
    gaps = grid.scale if isinstance(grid, AffineGrid) else grid.centres.diff()
    away = (grid.project(weight) - weight).abs().max() if weight.numel() else 0.0
    return grid if away <= OFF_GRID * float(gaps.max()) else None


def _restated(weight: StoredWeight) -> StoredWeight:
    assert isinstance(weight, IntegerWeight)
    return IntegerWeight(
        weight.symbols, weight.scale, weight.zero, f"{weight.source}: it had left its own grid"
    )
