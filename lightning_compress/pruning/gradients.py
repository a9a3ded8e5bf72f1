"""Criteria that look at gradients: Taylor, empirical Fisher, movement, Hutchinson.

The gradients are those that arrive at the weight, dense, before masks, clipping and unscaling:
one for each backward pass, so under accumulation one for each micro-batch. A gradient scaler's
factor is inside; it cancels in the ranking while it stays the same through a window. Gradients
that reach a generator in a discriminator's backward count too: detach its output there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_compress.projection import Slot
from lightning_compress.pruning.statistics import Gathering, over_processes

__all__ = ["Fisher", "GradientStatistics", "Hutchinson", "Movement", "Taylor"]

WHOLE_RUN = 1 << 62  # a window that is open from the first step on


class GradientStatistics(Gathering):
    """Base of the criteria that read every gradient of a weight through its slot's taps."""

    def _watch(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            tap = partial(self._tap, slot)
            slot.taps.append(tap)
            self._removers.append(partial(slot.taps.remove, tap))

    @torch.no_grad()
    def _tap(self, slot: Slot, gradient: Tensor) -> None:
        gradient = gradient.detach()
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        self._add(slot.path, self._amount(slot, gradient.float()))

    def _amount(self, slot: Slot, gradient: Tensor) -> Tensor:
        raise NotImplementedError


class Taylor(GradientStatistics):
    """Sum of |w * dL/dw| over the window: first order (Molchanov et al. 2019).

    https://arxiv.org/abs/1906.10771: what the loss would change by without the weight.

    >>> Taylor(window=5).window
    5
    """

    def __init__(self, *, window: int = 10) -> None:
        super().__init__(window=window)

    def _amount(self, slot: Slot, gradient: Tensor) -> Tensor:
        return (slot.values() * gradient).abs()

    def _score(self, slot: Slot, sums: Tensor, calls: int) -> Tensor:  # noqa: ARG002
        return sums


class Fisher(GradientStatistics):
    """w^2 / 2 * E[(dL/dw)^2]: Optimal Brain Damage with the empirical Fisher's diagonal.

    LeCun et al. 1990; the expectation is over the backward passes of the window, so it is of
    mini-batch gradients, not of single examples'.

    >>> Fisher().window
    10
    """

    def __init__(self, *, window: int = 10) -> None:
        super().__init__(window=window)

    def _amount(self, slot: Slot, gradient: Tensor) -> Tensor:  # noqa: ARG002
        return gradient.square()

    def _score(self, slot: Slot, sums: Tensor, calls: int) -> Tensor:
        return slot.values().square() * (sums / calls) / 2


class Movement(GradientStatistics):
    """Minus the sum of w * dL/dw over the run: low for weights that shrink (Sanh et al. 2020).

    https://arxiv.org/abs/2005.07683. The window is the whole run: `end` removes the taps but
    keeps the sums, and `begin` with the same weights goes on; `reset` frees them.

    >>> criterion = Movement()
    >>> criterion.begin([]), criterion.end(), criterion.reset()
    (None, None, None)
    """

    def __init__(self) -> None:
        super().__init__(window=WHOLE_RUN)

    def end(self) -> None:
        """Remove the taps; the sums belong to the run and wait for the next `begin`."""
        if self._sums:
            self._loaded = self.state_dict()
        super().end()

    def reset(self) -> None:
        """Remove the taps and forget the run."""
        super().end()
        self._loaded = None

    def _amount(self, slot: Slot, gradient: Tensor) -> Tensor:
        return -slot.values() * gradient

    def _score(self, slot: Slot, sums: Tensor, calls: int) -> Tensor:  # noqa: ARG002
        return sums


class Hutchinson:
    """w^2 / 2 * d2L/dw2: Optimal Brain Damage with Hutchinson's estimate of the diagonal.

    E[z * (H z)] over random signs z (Bekas et al. 2007) is the diagonal of the Hessian H. The
    gradient goes through the graph twice, which cuDNN's recurrent layers refuse. Scores of
    negative curvature are negative: such weights go first.

    Args:
        loss_fn: returns a loss tensor at the current weights, for a fixed batch say. It runs at
            every prune event; put the module in eval mode in it where a forward moves buffers.
        samples: random sign vectors an event.
        seed: of the signs, apart from the global random state.

    Raises:
        ValueError: when samples is not a whole number of 1 or more.

    >>> from torch import nn
    >>> from lightning_compress.targets import Target
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> slot = Slot(Target("weight", layer, "weight", layer.weight))
    >>> criterion = Hutchinson(lambda: (layer.weight ** 2 * torch.tensor([1.0, 3.0])).sum())
    >>> criterion.begin([slot])
    >>> criterion.scores(slot)
    tensor([[1., 3.]])
    """

    window = 0

    def __init__(self, loss_fn: Callable[[], Tensor], *, samples: int = 8, seed: int = 0) -> None:
        if not callable(loss_fn):
            raise ValueError(f"loss_fn={loss_fn!r} must be a callable that returns a loss tensor")
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples={samples!r} must be a whole number, 1 or more")
        self.loss_fn, self.samples, self.seed = loss_fn, samples, seed
        self._slots: list[Slot] = []
        self._diagonals: dict[str, Tensor] = {}

    def begin(self, slots: Sequence[Slot]) -> None:
        """Name the weights of the next event."""
        self._slots, self._diagonals = list(slots), {}

    def end(self) -> None:
        """Free the estimate."""
        self._slots, self._diagonals = [], {}

    def scores(self, slot: Slot) -> Tensor:
        """Predicted change of the loss without each weight; the lowest go first.

        Raises:
            RuntimeError: outside `begin` and `end`, or for a loss that no weight takes part in.
        """
        if slot not in self._slots:
            raise RuntimeError(f"Hutchinson has no begin() with {slot.path}")
        if not self._diagonals:
            self._estimate()
        return slot.values().square() * self._diagonals[slot.path] / 2

    def _estimate(self) -> None:
        taps = [slot.taps for slot in self._slots]
        devices = [d for d in {s.parameter.device for s in self._slots} if d.type == "cuda"]
        try:
            for slot in self._slots:
                slot.taps = []  # these gradients are no training step's
            with torch.enable_grad(), torch.random.fork_rng(devices=devices):
                diagonals = self._products()
        finally:
            for slot, mine in zip(self._slots, taps, strict=True):
                slot.taps = mine
        for slot, diagonal in zip(self._slots, diagonals, strict=True):
            self._diagonals[slot.path] = over_processes(diagonal / self.samples)

    def _products(self) -> list[Tensor]:
        weights = [slot.parameter for slot in self._slots]
        loss = self.loss_fn()
        if not loss.requires_grad:
            raise RuntimeError("the loss of Hutchinson depends on no weight: is it detached?")
        first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        sums = [torch.zeros_like(weight) for weight in weights]
        curved = [one for one in first if one.requires_grad]
        if not curved:  # a loss linear in all weights
            return sums
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.samples):
            signs = [_signs(weight, generator) for weight in weights]
            pairs = [(g * z).sum() for g, z in zip(first, signs, strict=True) if g.requires_grad]
            second = torch.autograd.grad(
                torch.stack(pairs).sum(), weights, retain_graph=True, materialize_grads=True
            )
            for total, z, product in zip(sums, signs, second, strict=True):
                total += z * product.detach()
        return sums


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.float32)
    return (2 * signs - 1).to(weight)
