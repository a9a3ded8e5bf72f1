"""The grids of layers' inputs and outputs in the header: `{path: {"i": [...], "o": [...]}}`.

A grid is `[bits, symmetric, zero point, scale]`, the scale as the bits of its float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lightning_compress.coding.grids import grid_fault
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import ActivationGrids

__all__ = ["read_activations", "write_activations"]

_SIDES = {"i": "input", "o": "output"}


def write_activations(grids: Mapping[str, ActivationGrids]) -> dict[str, Any]:
    """The header's entry.

    Raises:
        ValueError: naming the layer, for a grid that is not one finite scale a tensor.
    """
    return {
        path: {
            key: _row(path, grid)
            for key, side in _SIDES.items()
            if (grid := getattr(pair, side)) is not None
        }
        for path, pair in grids.items()
    }


def _row(path: str, grid: AffineGrid) -> list[int]:
    why = "an axis" if grid.axis is not None else grid_fault(grid, ())
    if why is not None:
        raise ValueError(f"the activation grid of {path!r} has {why}: the format holds one scale")
    scale = grid.scale.detach().cpu().numpy().astype("<f4").view("<u4")
    return [grid.bits, int(grid.symmetric), int(grid.zero_point), int(scale[0])]


def read_activations(entry: object) -> dict[str, ActivationGrids]:
    """What `write_activations` wrote.

    Raises:
        CorruptArtifactError: naming the layer, when it is anything else.
    """
    if not isinstance(entry, dict):
        raise CorruptArtifactError("the header's activations are no object")
    return {path: _pair(path, row) for path, row in entry.items()}


def _pair(path: str, row: object) -> ActivationGrids:
    if not isinstance(row, dict) or not set(row) <= set(_SIDES):
        raise CorruptArtifactError(f"activations of {path!r}: {str(row)[:80]!r}")
    return ActivationGrids(**{_SIDES[key]: _grid(path, value) for key, value in row.items()})


def _grid(path: str, row: object) -> AffineGrid:
    whole = isinstance(row, list) and len(row) == 4 and all(type(item) is int for item in row)
    if not isinstance(row, list) or not whole or not (0 <= row[2] < 256 and 0 <= row[3] < 1 << 32):
        raise CorruptArtifactError(f"activations of {path!r}: {str(row)[:80]!r} is no grid")
    bits, symmetric, zero, scale = row
    if symmetric not in (0, 1):
        raise CorruptArtifactError(f"activations of {path!r}: symmetric is {symmetric}")
    step = torch.from_numpy(np.array([scale], "<u4").view("<f4").astype(np.float32))
    grid = AffineGrid(step, torch.tensor([zero], dtype=torch.int32), bits, bool(symmetric), None)
    if (fault := grid_fault(grid, ())) is not None:
        raise CorruptArtifactError(f"activations of {path!r}: {fault}")
    return grid
