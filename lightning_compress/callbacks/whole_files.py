"""Checkpoints that are there as a whole or not at all, wherever the temporary folder lies."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_compress.files import atomic_file

__all__ = ["WholeCheckpoints", "write_whole_checkpoints"]


class WholeCheckpoints(TorchCheckpointIO):
    """Write a checkpoint beside its final place, flush it to the disk, and rename it.

    Lightning's own goes through the system's temporary folder and is copied from there if that is
    another disk: a kill or a full disk then leaves half a checkpoint in place of the last one, and
    a rest in the temporary folder that nothing removes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     WholeCheckpoints().save_checkpoint({"epoch": 3}, f"{folder}/last.ckpt")
    ...     WholeCheckpoints().load_checkpoint(f"{folder}/last.ckpt")
    {'epoch': 3}
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save it; an address that is no path of this machine is left to Lightning.

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


def write_whole_checkpoints(trainer: Trainer) -> None:
    """Have a Trainer write its checkpoints so, unless the user chose a way of their own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
