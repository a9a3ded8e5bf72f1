"""Schedules: from a step, or a fraction of the run, to a value. Pure numbers, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Constant", "Cosine", "Linear", "Polynomial", "Schedule", "Staircase", "check_window"]


def check_window(begin: float, end: float) -> bool:
    """Check a window and tell its unit: True for fractions of the run, False for steps.

    Whole numbers count optimizer steps, floats in [0, 1] are fractions of the run; 0 fits both.

    Raises:
        ValueError: when begin >= end, a bound is negative, a fraction exceeds 1, or the two
            bounds are of different units.

    >>> check_window(0.0, 0.7), check_window(0, 1000)
    (True, False)
    """
    for name, bound in (("begin", begin), ("end", end)):
        whole = isinstance(bound, int) and not isinstance(bound, bool)
        if not whole and not isinstance(bound, float):
            raise ValueError(f"{name}={bound!r}: give an int (steps) or a float in [0, 1]")
        if not bound >= 0 or (not whole and bound > 1):
            raise ValueError(f"{name}={bound!r}: steps are >= 0, fractions lie in [0, 1]")
    if begin >= end:
        raise ValueError(f"begin={begin!r} must be smaller than end={end!r}")
    if begin != 0 and isinstance(begin, float) != isinstance(end, float):
        raise ValueError(
            f"begin={begin!r} and end={end!r} mix steps (int) with fractions of the run (float)"
        )
    return isinstance(end, float)


def _check_sparsity(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: a sparsity lies in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value that goes from `initial_sparsity` at `begin` to `final_sparsity` at `end`.

    Called with a step or a fraction of the run, whichever `begin` and `end` are given in; before
    `begin` the value is 0, after `end` it stays final.

    Raises:
        ValueError: for a sparsity outside [0, 1) or an empty window.
    """

    final_sparsity: float = 0.9
    initial_sparsity: float = 0.0
    begin: float = 0.0
    end: float = 0.7

    def __post_init__(self) -> None:
        _check_sparsity("final_sparsity", self.final_sparsity)
        _check_sparsity("initial_sparsity", self.initial_sparsity)
        check_window(self.begin, self.end)

    def _shape(self, position: float) -> float:
        """How much of the way is done at a position in [0, 1]: from 0 to 1."""
        raise NotImplementedError

    def __call__(self, step: float) -> float:
        """The value at a step, or at a fraction of the run."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return float(self.final_sparsity)
        position = (step - self.begin) / (self.end - self.begin)
        span = self.final_sparsity - self.initial_sparsity
        return self.initial_sparsity + span * self._shape(position)


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The final value at once, from `begin` on (one-shot pruning).

    >>> schedule = Constant(final_sparsity=0.5, begin=0.2)
    >>> schedule(0.1), schedule(0.2)
    (0.0, 0.5)
    """

    def _shape(self, position: float) -> float:  # noqa: ARG002 - the same everywhere
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line.

    >>> Linear(final_sparsity=0.8, begin=0, end=100)(50)
    0.4
    """

    def _shape(self, position: float) -> float:
        return position


@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    """Fast at first, then slower: `1 - (1 - t)^power`, cubic in Zhu & Gupta, arXiv:1710.01878.

    Raises:
        ValueError: for a power that is not above 0.

    >>> Polynomial(final_sparsity=0.8, begin=0, end=100)(50)
    0.7000000000000001
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power={self.power!r} must be above 0")

    def _shape(self, position: float) -> float:
        return 1.0 - (1.0 - position) ** self.power


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Slow at both ends: `(1 - cos(pi t)) / 2`.

    >>> round(Cosine(final_sparsity=0.8, begin=0, end=100)(50), 6)
    0.4
    """

    def _shape(self, position: float) -> float:
        return (1.0 - math.cos(math.pi * position)) / 2.0


@dataclass(frozen=True, kw_only=True)
class Staircase(Schedule):
    """Equal jumps: the first of `stairs` at `begin`, the last one at `end`.

    Raises:
        ValueError: for fewer than 2 stairs.

    >>> schedule = Staircase(final_sparsity=0.8, begin=0, end=100, stairs=5)
    >>> schedule(0), schedule(49), schedule(50), schedule(100)
    (0.0, 0.2, 0.4, 0.8)
    """

    stairs: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stairs < 2:
            raise ValueError(f"stairs={self.stairs!r} must be 2 or more")

    def _shape(self, position: float) -> float:
        return math.floor(position * (self.stairs - 1)) / (self.stairs - 1)
