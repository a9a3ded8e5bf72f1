"""Grids whose step a Lagrange multiplier finds: predicted bits against the model's own loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_compress.grids import AffineGrid, grid_step
from lightning_compress.quantization.learned_step import LearnedPositive, double_of
from lightning_compress.sharding import UNSHARDED, Partition

__all__ = ["RateDistortionGrids", "RateTable", "Settling", "octave_steps"]

_FIRST = 0.4  # of the first step, in units of the rms of the non-zero weights
_BLOCKS = 4  # of a large weight; each update looks at one of them
_LARGE = 1 << 16  # weights, from which on an update looks at a block
_MEMORY = 0.5  # of the counts, from one look to the next
_PARTS = 16  # of an octave
_WINDOW = 0.25  # of the updates in which a step can change by a factor of e
_LONGEST = 8  # windows after which bytes that still change count as settled
_STILL = 0.03  # relative change of bytes over a window, below which they are settled


def octave_steps(value: Tensor) -> Tensor:
    """The nearest steps `2^(k/16)`, so that a file needs a byte or less for each.

    Args:
        value: above 0.

    Returns:
        float32 of its shape: one of 16 mantissas times a power of two, the same on any device.

    >>> octave_steps(torch.tensor([1.0, 1.03, 3.0]))
    tensor([1.0000, 1.0443, 2.9537])
    """
    k = torch.round(value.float().log2() * _PARTS).to(torch.int64)
    mantissas = torch.tensor([2 ** (i / _PARTS) for i in range(_PARTS)], device=value.device)
    exponent = torch.div(k, _PARTS, rounding_mode="floor")
    return torch.ldexp(mantissas[k - exponent * _PARTS], exponent.clamp(-125, 125))


class RateTable:
    """Code lengths of one weight's symbols, and their slope at latent values between them.

    A weight of `v` steps under uniform noise, `v + u` with u in (-1/2, 1/2), costs
    `R(v) = E[L(v + u)]` bits (Ballé et al. 2017, arXiv:1611.01704; of weights Oktay et al. 2020,
    arXiv:1906.06624, equation 6). With code lengths L that are linear between whole symbols its
    derivative needs no noise: `R'(v) = L(v + 1/2) - L(v - 1/2)`, which at `v = q + r`, q whole and
    r in [-1/2, 1/2], is `(L(q+1) - L(q-1)) / 2 + r * (L(q+1) - 2 L(q) + L(q-1))`.
    L are the lengths of a histogram of |q|, never falling with |q|, which decays from look to look.

    Args:
        most: largest |q|.

    >>> table = RateTable(most=3)
    >>> table.look(torch.tensor([8.0, 4.0, 2.0, 0.0]))
    >>> table.slope(torch.tensor([0.0, 0.5, 1.0, -1.0])).round(decimals=2)
    tensor([ 0.0000,  1.9200,  1.3800, -1.3800])
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.counts: Tensor | None = None
        self._made: tuple[Tensor, Tensor] | None = None

    def look(self, counts: Tensor) -> None:
        """Take in how often each |q| from 0 to `most` occurs."""
        counts = counts.float()
        before = self.counts
        self.counts = counts if before is None else counts + _MEMORY * before.to(counts.device)
        self._made = None

    def lengths(self) -> Tensor:
        """Bits of |q| = 0, 1, ..., `most`, of either sign."""
        assert self.counts is not None
        counts = self.counts + 0.5
        either = torch.full_like(counts, 2.0)
        either[0] = 1.0
        lengths = (counts.sum() / (counts / either)).log2()
        return lengths.cummax(0).values

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """First and second central differences of the lengths, of q from -most to most."""
        if self._made is None or self._made[0].device != device:
            half = self.lengths().to(device)
            all_q = torch.cat([half.flip(0), half[1:]])
            padded = torch.cat([all_q[:1], all_q, all_q[-1:]])  # nothing is known further out
            left, right = all_q - padded[:-2], padded[2:] - all_q
            self._made = (left + right) / 2, right - left
        return self._made

    def slope(self, ratio: Tensor, whole: Tensor | None = None) -> Tensor:
        """Bits that one more step of each latent value would cost.

        Args:
            ratio: latent values in steps.
            whole: the same rounded, within the grid.
        """
        if whole is None:
            whole = ratio.round().clamp(-self.most, self.most)
        first, second = self._tables(ratio.device)
        index = (whole + self.most).to(torch.int32).reshape(-1)
        slope = second.index_select(0, index).reshape(ratio.shape)
        slope.mul_(ratio - whole)
        return slope.add_(first.index_select(0, index).reshape(ratio.shape))

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self.counts, self._made = state["counts"], None


