"""Progress: a bar on a terminal, plain lines where the output is a file or a pipe."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["PlainProgress", "progress_callback"]


class PlainProgress(Callback):
    """One line now and then: epoch, seconds, and the metrics of the epoch.

    Args:
        label: what is being trained.
        lines: about how many lines a run prints.
        stream: where to; None: standard output.

    >>> PlainProgress("dense", lines=5).lines
    5
    """

    def __init__(self, label: str, *, lines: int = 10, stream: TextIO | None = None) -> None:
        self.label, self.lines, self.stream = label, lines, stream
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Start the clock."""
        self._start = time.monotonic()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Print a line after the first, the last and every so many epochs."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        every = max(1, epochs // self.lines)
        if epoch % every and epoch not in (1, epochs):
            return
        shown = [f"{name} {float(value):.4g}" for name, value in trainer.callback_metrics.items()]
        seconds = time.monotonic() - self._start
        line = f"{self.label}: epoch {epoch}/{epochs}, {seconds:.0f} s, {', '.join(shown)}"
        print(line, file=self.stream or sys.stdout, flush=True)


def progress_callback(label: str) -> Callback:
    """A bar if standard output is a terminal, else plain lines.

    >>> type(progress_callback("dense")).__name__
    'PlainProgress'
    """
    return TQDMProgressBar() if sys.stdout.isatty() else PlainProgress(label)
