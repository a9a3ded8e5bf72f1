"""Which weights of a module an int8 file stores as whole numbers, and on which grids."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from lightning_compress.conversion.integers import IntegerWeight, StoredWeight, stored_weight
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import Grid, compression_state

__all__ = ["put_on_grids", "weight_grids"]

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
HOOKED = ("_orig", "_v")  # what the older spectral_norm and weight_norm make a weight from
SAME_FACTOR = 1e-5  # of a tensor: what float rounding explains
OFF_GRID = 1e-2  # of a step: what float rounding explains


def weight_grids(module: nn.Module, plain: nn.Module) -> dict[str, Grid]:
    """Grids by the names that parameters have in the plain copy.

    A spectral_norm or weight_norm, of the new form (a parametrization) or the older, scales a
    weight, and so its steps.
    """
    weights = dict(plain.named_parameters(remove_duplicate=False))
    grids: dict[str, Grid] = {}
    for path, grid in compression_state(module).grids.items():
        name = _plain_name(path, weights)
        if name == path:
            grids[path] = grid
            continue
        original = module.get_parameter(path).detach().cpu().float()
        scaled = _scaled(grid, original, weights[name].detach().float())
        if scaled is not None:
            grids[name] = scaled
    return grids


def _plain_name(path: str, known: Container[str]) -> str:
    """What a parameter is called once its norms are folded into it."""
    head, found, tail = path.partition("parametrizations.")
    if found:
        return head + tail.split(".")[0]
    folded = (path.removesuffix(end) for end in HOOKED if path.endswith(end))
    return path if path in known else next((name for name in folded if name in known), path)


def _scaled(grid: Grid, original: Tensor, weight: Tensor) -> AffineGrid | None:
    """The grid of `weight`, a multiple of `original` in each channel.

    Where the channels of a weight_norm share a step before it, they have one each behind it.
    """
    if not isinstance(grid, AffineGrid) or original.shape != weight.shape:
        return None
    axis = grid.axis or 0
    before, after = (part.transpose(0, axis).flatten(1) for part in (original, weight))
    factor = after.abs().amax(1) / before.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    most = factor.max()
    factor = torch.where(factor > 0, factor, most if most > 0 else torch.ones_like(most))
    if grid.axis is None and torch.allclose(factor, factor[0], rtol=SAME_FACTOR, atol=0.0):
        axis, factor = None, factor[:1]
    scale = grid.scale.cpu() * factor
    zero = grid.zero_point.cpu().expand_as(scale)
    return AffineGrid(scale, zero, grid.bits, grid.symmetric, axis)


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
