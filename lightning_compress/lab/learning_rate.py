"""Learning rates that go down by a cosine, whatever the model and its optimizers."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["CosineAnnealing", "annealed"]


def annealed(done: float, last: float) -> float:
    """Factor of a learning rate at a fraction of the steps.

    Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, without restarts.

    >>> annealed(0.0, 0.01), annealed(1.0, 0.01)
    (1.0, 0.01)
    """
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2


class CosineAnnealing(Callback):
    """All learning rates of a run go down by a cosine, batch by batch.

    A rate begins at its group's `initial_lr`, as PyTorch's schedulers call it, which the
    optimizer's state keeps: a resumed run goes on as if it had not stopped.

    Args:
        last: fraction of the learning rate at the end.
        begin: fraction of the batches before which the learning rate stays as it is.
        flat: fraction of the batches, at the end, that it stays at its lowest.

    Raises:
        ValueError: for fractions that are none, or leave no batch for the cosine.

    >>> CosineAnnealing(last=0.01).factor(25, 100) > CosineAnnealing(last=0.01).factor(75, 100)
    True
    """

    def __init__(self, last: float = 0.01, *, begin: float = 0.0, flat: float = 0.0) -> None:
        if not 0 < last <= 1:
            raise ValueError(f"last={last!r}: expected a fraction of the learning rate in (0, 1]")
        for name, value in (("begin", begin), ("flat", flat)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value!r}: expected a fraction of the batches in [0, 1)")
        if not begin + flat < 1:
            raise ValueError(f"begin={begin!r} and flat={flat!r} leave no batch for the cosine")
        self.last, self.begin, self.flat = last, begin, flat

    def factor(self, batch: int, batches: float) -> float:
        """Of the learning rate at a batch of so many."""
        done = (batch / batches - self.begin) / (1 - self.begin - self.flat)
        return annealed(min(1.0, max(0.0, done)), self.last)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Set the learning rates of this batch."""
        loop = trainer.fit_loop
        epochs = trainer.max_epochs
        if epochs is None or epochs < 0:
            raise ValueError(
                f"max_epochs={epochs!r}: CosineAnnealing has to know the run's length: set it"
            )
        factor = self.factor(loop.epoch_loop.total_batch_idx, epochs * loop.max_batches)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
