"""Callbacks for runs that break: where they broke, what is saved, and that resuming is exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.callbacks.whole_files import write_whole_checkpoints
from lightning_compress.files import check_writable
from lightning_compress.sharding import local_part

__all__ = ["EpochCheckpoint", "RandomState", "StopOnNonFinite"]

SHOWN = 3  # names of broken weights in an error


_ADVICE = (
    "training has diverged. Lower the learning rate or the sparsity, start pruning later, or look "
    "at the data"
)


class StopOnNonFinite(Callback):
    """Raise when a logged value or a weight is NaN or infinite, before a checkpoint holds it.

    Values are checked after each batch, weights after each epoch.

    >>> StopOnNonFinite().check({"train/loss": torch.tensor(1.0)}, step=3)
    """

    def check(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Check named values.

        Raises:
            FloatingPointError: for a value that is not finite; names it, its value and the step.
        """
        for name, value in metrics.items():
            if isinstance(value, Tensor) and not torch.isfinite(value).all():
                raise FloatingPointError(f"{name} is {value.tolist()} at step {step}: {_ADVICE}")

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

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights: the last loss does not know its own step, and some models log none.

        Raises:
            FloatingPointError: naming the weights that are not finite.
        """
        broken = _broken_weights(pl_module)
        if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            shown = ", ".join(broken[:SHOWN]) or "those of another process"
            more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
            raise FloatingPointError(
                f"weights that are NaN or infinite after epoch {trainer.current_epoch}, step "
                f"{trainer.global_step}: {shown}{more}; {_ADVICE}"
            )


def _broken_weights(module: nn.Module) -> list[str]:
    return [
        name
        for name, weight in module.named_parameters()
        if not torch.isfinite(local_part(weight.detach())).all()
    ]


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

    Raises:
        OSError: in `setup`, when nothing can be written there: before the training, not after it.

    >>> EpochCheckpoint(Path("last.ckpt"), Path("interrupted.ckpt")).last.name
    'last.ckpt'
    """

    def __init__(self, last: Path, broken: Path) -> None:
        self.last, self.broken = last, broken

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Look whether the folders can be written to; have checkpoints replaced as a whole."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        write_whole_checkpoints(trainer)
        for folder in {self.last.parent, self.broken.parent}:
            check_writable(folder)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save the epoch."""
        trainer.save_checkpoint(self.last)

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        exception: BaseException,
    ) -> None:
        """Save, if training had begun and its numbers are sound.

        What ended the training is what the user must see: where saving fails too, or where a
        process that it takes is gone, a warning says so.
        """
        if not trainer.training or isinstance(exception, FloatingPointError):
            return
        if _broken_weights(pl_module):
            return
        try:
            trainer.save_checkpoint(self.broken)
        except (OSError, RuntimeError) as error:
            rank_zero_warn(f"{self.broken} could not be saved by all: {error}")
