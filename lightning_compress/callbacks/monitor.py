"""ScoreMonitor: a quality score every few epochs, logged beside the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["ScoreMonitor"]


class ScoreMonitor(Callback):
    """Log what a function says of the model after every few validation epochs.

    The function sees the model in eval mode, without gradients, and with a random stream of its
    own, so that watching a run does not change it.

    Args:
        score: from the LightningModule to named numbers.
        every: epochs between two scores, 1 or more.

    Raises:
        ValueError: for `every` below 1.

    >>> ScoreMonitor(lambda model: {"val/answer": 42.0}, every=5).every
    5
    """

    def __init__(
        self, score: Callable[[LightningModule], Mapping[str, float]], *, every: int = 1
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every!r} must be 1 or more epochs")
        self.score, self.every = score, every

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score and log."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.sanity_checking or ((trainer.current_epoch + 1) % self.every and not last):
            return
        training = pl_module.training
        pl_module.eval()
        with torch.random.fork_rng(), torch.no_grad():
            for name, value in self.score(pl_module).items():
                pl_module.log(name, value, on_epoch=True, batch_size=1)
        pl_module.train(training)
