"""History: the numbers of a run over time, carried through checkpoints."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["History"]


class History(Callback):
    """Keep every logged metric once an epoch, as rows `(batches seen, metric, value)`.

    >>> History().rows
    []
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Add what is known at the end of the epoch."""
        batches = trainer.fit_loop.total_batch_idx + 1
        for name, value in sorted(trainer.callback_metrics.items()):
            if math.isfinite(number := float(value)):
                self.rows.append((batches, name, number))

    def state_dict(self) -> dict[str, Any]:
        """All rows so far."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the rows of a checkpoint."""
        self.rows = [tuple(row) for row in state_dict["rows"]]
