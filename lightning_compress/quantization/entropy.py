"""Uniform quantization for the entropy coder: the step follows the rms of the non-zero weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.entropy import entropy_of_counts
from lightning_compress.grids import MIN_BITS, MOST_STEPS, AffineGrid
from lightning_compress.quantization.learned_step import double_of
from lightning_compress.sharding import UNSHARDED, Partition
from lightning_compress.state import Grid

__all__ = [
    "DeadZoneGrid",
    "EntropyGrid",
    "EntropyGrids",
    "entropy_bits",
    "grid_bits",
    "predicted_bits",
    "rate_slopes",
    "steer",
]
FINEST, COARSEST = 0.01, 8.0  # relative steps that `steer` looks at
_HALVINGS = 10


def entropy_bits(symbols: Tensor, *, partition: Partition = UNSHARDED) -> float:
    """Bits of all symbols together at their zero-order entropy.

    Args:
        symbols: steps from 0, none below -255.
        partition: over which processes, when these are one process's: bits are the whole's.

    >>> entropy_bits(torch.tensor([0, 0, 1, -1]))
    6.0
    """
    flat = symbols.reshape(-1).long() + MOST_STEPS
    counts = partition.all_reduce_sum(torch.bincount(flat, minlength=2 * MOST_STEPS + 1))
    return entropy_of_counts(counts.cpu().numpy())


def grid_bits(grid: Grid, values: Tensor, *, partition: Partition = UNSHARDED) -> float:
    """Bits of a weight's symbols on a grid, as `entropy_bits` counts them.

    >>> grid = AffineGrid(torch.ones(1), torch.zeros(1, dtype=torch.int32), 8, True, None)
    >>> grid_bits(grid, torch.tensor([0.0, 0.2, 1.1, -0.9]))
    6.0
    """
    return entropy_of_counts(partition.all_reduce_sum(grid.count(values)).cpu().numpy())


def rate_slopes(counts: Tensor) -> Tensor:
    """Bits that one more step would cost at each symbol, from how often each occurs.

    Central differences of the code lengths `-log2 p(|symbol|)` of the histogram as it is, with
    half a count more everywhere: a weight is drawn to where symbols are common, mostly to 0. What
    is at 0 already stays there.

    Args:
        counts: of the symbols from -255 to 255, (511,), as `AffineGrid.count` gives them; some
            are above 0.

    Returns:
        float32 of their shape.

    >>> counts = torch.zeros(511)
    >>> counts[253:257] = torch.tensor([1.0, 0.0, 4.0, 1.0])  # of -2, -1, 0, 1
    >>> rate_slopes(counts)[253:257].round(decimals=2)
    tensor([-0.0000, -1.2900,  0.0000,  1.2900])
    """
    sizes = counts[MOST_STEPS:].float()
    sizes[1:] += counts[:MOST_STEPS].flip(0)
    places = torch.arange(MOST_STEPS + 1, device=counts.device)
    last = places.where(sizes > 0, 0).max()  # read by nobody: that would wait for the device
    sizes = (sizes + 0.5).masked_fill_(places > last, 0.0)
    sizes[1:] /= 2  # either sign
    lengths = -(sizes / sizes.sum()).log2()
    # A step beyond the largest symbol costs no more than the largest: nothing is known there.
    ahead, behind = torch.roll(lengths, -1), torch.roll(lengths, 1)
    ahead = torch.where(places == last, lengths, ahead)
    slope = ((ahead - behind) / 2).masked_fill_(places > last, 0.0)
    slope[:1].zero_()
    return torch.cat([-slope[1:].flip(0), slope])


@dataclass(frozen=True, kw_only=True)
class EntropyGrid:
    """Settings of `QuantizationAwareTraining(scheme="entropy")`.

    Args:
        step: of the grid, in units of the rms of the non-zero weights.
        dead_zone: half-width of what becomes 0, in steps, from 0.5 (rounding) to under 1.
        rate: weight of the mean bits of a weight in the loss.
        target_bits: bits a weight, over all targets, that the step is steered to.
        target_bytes: the same in bytes of all targets together.

    Raises:
        ValueError: for a value out of range, or both targets.

    >>> EntropyGrid(step=1.0).dead_zone
    0.5
    """

    step: float = 0.5
    dead_zone: float = 0.5
    rate: float = 0.0
    target_bits: float | None = None
    target_bytes: float | None = None

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise ValueError(f"step={self.step!r} must be above 0, in units of the weights' rms")
        if not 0.5 <= self.dead_zone < 1:
            raise ValueError(f"dead_zone={self.dead_zone!r} must lie in [0.5, 1)")
        if not self.rate >= 0:
            raise ValueError(f"rate={self.rate!r} must be 0 or more")
        if self.is_steered and None not in (self.target_bits, self.target_bytes):
            raise ValueError("target_bits and target_bytes: give one of them")
        for name in ("target_bits", "target_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be above 0")

    @property
    def is_steered(self) -> bool:
        """Whether the step follows a target."""
        return self.target_bits is not None or self.target_bytes is not None


@dataclass(frozen=True)
class DeadZoneGrid(AffineGrid):
    """Uniform grid with a dead zone: values within it are quantized to 0.

    Args:
        dead_zone: half-width of what becomes 0, in steps: 0.5 rounds, 0.5 to under 1.

    >>> grid = DeadZoneGrid(torch.tensor([1.0]), torch.tensor([0]), 4, True, None, 0.7)
    >>> grid.project(torch.tensor([0.6, -0.8, 1.6]))
    tensor([ 0., -1.,  2.])
    """

    dead_zone: float = 0.5

    def __getattr__(self, name: str) -> Any:
        """The bits of a grid that was made to hold values which nobody has read yet."""
        most = self.__dict__.get("_most")
        if name != "bits" or most is None:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        bits = min(max(MIN_BITS, int(most).bit_length() + 1), self.__dict__["_limit"])
        self.__dict__["bits"] = bits
        return bits

    @property
    def qmin(self) -> int:
        """The smallest q."""
        return -self.qmax

    @property
    def qmax(self) -> int:
        """The largest q: of a grid whose bits nobody has asked for, one that clips as little."""
        bits = self.__dict__["bits"] if "bits" in self.__dict__ else self.__dict__["_limit"]
        return 2 ** (bits - 1) - 1

    def _steps(self, weight: Tensor) -> Tensor:
        steps = super()._steps(weight)
        if self.dead_zone > 0.5:
            width = self.dead_zone * self._along_axis(self.scale, weight)
            steps.masked_fill_(weight.detach().float().abs() < width, 0.0)
        return steps


class EntropyGrids:
    """A uniform grid of step `relative_step * rms(non-zero weights)` that clips nothing.

    Its number of symbols does not matter for size, their entropy does. Where the range would need
    more than `bits`, the step is raised until it does not, and `raised` is True.

    Args:
        bits: most bits of a symbol, 2 to 8.
        relative_step: step in units of the rms.
        dead_zone: see `DeadZoneGrid`.
        rate: weight of a weight's bits in the loss: for a term `r * (mean bits of all N weights)`
            give `r / N`.
        partition: over which processes the weight's rows are.

    >>> quantizer = EntropyGrids(bits=8, relative_step=0.5)
    >>> quantizer.grid(torch.tensor([3.0, 0.0, 0.0, -3.0])).scale
    tensor([1.5000])
    """

    def __init__(
        self,
        *,
        bits: int,
        relative_step: float,
        dead_zone: float = 0.5,
        rate: float = 0.0,
        partition: Partition = UNSHARDED,
    ) -> None:
        self.bits, self.relative_step = bits, relative_step
        self.dead_zone, self.rate, self.partition = dead_zone, rate, partition
        self.raised = False
        self.held: float | None = None  # the step when frozen

    def start(self, values: Tensor) -> None:
        """Update whether the step is raised."""
        self.raised = bool(self._step(values)[1])

    def _step(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step, whether the range needs a larger one, and the largest magnitude of a value.

        All are tensors where the values are: a number of Python would wait for the device.
        """
        rms, largest = self._looked_at(values)
        step = self.relative_step * rms if self.held is None else torch.full_like(rms, self.held)
        step = torch.where(step > torch.finfo(torch.float32).tiny, step, torch.ones_like(step))
        least = largest / (2 ** (self.bits - 1) - 1)
        return torch.where(least > step, least, step), least > step, largest

    def _looked_at(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rms of the non-zero values, and largest magnitude, by one all-reduce."""
        zero = values.new_zeros((), dtype=double_of(values))
        count, norm, largest = zero, zero, zero
        if self.held is None:
            count = torch.count_nonzero(values).to(zero)
            norm = torch.linalg.vector_norm(values.float()).to(zero)
        if values.numel():
            low, high = torch.aminmax(values)
            largest = torch.maximum(-low, high).to(zero)
        everyone = self.partition.all_gather(torch.stack([count, norm * norm, largest]))
        count, square = everyone[:, :2].sum(dim=0).unbind()
        return square.sqrt() / count.clamp(min=1).sqrt(), everyone[:, 2].amax()

    def grid(self, values: Tensor) -> DeadZoneGrid:
        """The grid of the fewest bits that hold these values; they are counted when asked for."""
        step, _, largest = self._step(values)
        scale = step.to(torch.float32).reshape(1)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        grid = DeadZoneGrid(scale, zero, self.bits, True, None, self.dead_zone)
        del grid.__dict__["bits"]
        grid.__dict__.update(_most=torch.round(largest / step), _limit=self.bits)
        return grid

    def gradient(self, gradient: Tensor, values: Tensor) -> None:
        """Add the rate term's gradient."""
        if self.rate > 0:
            grid = self.grid(values)
            slopes = rate_slopes(self.partition.all_reduce_sum(grid.count(values)))
            slopes *= self.rate / grid.scale
            for piece, place in grid.pieces(values, gradient):
                index = grid.quantize(piece).reshape(-1).add_(MOST_STEPS)
                place.add_(slopes.index_select(0, index).reshape(place.shape))

    def step(self, values: Tensor, *, event: bool) -> None:
        """Update at an event whether the step is raised; the step itself follows the weights."""
        if event:
            self.raised = bool(self._step(values)[1])

    def freeze(self, values: Tensor) -> None:
        """Keep the step of these values."""
        self.held = float(self._step(values)[0])

    def thaw(self) -> None:
        """Follow the weights again."""
        self.held = None

    def select(self, kept: Mapping[int, Tensor]) -> None:
        """One grid serves the whole weight: nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """The steps."""
        return {"relative_step": self.relative_step, "held": self.held, "raised": self.raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.relative_step, self.held = state["relative_step"], state["held"]
        self.raised = state["raised"]


def predicted_bits(quantizer: EntropyGrids, values: Tensor) -> float:
    """Bits of a weight's symbols on the grid that it would get now.

    >>> quantizer = EntropyGrids(bits=8, relative_step=1.0)
    >>> predicted_bits(quantizer, torch.tensor([0.0, 0.0, 1.0, -1.0]))
    6.0
    """
    return grid_bits(quantizer.grid(values), values, partition=quantizer.partition)


def steer(quantizers: Sequence[EntropyGrids], values: Sequence[Tensor], bits: float) -> float:
    """Give all quantizers the relative step at which their weights together cost so many bits.

    Bisection in the logarithm of the step, from 0.01 to 8 times the rms.

    Returns:
        The bits at the step that was found; far from `bits` when those are out of reach.

    >>> values = torch.linspace(-1, 1, 1001)
    >>> quantizer = EntropyGrids(bits=8, relative_step=0.1)
    >>> round(steer([quantizer], [values], 3 * 1001) / 1001, 1)
    3.0
    """

    def cost(log_step: float) -> float:
        for quantizer in quantizers:
            quantizer.relative_step = math.exp(log_step)
        return sum(map(predicted_bits, quantizers, values))

    low, high = math.log(FINEST), math.log(COARSEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > bits else (low, middle)
    return cost((low + high) / 2)
