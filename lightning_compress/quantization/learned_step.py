"""Learned step sizes (LSQ, Esser et al. 2020, arXiv:1902.08153) for projected weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress.grids import AffineGrid
from lightning_compress.sharding import UNSHARDED, Partition

__all__ = [
    "Adam",
    "LearnedPositive",
    "LearnedStepGrids",
    "double_of",
    "initial_step",
    "step_gradient",
]


class Adam:
    """Adam's direction for a small tensor that is no parameter of the module.

    Kingma & Ba 2015, arXiv:1412.6980; betas 0.9 and 0.999. It does not depend on the scale of the
    gradients, which a loss scaler may have changed.

    >>> adam = Adam()
    >>> adam.direction(torch.tensor([3.0, -0.1]))
    tensor([ 1.0000, -1.0000])
    """

    def __init__(self) -> None:
        self._count: Tensor | float = 0.0  # on the gradient's device, once there was one
        self.mean: Tensor | None = None
        self.square: Tensor | None = None

    @property
    def count(self) -> int:
        """Gradients that were taken in."""
        return int(self._count)

    def direction(self, gradient: Tensor, taken: Tensor | None = None) -> Tensor:
        """Update the moments with a gradient; return the step direction, of size about 1.

        Args:
            gradient: of the shape of all others.
            taken: a bool on its device: False leaves everything as it was; None: True.
        """
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)
        before = self.mean.to(gradient.device), self.square.to(gradient.device)
        count = torch.as_tensor(self._count, dtype=double_of(gradient), device=gradient.device)
        after = before[0].lerp(gradient, 0.1), before[1].lerp(gradient.square(), 0.001)
        if taken is not None:
            pairs = zip(after, before, strict=True)
            after = tuple(torch.where(taken, new, old) for new, old in pairs)
        self._count = count + (1 if taken is None else taken)
        self.mean, self.square = after
        mean = self.mean / (1 - 0.9**self._count)
        square = self.square / (1 - 0.999**self._count)
        return mean / (square.sqrt() + 1e-12)

    def select(self, index: Tensor) -> None:
        """Keep the moments of some entries."""
        if self.mean is not None and self.square is not None:
            index = index.to(self.mean.device)
            self.mean, self.square = self.mean[index], self.square[index]

    def state_dict(self) -> dict[str, Any]:
        """The moments."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._count = float(state["count"])
        self.mean, self.square = state["mean"], state["square"]


