"""Weight quantizers: choose the grid of one weight while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_compress.errors import check_choice
from lightning_compress.grids import AffineGrid, CodebookGrid, grid_of_range, range_of_grid
from lightning_compress.quantization.codebook import CodebookGrids
from lightning_compress.quantization.entropy import EntropyGrids
from lightning_compress.quantization.learned_step import LearnedPositive, LearnedStepGrids
from lightning_compress.quantization.ranges import MOMENTUM, find_range, minmax_range
from lightning_compress.quantization.rate_distortion import RateDistortionGrids
from lightning_compress.quantization.upsampled_conv import LARGEST, step_for_sums
from lightning_compress.sharding import UNSHARDED, Partition
from lightning_compress.state import Grid

__all__ = ["WEIGHT_SCHEMES", "RangeGrids", "TensorQuantizer", "begin_from", "make_quantizer"]

WEIGHT_SCHEMES = (
    "symmetric",
    "affine",
    "learned_step",
    "codebook",
    "entropy",
    "rate_distortion",
)
_FOLLOWING = ("minmax", "moving_average")  # look at every step; the others search at events


class TensorQuantizer(Protocol):
    """Protocol of a weight quantizer: chooses the grid of one weight while it trains.

    `values` are always the masked latent values of the weight. `grid` changes nothing, so that
    projecting twice is projecting once, and an average of weights may be projected too. Of a
    sharded weight they are one process's rows; grids and states are those of the whole weight,
    the same on every process.
    """

    def start(self, values: Tensor) -> None:
        """Initialize from the weight when quantization begins."""

    def grid(self, values: Tensor) -> Grid:
        """Current grid for these values."""
        ...

    def gradient(self, gradient: Tensor, values: Tensor) -> None:
        """Read the final gradient before an update, and change it in place where need be."""

    def step(self, values: Tensor, *, event: bool) -> Tensor | None:
        """Follow an update; `event` when the costly part is due. Returns values to go on from."""
        ...

    def freeze(self, values: Tensor) -> None:
        """Freeze the grid."""

    def thaw(self) -> None:
        """Unfreeze the grid, in a new fit."""

    def select(self, kept: Mapping[int, Tensor]) -> None:
        """Follow a removal of channels: keep some entries along axes."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


