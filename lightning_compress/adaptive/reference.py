"""What a metric is compared with: a dense model's value, or its curve. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from lightning_compress.adaptive.readings import estimated_spread, recent

__all__ = ["DENSE", "Reference"]

DENSE = "dense"


class Reference:
    """A dense model's metric, as a cost of which less is better.

    Args:
        given: a number, "dense" for a curve that `take` brings, or None to measure it.
        mode: "min" or "max": which way the metric is better.
        spread: standard deviation of one reading; None: estimated.

    Raises:
        ValueError: for another word, or another mode.

    >>> reference = Reference(2.0, "max")
    >>> reference.fix([], patience=4)
    >>> reference.worse(reference.cost(1.5), after=0)
    0.25
    """

    def __init__(self, given: float | str | None, mode: str, spread: float | None = None) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: valid are ['min', 'max']")
        if isinstance(given, str) and given != DENSE:
            raise ValueError(f"reference={given!r}: give a number, {DENSE!r} or None")
        self.given, self.mode, self._spread = given, mode, spread
        self.curve: list[tuple[float, float]] = []
        self.dense = self.spread = 0.0

    @property
    def waits(self) -> bool:
        """Whether a curve was announced that has not come."""
        return self.given == DENSE and not self.curve

    def cost(self, value: float) -> float:
        """The metric's value as a cost, or a cost as its value; what is not finite is infinite."""
        if not math.isfinite(value):
            return math.inf
        return value if self.mode == "min" else -value

    def take(self, pairs: Iterable[tuple[float, float]]) -> None:
        """Take a dense run's curve, `(batches seen, value)`."""
        self.curve = [(float(at), self.cost(value)) for at, value in sorted(pairs)]

    def fix(self, readings: Sequence[float], *, patience: int) -> None:
        """Settle it when a search begins.

        Args:
            readings: costs until then.
            patience: of them that count, and of these the later half.
        """
        before = [cost for _, cost in self.curve] or list(readings)
        if self.curve or self.given is None or isinstance(self.given, str):
            self.dense = recent(before[-patience:])
        else:
            self.dense = self.cost(float(self.given))
        self.spread = estimated_spread(before) if self._spread is None else self._spread

    @property
    def scale(self) -> float:
        """What fractions are of."""
        return abs(self.dense) or 1.0

    def worse(self, cost: float, after: float) -> float:
        """How much worse a cost is than the dense model's after as many batches: a fraction."""
        dense = self.dense
        if self.curve:
            batches, costs = zip(*self.curve, strict=True)
            dense = float(np.interp(after, batches, costs))
        return (cost - dense) / self.scale
