"""Uniform grids for the entropy coder: the step follows the rms of the non-zero weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.entropy import entropy_of_counts
from lightning_compress.grids import MIN_BITS, AffineGrid
from lightning_compress.sharding import UNSHARDED, Partition

__all__ = [
    "DeadZoneGrid",
    "EntropyGrids",
    "entropy_bits",
    "predicted_bits",
    "rate_gradient",
    "steer",
]
_MOST = 255  # steps from 0 on any grid of 8 bits


def entropy_bits(symbols: Tensor, *, partition: Partition = UNSHARDED) -> float:
    """Bits of all symbols together at their zero-order entropy.

    Args:
        symbols: steps from 0, none below -255.
        partition: over which processes, when these are one process's: bits are the whole's.

    >>> entropy_bits(torch.tensor([0, 0, 1, -1]))
    6.0
    """
    flat = symbols.reshape(-1).long() + _MOST
    counts = partition.all_reduce_sum(torch.bincount(flat, minlength=2 * _MOST + 1))
    return entropy_of_counts(counts.cpu().numpy())


def rate_gradient(
    symbols: Tensor, step: Tensor | float, *, partition: Partition = UNSHARDED
) -> Tensor:
    """Change of the code length, in bits, with the latent value of each weight.

    Central differences of the code lengths `-log2 p(|symbol|)` of the histogram as it is, with
    half a count more everywhere: a weight is drawn to where symbols are common, mostly to 0. What
    is at 0 already stays there.

    Args:
        symbols: whole steps from 0.
        step: size of a step.
        partition: over which processes, when the symbols are one process's; one of theirs may have
            none, all together have some.

    >>> rate_gradient(torch.tensor([0, 0, 0, 0, 1, -2]), 0.5).round(decimals=2)
    tensor([0.0000, 0.0000, 0.0000, 0.0000, 2.5800, -0.0000])
    """
    size = symbols.abs().long()
    counts = partition.all_reduce_sum(torch.bincount(size.reshape(-1), minlength=_MOST + 1))
    counts = counts[: int(counts.nonzero()[-1]) + 1].float() + 0.5
    counts[1:] /= 2  # either sign
    lengths = -(counts / counts.sum()).log2()
    # A step beyond the largest symbol costs no more than the largest: nothing is known there.
    ahead, behind = torch.roll(lengths, -1), torch.roll(lengths, 1)
    ahead[-1] = lengths[-1]
    slope = (ahead - behind) / 2
    slope[0] = 0.0
    return slope[size] * symbols.sign() / step


FINEST, COARSEST = 0.01, 8.0  # relative steps that `steer` looks at
_HALVINGS = 10


@dataclass(frozen=True)
class DeadZoneGrid(AffineGrid):
    """A uniform grid that sends more to 0 than lies nearest to it.

    Args:
        dead_zone: half-width of what becomes 0, in steps: 0.5 rounds, 0.5 to under 1.

    >>> grid = DeadZoneGrid(torch.tensor([1.0]), torch.tensor([0]), 4, True, None, 0.7)
    >>> grid.project(torch.tensor([0.6, -0.8, 1.6]))
    tensor([ 0., -1.,  2.])
    """

    dead_zone: float = 0.5

    def _steps(self, weight: Tensor) -> Tensor:
        steps = super()._steps(weight)
        if self.dead_zone > 0.5:
            width = self.dead_zone * self._along_axis(self.scale, weight)
            steps.masked_fill_(weight.detach().float().abs() < width, 0.0)
        return steps


class EntropyGrids:
    """A uniform grid of step `relative_step * rms(non-zero weights)` that clips nothing.

    Its number of symbols does not matter for size, their entropy does. Where the range would need
    more than `bits`, the step is raised until it does not, and `raised` tells so.

    Args:
        bits: most bits of a symbol, 2 to 8.
        relative_step: step in units of the rms.
        dead_zone: see `DeadZoneGrid`.
        rate: weight of a weight's bits in the loss: for a term `r * (mean bits of all N weights)`
            give `r / N`.
        partition: over which processes the weight's rows are.

    >>> maker = EntropyGrids(bits=8, relative_step=0.5)
    >>> maker.grid(torch.tensor([3.0, 0.0, 0.0, -3.0])).scale
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
        """Tell whether the step is raised."""
        self.raised = self._step(values)[1]

    def _step(self, values: Tensor) -> tuple[float, bool, float]:
        """The step, whether the range asked for a larger one, and the largest size of a value."""
        rms, largest = self._looked_at(values)
        step = self.relative_step * rms if self.held is None else self.held
        step = step if step > torch.finfo(torch.float32).tiny else 1.0
        least = largest / (2 ** (self.bits - 1) - 1)
        return (least, True, largest) if least > step else (step, False, largest)

    def _looked_at(self, values: Tensor) -> tuple[float, float]:
        """The rms of what is not 0, and the largest size, over all processes: one message."""
        count = float(torch.count_nonzero(values)) if self.held is None else 0.0
        norm = float(torch.linalg.vector_norm(values.float())) if self.held is None else 0.0
        low, high = torch.aminmax(values) if values.numel() else (torch.zeros(1), torch.zeros(1))
        own = torch.tensor([count, norm**2, max(-float(low), float(high))], dtype=torch.float64)
        everyone = self.partition.all_gather(own)
        count, square = everyone[:, :2].sum(dim=0).tolist()
        return math.sqrt(square) / math.sqrt(max(count, 1)), float(everyone[:, 2].max())

    def grid(self, values: Tensor) -> DeadZoneGrid:
        """The grid of the fewest bits that hold these values."""
        step, _, largest = self._step(values)
        most = round(largest / step)
        bits = min(max(MIN_BITS, most.bit_length() + 1), self.bits)
        scale = torch.tensor([step], dtype=torch.float32, device=values.device)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return DeadZoneGrid(scale, zero, bits, True, None, self.dead_zone)

    def gradient(self, gradient: Tensor, values: Tensor) -> None:
        """Add the rate term's gradient."""
        if self.rate > 0:
            grid = self.grid(values)
            step = float(grid.scale)
            slope = rate_gradient(grid.quantize(values), step, partition=self.partition)
            gradient.add_(slope.to(gradient.dtype), alpha=self.rate)

    def step(self, values: Tensor, *, event: bool) -> None:
        """Tell at an event whether the step is raised; the step itself follows the weights."""
        if event:
            self.raised = self._step(values)[1]

    def freeze(self, values: Tensor) -> None:
        """Keep the step of these values."""
        self.held = self._step(values)[0]

    def thaw(self) -> None:
        """Follow the weights again."""
        self.held = None

    def select(self, kept: Mapping[int, Tensor]) -> None:
        """One grid serves the whole weight: nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """The steps."""
        return {"relative_step": self.relative_step, "held": self.held, "raised": self.raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self.relative_step, self.held = state["relative_step"], state["held"]
        self.raised = state["raised"]


def predicted_bits(maker: EntropyGrids, values: Tensor) -> float:
    """Bits of a weight's symbols on the grid that it would get now.

    >>> maker = EntropyGrids(bits=8, relative_step=1.0)
    >>> predicted_bits(maker, torch.tensor([0.0, 0.0, 1.0, -1.0]))
    6.0
    """
    return entropy_bits(maker.grid(values).quantize(values), partition=maker.partition)


def steer(makers: Sequence[EntropyGrids], values: Sequence[Tensor], bits: float) -> float:
    """Give all makers the relative step at which their weights together cost so many bits.

    Bisection in the logarithm of the step, from 0.01 to 8 times the rms.

    Returns:
        The bits at the step that was found; far from `bits` when those are out of reach.

    >>> values = torch.linspace(-1, 1, 1001)
    >>> maker = EntropyGrids(bits=8, relative_step=0.1)
    >>> round(steer([maker], [values], 3 * 1001) / 1001, 1)
    3.0
    """

    def cost(log_step: float) -> float:
        for maker in makers:
            maker.relative_step = math.exp(log_step)
        return sum(map(predicted_bits, makers, values))

    low, high = math.log(FINEST), math.log(COARSEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > bits else (low, middle)
    return cost((low + high) / 2)
