"""Weights as whole numbers and their steps, ready to be stored in an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_compress.conversion.summed import Summed
from lightning_compress.quantization.codebooks import CodebookGrid
from lightning_compress.quantization.quantizers import AffineGrid, affine_grid, channel_axis
from lightning_compress.state import Grid

__all__ = ["CodebookWeight", "IntegerWeight", "StoredWeight", "stored_weight"]

SEVEN_BITS = 63
INT4, UINT4, INT8, UINT8 = (-8, 7), (0, 15), (-128, 127), (0, 255)


@dataclass(frozen=True)
class IntegerWeight:
    """`scale * symbols`, with 0 standing for 0.

    Args:
        symbols: int32, the grid's q minus its zero point.
        scale: float32, broadcasts against `symbols`; the same rank.
        zero: the grid's zero point, int32, of the scale's shape.
        source: where the grid comes from, in words.
        stretch: what `symbols` were multiplied with, and `scale` divided by; a power of 2.
        summed: how the symbols are sums of fewer numbers; None where they are not.
    """

    symbols: NDArray[np.int32]
    scale: NDArray[np.float32]
    zero: NDArray[np.int32]
    source: str
    stretch: int = 1
    summed: Summed | None = None

    @property
    def values(self) -> NDArray[np.float32]:
        """The weights themselves."""
        return self.symbols.astype(np.float32) * self.scale

    @property
    def axis(self) -> int | None:
        """The one axis that the scale runs along; None when one scale serves all.

        Raises:
            ValueError: when it runs along several.
        """
        axes = [axis for axis, size in enumerate(self.scale.shape) if size > 1]
        if len(axes) > 1:
            raise ValueError(f"a scale of shape {self.scale.shape} runs along several axes")
        return axes[0] if axes else None

    def scaled(self, factor: NDArray[np.float32]) -> IntegerWeight:
        """The weight times a factor, exactly: signs go into the symbols, the rest into the scale.

        Args:
            factor: broadcasts against `symbols`, of the same rank. A factor of 0 empties its
                channel and leaves it the step 1.
        """
        sign = np.sign(factor).astype(np.int32)
        size = np.where(sign == 0, np.float32(1), np.abs(factor) * self.scale)
        return replace(
            self,
            symbols=self.symbols * sign,
            scale=size.astype(np.float32),
            zero=np.broadcast_to(self.zero, size.shape).copy(),
        )

    def moved(self, move: Callable[[NDArray], NDArray]) -> IntegerWeight:
        """After a function that only reorders, cuts or repeats elements.

        Raises:
            ValueError: when no single axis of the result carries the steps.
        """
        symbols = move(self.symbols)
        scale, zero = (
            move(np.broadcast_to(part, self.symbols.shape)) for part in (self.scale, self.zero)
        )
        for axis in (None, *range(symbols.ndim)):
            short = tuple(slice(None) if one == axis else slice(1) for one in range(symbols.ndim))
            if (scale == scale[short]).all() and (zero == zero[short]).all():
                return replace(
                    self, symbols=symbols, scale=scale[short], zero=zero[short], summed=None
                )
        raise ValueError("the moved scale runs along several axes")

    def nibbles(self) -> tuple[str, NDArray[np.int32], NDArray[np.int32] | None] | None:
        """4-bit storage of the unstretched symbols, as `encoded` says; None for more bits."""
        small = self.symbols // self.stretch
        if INT4[0] <= small.min(initial=0) and small.max(initial=0) <= INT4[1]:
            return "int4", small, None
        low = small.min(self._rest, keepdims=True, initial=0)
        if (small.max(self._rest, keepdims=True, initial=0) - low > UINT4[1]).any():
            return None
        return "uint4", small - low, -low

    def encoded(self) -> tuple[str, NDArray[np.integer], NDArray[np.int32] | None]:
        """Storage type ("int8" or "uint8"), what is stored, zero points (None: all 0).

        Symbols that fit into signed integers need no zero point: runtimes are fastest so.
        """
        if INT8[0] <= self.symbols.min(initial=0) and self.symbols.max(initial=0) <= INT8[1]:
            return "int8", self.symbols.astype(np.int8), None
        zero = np.where((self.symbols < 0).any(self._rest, keepdims=True), self.zero, 0)
        zero = self._fitting_zero(zero)
        return "uint8", (self.symbols + zero).astype(np.uint8), zero

    def stretched(self) -> IntegerWeight:
        """The same weight with few bits spread over 7, exactly: others stay as they are.

        Biases are stored in steps of input times weight, too coarse where both have few bits.
        """
        room = SEVEN_BITS // max(1, int(np.abs(self.symbols).max(initial=0)))
        if room < 2:
            return self
        factor = 1 << room.bit_length() - 1
        scale = (self.scale / factor).astype(np.float32)
        return replace(self, symbols=self.symbols * factor, scale=scale, stretch=factor)

    def may_be_cut_off(self, op: str) -> bool:
        """Whether uint8 inputs times two neighbouring weights may exceed 16 bits with their sum.

        CPUs without VNNI add products in such pairs, and cut them off at 32,767. Neighbours are
        those that a product of type `op` reads one after the other: along the input channels.
        """
        rows = self.symbols.T if op == "MatMul" else self.symbols
        if rows.ndim > 2:
            rows = np.moveaxis(rows, 1, -1)
        rows = rows.reshape(rows.shape[0], -1)
        rows = rows[:, : rows.shape[1] // 2 * 2].reshape(rows.shape[0], -1, 2)
        positive = rows.clip(min=0).sum(-1).max(initial=0)
        return 255 * int(max(positive, -rows.clip(max=0).sum(-1).min(initial=0))) > 32767

    @property
    def _rest(self) -> tuple[int, ...]:
        return tuple(axis for axis, size in enumerate(self.scale.shape) if size == 1)

    def _fitting_zero(self, zero: NDArray[np.int32]) -> NDArray[np.int32]:
        """Zero points that hold all symbols; a flipped channel has its range mirrored."""
        low = self.symbols.min(self._rest, keepdims=True, initial=0)
        high = self.symbols.max(self._rest, keepdims=True, initial=0)
        return np.clip(zero, -low, UINT8[1] - high).astype(np.int32)


@dataclass(frozen=True)
class CodebookWeight:
    """`centres[index]`.

    Args:
        index: which centre, int32.
        centres: float32, at most 256.
        source: where the grid comes from, in words.
    """

    index: NDArray[np.int32]
    centres: NDArray[np.float32]
    source: str

    @property
    def values(self) -> NDArray[np.float32]:
        """The weights themselves."""
        return self.centres[self.index]

    def moved(self, move: Callable[[NDArray], NDArray]) -> CodebookWeight:
        """After a function that only reorders, cuts or repeats elements."""
        return replace(self, index=move(self.index))


StoredWeight = IntegerWeight | CodebookWeight


def stored_weight(layer: nn.Module, weight: Tensor, grid: Grid | None) -> StoredWeight:
    """A layer's weight on its own grid; without one, on 8 bits over its min/max range.

    >>> import torch
    >>> layer = nn.Linear(1, 2)
    >>> stored = stored_weight(layer, torch.tensor([[2.54], [-1.27]]), None)
    >>> stored.symbols.tolist(), stored.source
    ([[127], [-127]], 'min/max range, symmetric, per channel, 8 bits')
    """
    if isinstance(grid, CodebookGrid):
        index = grid.quantize(weight).numpy() + grid.zero_index
        return CodebookWeight(index, grid.centres.cpu().numpy(), f"codebook, {grid.bits} bits")
    source = "trained grid"
    if grid is None:
        grid = affine_grid(weight, bits=8, axis=channel_axis(layer))
        source = "min/max range"
    return IntegerWeight(
        symbols=grid.quantize(weight).numpy(),
        scale=_along(grid, grid.scale, weight).astype(np.float32),
        zero=_along(grid, grid.zero_point, weight).astype(np.int32),
        source=f"{source}, {_described(grid)}",
    )


def _described(grid: AffineGrid) -> str:
    kind = "symmetric" if grid.symmetric else "affine"
    return f"{kind}, per {'tensor' if grid.axis is None else 'channel'}, {grid.bits} bits"


def _along(grid: AffineGrid, values: Tensor, weight: Tensor) -> NDArray:
    shape = [1] * weight.dim()
    if grid.axis is not None:
        shape[grid.axis] = -1
    return values.detach().cpu().numpy().reshape(shape)
