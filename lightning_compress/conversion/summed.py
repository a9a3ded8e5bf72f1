"""Kernels whose taps are sums of weights: the file holds the weights, a session adds them up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Summed"]


@dataclass(frozen=True)
class Summed:
    """How `enlarged_as_conv` lays out its kernel: `rows @ weight @ columns^T`, then moved.

    Args:
        factor: of the enlargement.
        kernel: rows and columns of the weight.
        groups: of the convolution.

    >>> layout = Summed(2, (3, 3), 1)
    >>> weight = np.arange(18, dtype=np.int32).reshape(2, 1, 3, 3)
    >>> layout.expand(weight).shape, bool((layout.weights(layout.expand(weight)) == weight).all())
    ((8, 1, 2, 2), True)
    """

    factor: int
    kernel: tuple[int, int]
    groups: int

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the summed kernel."""
        high, wide = (-(-(size + self.factor - 1) // self.factor) for size in self.kernel)
        return high, wide

    def matrix(self, axis: int) -> NDArray[np.float32]:
        """(factor * taps, kernel) of 0 and 1: which weights add up, by offset and tap."""
        size, taps = self.kernel[axis], self.taps[axis]
        offset, tap = np.divmod(np.arange(self.factor * taps), taps)
        first = size - 1 - (self.factor * (taps - 1 - tap) + offset)
        place = np.arange(size)[None] - first[:, None]
        return ((place >= 0) & (place < self.factor)).astype(np.float32)

    def expand(self, weight: NDArray) -> NDArray[np.int32]:
        """The kernel, (out * factor^2, in / groups, taps, taps), of a weight of whole numbers."""
        sums = self.matrix(0) @ weight.astype(np.float32) @ self.matrix(1).T
        split = sums.reshape(self.split(weight.shape[0], weight.shape[1]))
        shape = (-1, weight.shape[1], *self.taps)
        return split.transpose(self.order).reshape(shape).astype(np.int32)

    def weights(self, kernel: NDArray[np.int32]) -> NDArray[np.int32] | None:
        """The weight, (out, in / groups, rows, columns), of a kernel; None when there is none."""
        outputs, inputs = kernel.shape[0] // self.factor**2, kernel.shape[1]
        split = self.split(outputs, inputs)
        moved = kernel.reshape([split[axis] for axis in self.order])
        high, wide = (self.factor * taps for taps in self.taps)
        sums = moved.transpose(np.argsort(self.order)).reshape(outputs, inputs, high, wide)
        one, other = (np.linalg.pinv(self.matrix(axis)) for axis in (0, 1))
        found = np.rint(one @ sums @ other.T).astype(np.int32)
        return found if (self.expand(found) == kernel).all() else None

    def split(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """The shape of the sums with offsets and taps apart."""
        (high, wide), factor = self.taps, self.factor
        return self.groups, outputs // self.groups, inputs, factor, high, factor, wide

    @property
    def order(self) -> tuple[int, ...]:
        """Offsets come first among the channels, but behind the groups where there are several."""
        return (3, 5, 0, 1, 2, 4, 6) if self.groups == 1 else (0, 1, 3, 5, 2, 4, 6)
