"""Activation grids in the header: parsed and validated without torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz.decoding import StoredGrid

__all__ = ["DYNAMIC", "SIDES", "LayerGrid", "read_layer_grids"]

SIDES = {"i": "input", "o": "output"}
DYNAMIC = "d"  # 1: the input is rounded over each call's own range


class LayerGrid(NamedTuple):
    """The quantization grid of a layer's input or output: one scale and one zero point."""

    bits: int
    symmetric: int
    zero_point: int
    scale: float


def read_layer_grids(entry: object) -> dict[str, dict[str, LayerGrid | bool]]:
    """By path of a layer, then "input", "output" or "dynamic": what the header's `activations` say.

    Raises:
        CorruptArtifactError: naming the layer, for any other content.
    """
    if not isinstance(entry, dict):
        raise CorruptArtifactError("the header's activations are no object")
    return {path: _pair(path, row) for path, row in entry.items()}


def _pair(path: str, row: object) -> dict[str, LayerGrid | bool]:
    if not isinstance(row, dict) or not set(row) <= {*SIDES, DYNAMIC}:
        raise CorruptArtifactError(f"activations of {path!r}: {str(row)[:80]!r}")
    found: dict[str, LayerGrid | bool] = {
        SIDES[key]: _grid(path, value) for key, value in row.items() if key != DYNAMIC
    }
    if DYNAMIC in row:
        if type(row[DYNAMIC]) is not int or row[DYNAMIC] != 1 or "input" in found:
            raise CorruptArtifactError(f"activations of {path!r}: {str(row)[:80]!r}")
        found["dynamic"] = True
    return found


def _grid(path: str, row: object) -> LayerGrid:
    whole = isinstance(row, list) and len(row) == 4 and all(type(item) is int for item in row)
    if not isinstance(row, list) or not whole or not (0 <= row[2] < 256 and 0 <= row[3] < 1 << 32):
        raise CorruptArtifactError(f"activations of {path!r}: {str(row)[:80]!r} is no grid")
    bits, symmetric, zero, scale = row
    if symmetric not in (0, 1):
        raise CorruptArtifactError(f"activations of {path!r}: symmetric is {symmetric}")
    step = np.array([scale], "<u4").view("<f4").astype(np.float32)
    stored = StoredGrid(step, np.array([zero], np.int32), (bits, symmetric))
    if (fault := stored.fault(())) is not None:
        raise CorruptArtifactError(f"activations of {path!r}: {fault}")
    return LayerGrid(bits, symmetric, zero, float(step[0]))
