"""Positive numbers that learn by their gradients: step sizes, clip values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Adam", "LearnedPositive"]


class Adam:
    """Adam's direction for a small tensor that is no parameter of the module.

    Kingma & Ba 2015, arXiv:1412.6980; betas 0.9 and 0.999. It does not depend on the scale of the
    gradients, which a loss scaler may have changed.

    >>> adam = Adam()
    >>> adam.direction(torch.tensor([3.0, -0.1]))
    tensor([ 1.0000, -1.0000])
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.square: Tensor | None = None

    def direction(self, gradient: Tensor) -> Tensor:
        """Take in a gradient; what to go against, of size about 1."""
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.count += 1
        self.mean = self.mean.lerp(gradient, 0.1)
        self.square = self.square.lerp(gradient.square(), 0.001)
        mean = self.mean / (1 - 0.9**self.count)
        square = self.square / (1 - 0.999**self.count)
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
        """Put them back."""
        self.count, self.mean, self.square = state["count"], state["mean"], state["square"]


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
        if not bool(torch.isfinite(gradient).all()):
            return
        gradient = gradient.to(self.value.device, torch.float32)
        against = self._adam.direction(gradient * self.value)
        self.value = self.value * torch.exp(-self.lr * against)

    def select(self, index: Tensor) -> None:
        """Keep some of the numbers."""
        self.value = self.value[index.to(self.value.device)]
        self._adam.select(index)

    def state_dict(self) -> dict[str, Any]:
        """Value and moments."""
        return {"value": self.value, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self.value = state["value"]
        self._adam.load_state_dict(state["adam"])
