"""How strong a distillation loss is: schedules of its weight, and balance against the user's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.schedules import check_window

__all__ = ["Ramp", "check_weight", "gradient_norm", "in_fractions", "weight_at"]

SHAPES = ("linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A weight that goes from `initial` at `begin` to `final` at `end`: up, or annealed down.

    Args:
        initial: the value up to `begin`.
        final: the value from `end` on.
        begin: int: steps of the optimizer that owns the student; float: fraction of the run.
        end: in the same unit.
        shape: "linear" or "cosine".

    Raises:
        ValueError: for an empty window, mixed units, a negative weight, or another shape.

    >>> ramp = Ramp(initial=1.0, final=0.0, begin=0, end=10)
    >>> ramp(0), ramp(5), ramp(10), ramp(99)
    (1.0, 0.5, 0.0, 0.0)
    """

    initial: float = 0.0
    final: float = 1.0
    begin: float = 0.0
    end: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_window(self.begin, self.end)
        check_weight("initial", self.initial)
        check_weight("final", self.final)
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r}: valid are {list(SHAPES)}")

    def __call__(self, position: float) -> float:
        """The weight at a step, or at a fraction of the run."""
        share = (position - self.begin) / (self.end - self.begin)
        share = min(max(share, 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.initial + (self.final - self.initial) * share


Weight = float | Callable[[float], float]


def check_weight(name: str, value: object) -> None:
    """Check a weight.

    Raises:
        ValueError: for a negative or non-finite number, or what is neither number nor callable.
    """
    if callable(value):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r}: give a number of at least 0, or a schedule")


def in_fractions(weight: Weight) -> bool:
    """Whether a schedule's `begin` and `end` are fractions of the run; others count steps."""
    begin, end = getattr(weight, "begin", None), getattr(weight, "end", None)
    return begin is not None and end is not None and check_window(begin, end)


def weight_at(weight: Weight, *, step: int, fraction: float) -> float:
    """A weight at a position: at a step of the student's optimizer, at a fraction of the run.

    >>> weight_at(2.0, step=3, fraction=0.1), weight_at(Ramp(end=10), step=3, fraction=0.1)
    (2.0, 0.3)
    """
    if not callable(weight):
        return float(weight)
    return float(weight(fraction if in_fractions(weight) else step))


def gradient_norm(gradients: list[Tensor | None]) -> Tensor:
    """Norm of several gradients together, in float32; over all processes where there are some."""
    found = [one.float().square().sum() for one in gradients if one is not None]
    total = torch.stack(found).sum() if found else torch.zeros(())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total.sqrt()
