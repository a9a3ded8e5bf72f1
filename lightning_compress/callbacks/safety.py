"""Callbacks for runs that break: where they broke, what is saved, and that resuming is exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

__all__ = ["EpochCheckpoint", "RandomState", "StopOnNonFinite"]


class StopOnNonFinite(Callback):
    """Raise when a logged value is NaN or infinite, before more steps spread it.

    >>> StopOnNonFinite().check({"train/loss": torch.tensor(1.0)}, step=3)
    """

    def check(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Check named values.

        Raises:
            FloatingPointError: for a value that is not finite; names it, its value and the step.
        """
        for name, value in metrics.items():
            if isinstance(value, Tensor) and not torch.isfinite(value).all():
                raise FloatingPointError(
                    f"{name} is {value.tolist()} at step {step}: training has diverged. Lower the "
                    "learning rate or the sparsity, start pruning later, or look at the data"
                )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Check what the step returned and what was logged."""
        found = {**trainer.callback_metrics}
        if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
            found["loss"] = outputs["loss"]
        self.check(found, step=trainer.global_step)


class RandomState(Callback):
    """Carry torch's CPU random stream in checkpoints, so that a resumed run draws the same noise.

    >>> list(RandomState().state_dict())
    ['torch']
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The stream as it is now."""
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the stream until training starts."""
        self._loaded = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Forget what validate or test may have left here."""
        self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Set the stream: after the sanity check, which draws too."""
        if self._loaded is not None:
            torch.set_rng_state(self._loaded["torch"])
            self._loaded = None


class EpochCheckpoint(Checkpoint):
    """Save a checkpoint after each epoch and when training breaks; nothing is loaded from them.

    Lightning runs subclasses of its Checkpoint after all other callbacks, so that the state of
    each is in the file.

    Args:
        last: the file of the last whole epoch, replaced atomically.
        broken: the file for the middle of an epoch, after Ctrl-C or an error.

    >>> EpochCheckpoint(Path("last.ckpt"), Path("interrupted.ckpt")).last.name
    'last.ckpt'
    """

    def __init__(self, last: Path, broken: Path) -> None:
        self.last, self.broken = last, broken

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save the epoch."""
        trainer.save_checkpoint(self.last)

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        exception: BaseException,
    ) -> None:
        """Save, if training had begun and its numbers are sound."""
        if trainer.training and not isinstance(exception, FloatingPointError):
            trainer.save_checkpoint(self.broken)
