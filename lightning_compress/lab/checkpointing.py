"""Atomic checkpointing: checkpoint IO for the Trainer, and a checkpoint after each epoch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_compress.callbacks.safeguards import _broken_weights
from lightning_compress.files import atomic_file, check_writable

__all__ = [
    "AtomicCheckpointIO",
    "EpochCheckpoint",
    "use_atomic_checkpoints",
]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes beside the final path, flushes to the disk, and renames.

    Lightning's own writes into the system's temporary folder and copies from there if that is
    another disk: a kill or a full disk then leaves half a checkpoint in place of the last one, and
    a leftover in the temporary folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AtomicCheckpointIO().save_checkpoint({"epoch": 3}, f"{folder}/last.ckpt")
    ...     AtomicCheckpointIO().load_checkpoint(f"{folder}/last.ckpt")
    {'epoch': 3}
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save a checkpoint; Lightning saves to remote addresses.

        Raises:
            OSError: naming the path, when it cannot be written; an older one stays as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # a full disk confuses torch's writer, but not a plain write
        torch.save(checkpoint, buffer)
        with atomic_file(Path(path), what="the checkpoint", parents=True) as stream:
            stream.write(buffer.getbuffer())


def use_atomic_checkpoints(trainer: Trainer) -> None:
    """Make a Trainer write checkpoints atomically, unless it has a checkpoint IO of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


class EpochCheckpoint(Checkpoint):
    """Callback that saves a checkpoint after each epoch and when training breaks.

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
        """Check that the folders can be written to, and make checkpoints atomic."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        use_atomic_checkpoints(trainer)
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

        The original error must reach the user: where saving fails too, or where a process that it
        needs is gone, only a warning is issued.
        """
        if not trainer.training or isinstance(exception, FloatingPointError):
            return
        if _broken_weights(pl_module):
            return
        try:
            trainer.save_checkpoint(self.broken)
        except (OSError, RuntimeError) as error:
            rank_zero_warn(f"{self.broken} could not be saved by all: {error}")
