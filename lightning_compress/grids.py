"""Quantization grids: scale and zero point, or a codebook, and projection onto them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "MOST_STEPS",
    "AffineGrid",
    "CodebookGrid",
    "channel_axis",
    "check_bits",
    "grid_of_range",
    "grid_step",
    "numbers_of_range",
    "range_of_grid",
]
MIN_BITS, MAX_BITS = 2, 8
_TINY = np.finfo(np.float32).tiny
MOST_STEPS = 255  # from 0 on any grid of 8 bits
_PIECE = 1 << 16  # weights that stay in a core's cache


@dataclass(frozen=True)
class CodebookGrid:
    """Shared values of a whole tensor (Han et al. 2016, arXiv:1510.00149, section 3).

    Args:
        centres: float32 of shape (K,), 2 <= K <= 256, strictly rising, finite; one of them is 0.

    >>> grid = CodebookGrid(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    >>> grid.quantize(torch.tensor([0.1, -3.0, 1.9])).tolist()
    [0, -1, 2]
    >>> grid.project(torch.tensor([0.1, -3.0, 1.9]))
    tensor([ 0., -1.,  2.])
    """

    centres: Tensor

    @property
    def axis(self) -> None:
        """One codebook serves the whole tensor."""
        return

    @property
    def bits(self) -> int:
        """Bits that tell the centres apart."""
        return max(1, (self.centres.numel() - 1).bit_length())

    @property
    def zero_index(self) -> int:
        """Where the centre 0 stands."""
        return int((self.centres == 0).nonzero()[0, 0])

    def _zero(self, centres: Tensor) -> Tensor:
        """Where the centre 0 stands, as a tensor: to read it would wait for the device."""
        return (centres == 0).to(torch.uint8).argmax()

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest centre of each weight, counted from the centre 0: int32, 0 means value 0."""
        centres = self.centres.to(weight.device)
        middles = (centres[1:] + centres[:-1]) / 2
        index = torch.bucketize(weight.detach().float(), middles)
        return (index - self._zero(centres)).to(torch.int32)

    def dequantize(self, symbols: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of what `quantize` returns."""
        centres = self.centres.to(symbols.device)
        return centres[symbols.long() + self._zero(centres)].to(dtype)

    def project(self, weight: Tensor) -> Tensor:
        """The centre nearest to each weight, in the weight's own dtype."""
        return self.dequantize(self.quantize(weight), weight.dtype)

    def count(self, weight: Tensor) -> Tensor:
        """How often each symbol from -255 to 255 occurs: int64 of shape (511,)."""
        return _counted(self.quantize(weight), _counts(weight))


@dataclass(frozen=True)
class AffineGrid:
    """A uniform grid, `visible = scale * (q - zero_point)` with whole q in `[qmin, qmax]`.

    Zero is always on the grid: it is `q == zero_point`. Jacob et al. 2018, arXiv:1712.05877.

    Args:
        scale: step sizes, float32 of shape (1,) or (channels,); all finite and above 0.
        zero_point: the q of the value 0, int32 of the same shape.
        bits: 2 to 8.
        symmetric: q in `±(2^(bits-1) - 1)` and zero point 0, else q in `[0, 2^bits - 1]`.
        axis: the weight's axis that `scale` runs along; None when one scale serves all.

    >>> grid = AffineGrid(torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), 4, True, None)
    >>> grid.project(torch.tensor([0.0, 0.6, -9.0]))
    tensor([ 0.0000,  0.5000, -3.5000])
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool
    axis: int | None

    @property
    def qmin(self) -> int:
        """The smallest q."""
        return -(2 ** (self.bits - 1) - 1) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The largest q."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def _along_axis(self, values: Tensor, weight: Tensor) -> Tensor:
        values = values.to(weight.device)
        if self.axis is None:
            return values.reshape(())
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return values.reshape(shape)

    def select(self, kept: Mapping[int, Tensor]) -> AffineGrid:
        """The grid of a weight that keeps some entries along axes."""
        if self.axis is None or (index := kept.get(self.axis)) is None:
            return self
        scale, zero = (one[index.to(one.device)] for one in (self.scale, self.zero_point))
        return replace(self, scale=scale, zero_point=zero)

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest grid points of a weight, as q minus the zero point: int32, 0 means value 0."""
        return self._steps(weight).to(torch.int32)

    def _steps(self, weight: Tensor) -> Tensor:
        """The same as whole float32 numbers; never -0, whose bits a file would keep."""
        steps = (weight.detach().float() / self._along_axis(self.scale, weight)).round_()
        if self.symmetric:
            return steps.clamp_(self.qmin, self.qmax).add_(0.0)
        zero = self._along_axis(self.zero_point, weight)
        return steps.clamp_(self.qmin - zero, self.qmax - zero).add_(0.0)

    def dequantize(self, symbols: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of centred symbols (what `quantize` returns), as one float32 product each."""
        return (symbols.to(torch.float32) * self._along_axis(self.scale, symbols)).to(dtype)

    def project(self, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The grid point nearest to each weight, in the weight's own dtype.

        Args:
            weight: of the grid's shape.
            out: where to, of the weight's shape and dtype; None: a new tensor.
        """
        points = torch.empty_like(weight.detach()) if out is None else out
        for piece, place in self.pieces(weight, points):
            place.copy_(self.dequantize(self._steps(piece), weight.dtype))
        return points

    def matches(self, weight: Tensor, points: Tensor) -> bool:
        """Whether `points` are what `project` makes of a weight, to the bit."""
        pieces = self.pieces(weight, points)
        return all(
            torch.equal(self.dequantize(self._steps(piece), weight.dtype), place)
            for piece, place in pieces
        )

    def count(self, weight: Tensor) -> Tensor:
        """How often each whole step from -255 to 255 occurs: int64 of shape (511,)."""
        counts = _counts(weight)
        for piece, _ in self.pieces(weight, weight):
            _counted(self._steps(piece), counts)
        return counts

    def pieces(self, weight: Tensor, other: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A weight and another of its shape, in pieces whose passes stay in a core's cache."""
        pair = weight.detach(), other.detach()
        plain = all(one.device.type == "cpu" and one.is_contiguous() for one in pair)
        if self.axis is not None or not plain or weight.numel() < 2 * _PIECE:
            return [pair]
        flat = (one.view(-1).split(_PIECE) for one in pair)
        return list(zip(*flat, strict=True))


def _counts(weight: Tensor) -> Tensor:
    return torch.zeros(2 * MOST_STEPS + 1, dtype=torch.int64, device=weight.device)


def _counted(symbols: Tensor, counts: Tensor) -> Tensor:
    """Counts with those of more symbols."""
    index = (symbols.reshape(-1) + MOST_STEPS).to(torch.int64)
    if index.device.type == "cpu":
        return counts.add_(torch.bincount(index, minlength=len(counts)))
    return counts.scatter_add_(0, index, torch.ones_like(index))  # bincount would wait


def channel_axis(module: torch.nn.Module) -> int:
    """The output-channel axis of a module's weight: 1 for transposed convolutions, else 0.

    A grouped transposed convolution holds (in, out / groups, ...): one scale an index of axis 1
    is then shared by the groups.

    >>> channel_axis(torch.nn.ConvTranspose2d(8, 4, 3))
    1
    """
    transposed = torch.nn.modules.conv._ConvTransposeNd
    return 1 if isinstance(module, transposed) else 0


def grid_of_range(
    low: Tensor, high: Tensor, *, bits: int, symmetric: bool, axis: int | None = None
) -> AffineGrid:
    """Grid over ranges that hold 0: float32 `low` <= 0 <= `high`, one for each scale.

    >>> grid = grid_of_range(torch.tensor([-1.0]), torch.tensor([2.0]), bits=2, symmetric=False)
    >>> grid.scale, grid.zero_point
    (tensor([1.]), tensor([1], dtype=torch.int32))
    """
    if symmetric:
        width, levels = torch.maximum(-low, high), 2 ** (bits - 1) - 1
    else:
        width, levels = high - low, 2**bits - 1
    # A width of subnormal size would divide to a step of 0: treat it as no width at all.
    scale = width / levels
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    zero = torch.zeros_like(low) if symmetric else torch.round(-low / scale).clamp(0, levels)
    return AffineGrid(scale, zero.to(torch.int32), bits, symmetric, axis)


def numbers_of_range(low: float, high: float, bits: int) -> tuple[float, int, int]:
    """Scale and the range of whole steps from 0 of `grid_of_range`'s affine grid, to the bit.

    For one range a tensor costs a dozen calls: this costs none.

    >>> numbers_of_range(-1.0, 2.0, 2)
    (1.0, -1, 2)
    """
    levels = 2**bits - 1
    least, most = np.float32(low), np.float32(high)
    with np.errstate(all="ignore"):  # as in a tensor
        scale = (most - least) / np.float32(levels)
        scale = scale if scale > _TINY else np.float32(1)
        zero = int(np.clip(np.rint(-least / scale), 0, levels))
    return float(scale), -zero, levels - zero


def range_of_grid(grid: AffineGrid) -> tuple[Tensor, Tensor]:
    """The lowest and highest values on a grid; `grid_of_range` makes it of them again.

    >>> low, high = range_of_grid(grid_of_range(torch.zeros(1), torch.ones(1), bits=2,
    ...                                         symmetric=False))
    >>> low, high
    (tensor([0.]), tensor([1.]))
    """
    low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
    return grid.scale * low, grid.scale * high


def grid_step(grid: AffineGrid | CodebookGrid, weight: Tensor) -> Tensor:
    """The distance of neighbours on a grid, the largest of a codebook, to broadcast over a weight.

    >>> grid_step(CodebookGrid(torch.tensor([-1.0, 0.0, 0.5])), torch.zeros(2, 2))
    tensor(1.)
    """
    if isinstance(grid, CodebookGrid):
        return grid.centres.diff().max().to(weight.device)
    return grid._along_axis(grid.scale, weight)


def check_bits(name: str, bits: object) -> None:
    """Check a number of bits.

    Raises:
        ValueError: unless it is an integer from 2 to 8.

    >>> check_bits("weight_bits", 4)
    """
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name}={bits!r}: valid are integers {MIN_BITS} to {MAX_BITS}")
