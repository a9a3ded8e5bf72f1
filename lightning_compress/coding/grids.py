"""Quantization grids in the file: scales, zero points, and symbols that fit them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.coding.bits import ByteReader
from lightning_compress.coding.records import TensorRecord
from lightning_compress.coding.values import (
    from_patterns,
    pack_patterns,
    patterns,
    unpack_patterns,
)
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.quantization.quantizers import MAX_BITS, MIN_BITS, AffineGrid

__all__ = ["MAX_SYMBOLS", "from_symbols", "grid_symbols", "pack_grid", "same_grid", "unpack_grid"]

MAX_SYMBOLS = 2 * (2**MAX_BITS - 1) + 1  # from -255 to 255: every zero point that 8 bits allow


def grid_symbols(tensor: Tensor, grid: AffineGrid) -> NDArray[np.uint16] | None:
    """(N,) symbols 0, 1, 2, 3, 4 ... for -0-, -1, +1, -2, +2 ... steps from zero.

    Returns:
        None where the grid cannot be stored or does not give back the tensor bit for bit.
    """
    if not tensor.is_floating_point() or _grid_fault(grid, tuple(tensor.shape)):
        return None
    steps = grid.quantize(tensor)
    back = grid.dequantize(steps, tensor.dtype)
    if not np.array_equal(patterns(back), patterns(tensor)):
        return None
    whole = steps.cpu().reshape(-1).numpy()
    return (2 * np.abs(whole) - (whole < 0)).astype(np.uint16)


def from_symbols(symbols: NDArray[np.uint16], grid: AffineGrid, record: TensorRecord) -> Tensor:
    """The steps from zero, int32 in the record's shape, that `grid_symbols` turned into symbols.

    Raises:
        CorruptArtifactError: for a symbol outside the grid.
    """
    half = (symbols.astype(np.int32) + 1) >> 1
    steps = torch.from_numpy(np.where(symbols & 1, -half, half)).reshape(record.shape)
    along = [1] * len(record.shape)
    if grid.axis is not None:
        along[grid.axis] = -1
    zero = grid.zero_point.reshape(along)
    if not ((steps >= grid.qmin - zero) & (steps <= grid.qmax - zero)).all():
        raise CorruptArtifactError(f"a symbol outside its grid of {grid.bits} bits")
    return steps


def pack_grid(grid: AffineGrid) -> tuple[str, bytes]:
    """The packing of the scales; zero points as bytes unless symmetric, then the scales."""
    packing, scales = pack_patterns(patterns(grid.scale))
    zeros = b"" if grid.symmetric else grid.zero_point.cpu().numpy().astype(np.uint8).tobytes()
    return packing, zeros + scales


def unpack_grid(data: bytes, record: TensorRecord) -> AffineGrid:
    """The grid that `pack_grid` wrote.

    Raises:
        CorruptArtifactError: for scales that are not finite and positive, or zero points off the
            grid.
    """
    bits, symmetric = record.grid[0], bool(record.grid[1])
    reader, count = ByteReader(data), record.scales
    zeros = b"" if symmetric else reader.take(count, "the zero points of a grid")
    scales = unpack_patterns(record.packing, reader.rest(), count, 4)
    scale = from_patterns(scales, torch.float32, (count,))
    zero_point = torch.zeros(count, dtype=torch.int32)
    if not symmetric:
        zero_point = torch.from_numpy(np.frombuffer(zeros, np.uint8).astype(np.int32))
    grid = AffineGrid(scale, zero_point, bits, symmetric, record.axis)
    if (fault := _grid_fault(grid, record.shape)) is not None:
        raise CorruptArtifactError(fault)
    return grid


def same_grid(one: AffineGrid | None, other: AffineGrid | None) -> bool:
    """Whether two grids hold the same values."""
    if one is None or other is None:
        return one is other
    traits = (one.bits, one.symmetric, one.axis) == (other.bits, other.symmetric, other.axis)
    return traits and pack_grid(one) == pack_grid(other)


def _grid_fault(grid: AffineGrid, shape: tuple[int, ...]) -> str | None:
    """Why a grid cannot stand in the file."""
    scale, zero = grid.scale, grid.zero_point
    if not MIN_BITS <= grid.bits <= MAX_BITS:
        return f"a grid of {grid.bits} bits"
    if grid.axis is not None and not 0 <= grid.axis < len(shape):
        return f"a grid along axis {grid.axis} of {len(shape)}"
    count = 1 if grid.axis is None else shape[grid.axis]
    if scale.dtype != torch.float32 or tuple(scale.shape) != (count,) or zero.shape != scale.shape:
        return f"a grid of {scale.dtype} {tuple(scale.shape)} where {count} scales belong"
    if not (torch.isfinite(scale) & (scale > 0)).all():
        return "a grid with a scale that is not finite and above 0"
    low, high = (0, 0) if grid.symmetric else (grid.qmin, grid.qmax)
    if not ((zero >= low) & (zero <= high)).all():
        return "a grid with a zero point outside it"
    return None
