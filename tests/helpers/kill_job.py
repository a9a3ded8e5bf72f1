"""What test_kill.py runs in a process that it kills: a pruned run that saves every epoch."""

import logging
import warnings
from pathlib import Path

import torch
from tiny import TinyAutoencoder, batches, quiet_trainer

from lightning_compress import GradualPruning, RandomState
from lightning_compress.callbacks import EpochCheckpoint

EPOCHS = 12


def train(folder: str) -> None:
    """Goes on from the last checkpoint, if there is one, and leaves `final.pt`."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(5)
    model = TinyAutoencoder()
    last = Path(folder) / "last.ckpt"
    callbacks = [
        GradualPruning(final_sparsity=0.8, end=0.9, criterion="taylor"),
        RandomState(),
        EpochCheckpoint(last, Path(folder) / "broken.ckpt"),
    ]
    trainer = quiet_trainer(folder, *callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(model, batches(count=16), ckpt_path=last if last.exists() else None)
    torch.save(model.state_dict(), Path(folder) / "final.pt")