class RateDistortionGrids:
    """A symmetric grid whose step trains under `loss + lmbda * (mean bits of a weight)`.

    The step follows the loss straight through the rounding (LSQ, arXiv:1902.08153, equation 3)
    and the rate through `RateTable`; the weight's gradient gets the rate's where it is read, so
    the user's loss stays as it is (Oktay et al. 2020, arXiv:1906.06624, equation 4; a step for
    each tensor, found by rate and distortion: Wiedemann et al. 2019, arXiv:1907.11900).
    With s the step, v = w / s, q = round(v), g the loss's gradient by the visible weight:
    `d/dw = g + weight * R'(v) / s`, `d/dlog s = sum(g * s * (q - v)) - weight * sum(R'(v) * v)`.
    An update of a large weight reads one of four blocks in turn, and counts it four times.

    Args:
        bits: 2 to 8; what reaches beyond raises the step at the next event.
        axis: of the steps; None: one step.
        lr: relative change of a step at an update.
        partition: over which processes.

    >>> quantizer = RateDistortionGrids(bits=8, axis=None, lr=0.005)
    >>> quantizer.start(torch.tensor([3.0, 0.0, 0.0, -3.0]))
    >>> quantizer.grid(torch.zeros(4)).scale
    tensor([1.1892])
    """

    def __init__(
        self, *, bits: int, axis: int | None, lr: float, partition: Partition = UNSHARDED
    ) -> None:
        self.bits, self.axis, self.lr, self.partition = bits, axis, lr, partition
        self.weight = 0.0  # of one bit in the loss
        self.learned: LearnedPositive | None = None
        self.table = RateTable(2 ** (bits - 1) - 1)
        self.frozen = False
        self._turn = 0
        self._made: AffineGrid | None = None  # of `_made_of`
        self._made_of: Tensor | None = None
        self._gradient: Tensor | None = None  # by the logarithm of the step

    def _summed(self, values: Tensor) -> Tensor:
        """Sums along all axes but that of the steps, of the whole weight."""
        return self._everywhere(self._sums(values))

    def _sums(self, values: Tensor) -> Tensor:
        if self.axis is None:
            return values.sum().reshape(1)
        return values.sum(dim=[dim for dim in range(values.dim()) if dim != self.axis])

    def _everywhere(self, sums: Tensor) -> Tensor:
        return self.partition.all_reduce_sum(self.partition.widen(sums, self.axis))

    def start(self, values: Tensor) -> None:
        """Take the first step, unless an earlier fit found one."""
        if self.learned is None:
            self.learned = LearnedPositive(self._first(values), self.lr)

    def _first(self, values: Tensor) -> Tensor:
        """A part of the rms; of channels the geometric mean of theirs and the whole weight's."""
        square, count = self._summed(values.float().square()), self._summed((values != 0).float())
        rms = (square / count.clamp(min=1)).sqrt()
        everywhere = (square.sum() / count.sum().clamp(min=1)).sqrt()
        found = _FIRST * (rms * everywhere).sqrt()
        return torch.where(found > 1e-30, found, torch.ones_like(found))

    def grid(self, values: Tensor) -> AffineGrid:
        """The grid of the step of now, in sixteenths of an octave."""
        if self.learned is None:
            return self._grid_of(self._first(values))
        if self._made is None or self._made_of is not self.learned.value:
            self._made_of = self.learned.value
            self._made = self._grid_of(self.learned.value.to(values.device))
        return self._made

    def _grid_of(self, step: Tensor) -> AffineGrid:
        scale = octave_steps(step)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return AffineGrid(scale, zero, self.bits, True, self.axis)

    def gradient(self, gradient: Tensor, values: Tensor) -> None:
        """Add the rate's gradient to the weight's, and keep the step's."""
        if self.learned is None or (self.weight == 0 and self.frozen):
            return
        grid = self.grid(values)
        here = replace(grid, scale=self.partition.narrow(grid.scale, self.axis))
        gradient, values, blocks = self._block(gradient, values)
        self._look(here, values)
        moved = [
            self._add(piece, place, here, blocks) for piece, place in here.pieces(values, gradient)
        ]
        if not self.frozen:
            self._gradient = self._everywhere(torch.stack(moved).sum(0)) * blocks

    def _add(self, values: Tensor, gradient: Tensor, grid: AffineGrid, blocks: int) -> Tensor:
        """Add the rate's gradient to some weights' own; return the sums of their step's."""
        scale = grid_step(grid, values)
        ratio = values.float() / scale
        whole = ratio.round().clamp_(grid.qmin, grid.qmax)
        slope = self.table.slope(ratio, whole)
        moved = whole.sub_(ratio).mul_(gradient).mul_(scale)
        moved.addcmul_(slope, ratio, value=-self.weight)
        slope.div_(scale)
        gradient.add_(slope.to(gradient.dtype), alpha=self.weight * blocks)
        return self._sums(moved)

    def _block(self, gradient: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
        """What this update looks at, and how many times it counts."""
        small = self.partition.numel(values) < _LARGE
        if small or self.axis is not None or not gradient.is_contiguous():
            return gradient, values, 1
        turn, self._turn = self._turn, (self._turn + 1) % _BLOCKS
        width = -(-values.numel() // _BLOCKS)
        part = slice(turn * width, (turn + 1) * width)
        return gradient.view(-1)[part], values.reshape(-1)[part], _BLOCKS

    def _look(self, grid: AffineGrid, values: Tensor) -> None:
        counts = grid.count(values)
        below, zero, above = counts.tensor_split((len(counts) // 2, len(counts) // 2 + 1))
        sizes = torch.cat([zero, below.flip(0) + above])[: self.table.most + 1]
        self.table.look(self.partition.all_reduce_sum(sizes))

    def step(self, values: Tensor, *, event: bool) -> None:
        """Update the step; at an event see to it that its range holds the weight."""
        if self.learned is None or self.frozen:
            return
        if self._gradient is not None:
            value = self.learned.value.to(self._gradient.device)
            self.learned.step(self._gradient / value)
        self._gradient = None
        if event:
            self._reach(values)

    def _reach(self, values: Tensor) -> None:
        assert self.learned is not None
        wide, zero = double_of(values), values.new_zeros(())
        largest = torch.stack(values.aminmax()).abs().amax() if values.numel() else zero
        largest = self.partition.all_gather(largest.to(wide).reshape(1)).amax()
        least = (largest / self.table.most).to(self.learned.value)
        if self.axis is None:
            self.learned.value = torch.maximum(self.learned.value, least.reshape(1))

    def freeze(self, values: Tensor) -> None:
        """Keep the step."""
        if self.learned is not None:
            self._reach(values)
        self.frozen, self._gradient = True, None

    def thaw(self) -> None:
        """Let the step train again."""
        self.frozen = False

    def select(self, kept: Mapping[int, Tensor]) -> None:
        """Keep the steps of what stays."""
        index = None if self.axis is None else kept.get(self.axis)
        self._gradient = None
        if index is not None and self.learned is not None:
            self.learned.select(index)

    def state_dict(self) -> dict[str, Any]:
        """The step, its moments, the counts, and whose turn it is."""
        return {
            "learned": None if self.learned is None else self.learned.state_dict(),
            "table": self.table.state_dict(),
            "frozen": self.frozen,
            "weight": self.weight,
            "turn": self._turn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self.frozen, self.weight, self._turn = state["frozen"], state["weight"], state["turn"]
        self.table.load_state_dict(state["table"])
        if state["learned"] is not None:
            self.learned = LearnedPositive(state["learned"]["value"], self.lr)
            self.learned.load_state_dict(state["learned"])


class Settling:
    """Whether bytes have followed a change of lambda, which acts as weights train on.

    Args:
        lr: relative change of a step at an update: a quarter of `1 / lr` updates is the window
            over which bytes are compared.

    >>> settling = Settling(lr=0.05)  # a window of 5 updates
    >>> for step, size in [(0, 900.0), (5, 700.0), (10, 610.0), (15, 600.0)]:
    ...     settling.read(step, size)
    ...     print(settling.settled)
    False
    False
    False
    True
    """

    def __init__(self, lr: float) -> None:
        self.window = _WINDOW / lr
        self.restart()

    def restart(self) -> None:
        """Forget what was read: lambda has changed."""
        self.readings: list[tuple[int, float]] = []  # step of the optimizer, bytes

    def read(self, step: int, size: float) -> None:
        """Take in the bytes after a step."""
        self.readings.append((step, size))

    @property
    def settled(self) -> bool:
        """Whether they changed little over the last window, or there were many windows."""
        if not self.readings:
            return False
        (first, _), (last, now) = self.readings[0], self.readings[-1]
        if last - first >= _LONGEST * self.window:
            return True
        before = [size for step, size in self.readings if step <= last - self.window]
        return bool(before) and abs(math.log(max(now, 1.0) / max(before[-1], 1.0))) < _STILL