class RangeGrids:
    """Uniform grids over an observed range, symmetric or affine.

    "minmax" follows the weight at every step, "moving_average" does so slowly, "percentile" and
    "mse" search at each event.

    Args:
        bits: 2 to 8.
        symmetric: around 0, else from the lowest to the highest value.
        axis: of the scales; None: one scale.
        observer: a name in `OBSERVERS`.
        partition: over which processes.

    >>> import torch
    >>> quantizer = RangeGrids(bits=4, symmetric=True, axis=None, observer="minmax")
    >>> quantizer.start(torch.tensor([0.7, -0.2]))
    >>> quantizer.grid(torch.tensor([0.7, -0.2])).scale
    tensor([0.1000])
    """

    def __init__(
        self,
        *,
        bits: int,
        symmetric: bool,
        axis: int | None,
        observer: str,
        partition: Partition = UNSHARDED,
    ) -> None:
        self.bits, self.symmetric, self.axis, self.observer = bits, symmetric, axis, observer
        self.partition = partition
        self.range: tuple[Tensor, Tensor] | None = None
        self.frozen = False
        self.enlarged = 1  # factor of what the layer reads: sums of its weights are to fit int8

    def _found(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.observer in _FOLLOWING:
            here = values.device.type == "cpu"  # elsewhere `follow` looks at events
            low, high = minmax_range(values, self.axis, partition=self.partition, check=here)
        else:
            rules = {"bits": self.bits, "symmetric": self.symmetric}
            low, high = find_range(self.observer, self.partition.whole(values), self.axis, **rules)
        levels = 2 ** (self.bits - 1) - 1
        if self.symmetric and self.enlarged**2 * levels > LARGEST:
            step = step_for_sums(self.partition.whole(values), self.enlarged, self.axis)
            high = torch.maximum(high, levels * step)
        return low, high

    def start(self, values: Tensor) -> None:
        """Find the range, unless an earlier fit did."""
        if self.range is None:
            self.range = self._found(values)

    def grid(self, values: Tensor) -> AffineGrid:
        """Grid over the current range."""
        low, high = self._found(values) if self.range is None else self.range
        low, high = low.to(values.device), high.to(values.device)
        return grid_of_range(low, high, bits=self.bits, symmetric=self.symmetric, axis=self.axis)

    def gradient(self, gradient: Tensor, values: Tensor) -> None:
        """Straight through."""

    def step(self, values: Tensor, *, event: bool) -> None:
        """Follow the range."""
        if self.frozen or self.range is None or not (self.observer in _FOLLOWING or event):
            return
        new = self._found(values)
        if self.observer == "moving_average":
            low, high = (old.to(values.device) for old in self.range)
            new = low.lerp(new[0], MOMENTUM), high.lerp(new[1], MOMENTUM)
        self.range = new

    def freeze(self, values: Tensor) -> None:  # noqa: ARG002
        """Keep the range."""
        self.frozen = True

    def thaw(self) -> None:
        """Follow again."""
        self.frozen = False

    def select(self, kept: Mapping[int, Tensor]) -> None:
        """Keep the ranges of the remaining channels."""
        index = None if self.axis is None else kept.get(self.axis)
        if index is not None and self.range is not None:
            low, high = (one[index.to(one.device)] for one in self.range)
            self.range = low, high

    def state_dict(self) -> dict[str, Any]:
        """The range."""
        return {"range": self.range, "frozen": self.frozen, "enlarged": self.enlarged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.range, self.frozen = state["range"], state["frozen"]
        # What the layer reads does not change: a state of before it was seen takes nothing away.
        self.enlarged = max(self.enlarged, state.get("enlarged", 1))


def begin_from(quantizer: TensorQuantizer, grid: Grid) -> None:
    """Initialize a new quantizer from the grid of an earlier fit, where its scheme has such grids.

    >>> import torch
    >>> quantizer = RangeGrids(bits=4, symmetric=True, axis=None, observer="minmax")
    >>> zero = torch.zeros(1, dtype=torch.int32)
    >>> begin_from(quantizer, AffineGrid(torch.tensor([0.5]), zero, 4, True, None))
    >>> quantizer.grid(torch.zeros(1)).scale
    tensor([0.5000])
    """
    if isinstance(quantizer, CodebookGrids) and isinstance(grid, CodebookGrid):
        if quantizer.centres is None and grid.centres.numel() == 2**quantizer.bits:
            quantizer.centres = grid.centres.clone()
        return
    learned = (LearnedStepGrids, RateDistortionGrids)
    if not isinstance(grid, AffineGrid) or not isinstance(quantizer, (RangeGrids, *learned)):
        return
    if (grid.bits, grid.axis) != (quantizer.bits, quantizer.axis):
        return
    if (
        isinstance(quantizer, RangeGrids)
        and grid.symmetric == quantizer.symmetric
        and quantizer.range is None
    ):
        quantizer.range = range_of_grid(grid)
    elif isinstance(quantizer, learned) and grid.symmetric and quantizer.learned is None:
        quantizer.learned = LearnedPositive(grid.scale.clone(), quantizer.lr)


def make_quantizer(
    scheme: str,
    *,
    bits: int,
    axis: int | None,
    observer: str,
    lr: float,
    entropy: dict[str, float],
    partition: Partition = UNSHARDED,
) -> TensorQuantizer:
    """Make the weight quantizer of a scheme.

    Args:
        scheme: a name in `SCHEMES`.
        bits: 2 to 8.
        axis: of the scales, where the scheme has one for each channel.
        observer: of "symmetric" and "affine".
        lr: of what learns.
        entropy: arguments of `EntropyGrids`.
        partition: over which processes the weight's rows are.

    Raises:
        ValueError: for an unknown scheme.
    """
    check_choice("scheme", scheme, WEIGHT_SCHEMES)
    if scheme == "learned_step":
        return LearnedStepGrids(bits=bits, axis=axis, lr=lr, partition=partition)
    if scheme == "rate_distortion":
        return RateDistortionGrids(bits=bits, axis=axis, lr=lr, partition=partition)
    if scheme == "codebook":
        return CodebookGrids(bits=bits, lr=lr, partition=partition)
    if scheme == "entropy":
        return EntropyGrids(bits=bits, **entropy, partition=partition)
    symmetric = scheme == "symmetric"
    return RangeGrids(
        bits=bits, symmetric=symmetric, axis=axis, observer=observer, partition=partition
    )