def double_of(tensor: Tensor) -> torch.dtype:
    """The widest float of a tensor's device."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


class LearnedPositive:
    """Positive numbers under Adam in their logarithm: steps are relative, and stay above 0.

    Args:
        value: float32, above 0.
        lr: relative change of a step.

    >>> number = LearnedPositive(torch.tensor([2.0]), lr=0.01)
    >>> number.step(torch.tensor([5.0]))
    >>> number.value
    tensor([1.9801])
    """

    def __init__(self, value: Tensor, lr: float) -> None:
        self.value, self.lr, self._adam = value, lr, Adam()

    def step(self, gradient: Tensor) -> None:
        """Follow the loss's gradient by the value itself; one that is not finite is left out."""
        finite = torch.isfinite(gradient).all()
        gradient, value = gradient.float(), self.value.to(gradient.device)
        against = self._adam.direction(gradient * value, finite)
        self.value = torch.where(finite, value * torch.exp(-self.lr * against), value)

    def select(self, index: Tensor) -> None:
        """Keep some of the numbers."""
        self.value = self.value[index.to(self.value.device)]
        self._adam.select(index)

    def state_dict(self) -> dict[str, Any]:
        """Value and moments."""
        return {"value": self.value, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.value = state["value"]
        self._adam.load_state_dict(state["adam"])


def _sum_rows(values: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return values.sum().reshape(1)
    return values.sum(dim=[i for i in range(values.dim()) if i != axis])


def initial_step(
    values: Tensor, *, bits: int, axis: int | None = None, partition: Partition = UNSHARDED
) -> Tensor:
    """LSQ's first step, `2 mean|w| / sqrt(qmax)`, over the weights that are not 0.

    A channel of zeros gets the step 1.

    Args:
        values: the weight.
        bits: 2 to 8.
        axis: of the steps; None: one step.
        partition: over which processes, when these are one process's rows: steps are the whole's.

    >>> initial_step(torch.tensor([3.0, -1.0, 0.0]), bits=2)
    tensor([4.])
    """
    values = values.float()
    sums = torch.stack([_sum_rows(values.abs(), axis), _sum_rows((values != 0).float(), axis)])
    total, count = partition.all_reduce_sum(partition.widen(sums, axis))
    step = 2 * total / count.clamp(min=1) / math.sqrt(2 ** (bits - 1) - 1)
    return torch.where(step > torch.finfo(torch.float32).tiny, step, torch.ones_like(step))


def step_gradient(
    gradient: Tensor, values: Tensor, grid: AffineGrid, *, partition: Partition = UNSHARDED
) -> tuple[Tensor, Tensor]:
    """Gradients by the step and by the latent weight, from that by the visible weight.

    Equation 3 of the paper: by the step, a weight inside the range counts `round(v/s) - v/s`, one
    outside the bound it is clipped to. Equation 5: the latent weight gets nothing outside. The
    step's gradient is scaled by `1 / sqrt(N * qmax)`, N the weights of one step.

    Args:
        gradient: at the visible weight, of its shape.
        values: the latent weight.
        grid: the symmetric grid that it was projected to.
        partition: over which processes, when gradient and values are one process's rows.

    Returns:
        The step's gradient, of the scale's shape, and the mask of weights inside the range.

    >>> grid = AffineGrid(torch.tensor([1.0]), torch.tensor([0]), 2, True, None)
    >>> step_gradient(torch.ones(3), torch.tensor([0.75, 5.0, 0.0]), grid)
    (tensor([0.7217]), tensor([ True, False,  True]))
    """
    shape = [1] * values.dim()
    if grid.axis is not None:
        shape[grid.axis] = -1
    scale = partition.narrow(grid.scale, grid.axis).to(values.device)
    ratio = values.float() / scale.reshape(shape)
    inside = ratio.abs() <= grid.qmax
    slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(grid.qmin, grid.qmax))
    each = partition.numel(values) / grid.scale.numel()
    factor = 1 / math.sqrt(max(each, 1.0) * grid.qmax)
    sums = _sum_rows(gradient.float() * slope, grid.axis)
    return partition.all_reduce_sum(partition.widen(sums, grid.axis)) * factor, inside


class LearnedStepGrids:
    """A symmetric grid whose step is learned along with the weights.

    Args:
        bits: 2 to 8.
        axis: of the steps; None: one step.
        lr: relative change of the step at an update.
        partition: over which processes.

    >>> quantizer = LearnedStepGrids(bits=4, axis=None, lr=0.001)
    >>> quantizer.start(torch.tensor([0.5, -0.5]))
    >>> quantizer.grid(torch.zeros(2)).scale
    tensor([0.3780])
    """

    def __init__(
        self, *, bits: int, axis: int | None, lr: float, partition: Partition = UNSHARDED
    ) -> None:
        self.bits, self.axis, self.lr, self.partition = bits, axis, lr, partition
        self.learned: LearnedPositive | None = None
        self.frozen = False
        self._gradient: Tensor | None = None

    def start(self, values: Tensor) -> None:
        """Initialize the step size, unless an earlier fit learned one."""
        if self.learned is None:
            self.learned = LearnedPositive(self._first(values), self.lr)

    def _first(self, values: Tensor) -> Tensor:
        return initial_step(values, bits=self.bits, axis=self.axis, partition=self.partition)

    def grid(self, values: Tensor) -> AffineGrid:
        """Grid of the current step size."""
        learned = self.learned
        step = self._first(values) if learned is None else learned.value.to(values.device)
        zero = torch.zeros_like(step, dtype=torch.int32)
        return AffineGrid(step, zero, self.bits, True, self.axis)

    def gradient(self, gradient: Tensor, values: Tensor) -> None:
        """Keep the step's gradient; take the weight's away where it is clipped."""
        grid = self.grid(values)
        self._gradient, inside = step_gradient(gradient, values, grid, partition=self.partition)
        gradient.mul_(inside)

    def step(self, values: Tensor, *, event: bool) -> None:  # noqa: ARG002
        """Update the step size."""
        if self.learned is not None and self._gradient is not None and not self.frozen:
            self.learned.step(self._gradient)
        self._gradient = None

    def freeze(self, values: Tensor) -> None:  # noqa: ARG002
        """Keep the step."""
        self.frozen = True

    def thaw(self) -> None:
        """Learn again."""
        self.frozen = False

    def select(self, kept: Mapping[int, Tensor]) -> None:
        """Keep the step sizes of the remaining channels."""
        index = None if self.axis is None else kept.get(self.axis)
        if index is not None and self.learned is not None:
            self.learned.select(index)

    def state_dict(self) -> dict[str, Any]:
        """The step and its moments."""
        learned = None if self.learned is None else self.learned.state_dict()
        return {"learned": learned, "frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.frozen = state["frozen"]
        if state["learned"] is not None:
            self.learned = LearnedPositive(state["learned"]["value"], self.lr)
            self.learned.load_state_dict(state["learned"])
