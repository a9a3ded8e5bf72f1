"""Quantization grids in the file: scales, zero points or centres, and symbols that fit them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.coding.bits import ByteReader
from lightning_compress.coding.records import MAX_CODEBOOK, TensorRecord
from lightning_compress.coding.values import (
    from_patterns,
    pack_patterns,
    patterns,
    unpack_patterns,
)
from lightning_compress.errors import CorruptArtifactError
from lightning_compress.quantization.codebooks import CodebookGrid
from lightning_compress.quantization.quantizers import MAX_BITS, MIN_BITS, AffineGrid
from lightning_compress.state import Grid

__all__ = [
    "MAX_SYMBOLS", "from_symbols", "grid_fault", "grid_symbols", "grid_traits", "pack_grid",
    "same_grid", "unpack_grid",
]  # fmt: skip

# From -255 to 255: every zero point that 8 bits allow, and every place of 0 in a codebook.
MAX_SYMBOLS = 2 * (2**MAX_BITS - 1) + 1


def grid_symbols(tensor: Tensor, grid: Grid) -> NDArray[np.uint16] | None:
    """(N,) symbols 0, 1, 2, 3, 4 ... for -0-, -1, +1, -2, +2 ... steps from zero.

    Returns:
        None where the grid cannot be stored or does not give back the tensor bit for bit.
    """
    if not tensor.is_floating_point() or grid_fault(grid, tuple(tensor.shape)):
        return None
    steps = grid.quantize(tensor)
    back = grid.dequantize(steps, tensor.dtype)
    if not np.array_equal(patterns(back), patterns(tensor)):
        return None
    whole = steps.cpu().reshape(-1).numpy()
    return (2 * np.abs(whole) - (whole < 0)).astype(np.uint16)


def from_symbols(symbols: NDArray[np.uint16], grid: Grid, record: TensorRecord) -> Tensor:
    """The steps from zero, int32 in the record's shape, that `grid_symbols` turned into symbols.

    Raises:
        CorruptArtifactError: for a symbol outside the grid.
    """
    half = (symbols.astype(np.int32) + 1) >> 1
    steps = torch.from_numpy(np.where(symbols & 1, -half, half)).reshape(record.shape)
    low, high = _range(grid, len(record.shape))
    if not ((steps >= low) & (steps <= high)).all():
        raise CorruptArtifactError(f"a symbol outside its grid of {grid.bits} bits")
    return steps


def _range(grid: Grid, dims: int) -> tuple[Tensor, Tensor]:
    """The lowest and highest step, along the grid's axis."""
    if isinstance(grid, CodebookGrid):
        low = torch.tensor(-grid.zero_index)
        return low, low + grid.centres.numel() - 1
    along = [1] * dims
    if grid.axis is not None:
        along[grid.axis] = -1
    zero = grid.zero_point.reshape(along)
    return grid.qmin - zero, grid.qmax - zero


def grid_traits(grid: Grid) -> tuple[int, ...]:
    """What the header says of a grid: (centres,), (bits, symmetric) or (bits, symmetric, axis)."""
    if isinstance(grid, CodebookGrid):
        return (grid.centres.numel(),)
    return grid.bits, int(grid.symmetric), *(() if grid.axis is None else (grid.axis,))


def pack_grid(grid: Grid) -> tuple[str, bytes]:
    """The packing of the floats; zero points as bytes if there are any, then scales or centres."""
    if isinstance(grid, CodebookGrid):
        return pack_patterns(patterns(grid.centres))
    packing, scales = pack_patterns(patterns(grid.scale))
    zeros = b"" if grid.symmetric else grid.zero_point.cpu().numpy().astype(np.uint8).tobytes()
    return packing, zeros + scales


def unpack_grid(data: bytes, record: TensorRecord) -> Grid:
    """The grid that `pack_grid` wrote.

    Raises:
        CorruptArtifactError: for scales that are not finite and positive, centres that do not rise
            or lack 0, or zero points off the grid.
    """
    reader, count = ByteReader(data), record.grid_values
    signed = len(record.grid) == 1 or bool(record.grid[1])
    zeros = b"" if signed else reader.take(count, "the zero points of a grid")
    bits = unpack_patterns(record.packing, reader.rest(), count, 4)
    floats = from_patterns(bits, torch.float32, (count,))
    if len(record.grid) == 1:
        grid: Grid = CodebookGrid(floats)
    else:
        zero_point = torch.zeros(count, dtype=torch.int32)
        if not signed:
            zero_point = torch.from_numpy(np.frombuffer(zeros, np.uint8).astype(np.int32))
        grid = AffineGrid(floats, zero_point, record.grid[0], signed, record.axis)
    if (fault := grid_fault(grid, record.shape)) is not None:
        raise CorruptArtifactError(fault)
    return grid


def same_grid(one: Grid | None, other: Grid | None) -> bool:
    """Whether two grids hold the same values."""
    if one is None or other is None:
        return one is other
    return grid_traits(one) == grid_traits(other) and pack_grid(one) == pack_grid(other)


def grid_fault(grid: Grid, shape: tuple[int, ...]) -> str | None:
    """Why a grid of a tensor of this shape cannot stand in the file; None: it can."""
    if isinstance(grid, CodebookGrid):
        return _codebook_fault(grid.centres)
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


def _codebook_fault(centres: Tensor) -> str | None:
    if centres.dtype != torch.float32 or centres.dim() != 1:
        return f"centres of {centres.dtype} {tuple(centres.shape)}"
    if not 2 <= len(centres) <= MAX_CODEBOOK:
        return f"a codebook of {len(centres)} centres"
    if not (torch.isfinite(centres).all() and (centres[1:] > centres[:-1]).all()):
        return "centres that are not finite or do not rise"
    if not (patterns(centres) == 0).any():
        return "centres without 0"
    return None
