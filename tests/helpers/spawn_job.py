"""A fit in processes of its own: what the main process knows of it afterwards."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ArtifactCallback,
    GradualPruning,
    QuantizationAwareTraining,
    compression_state,
    restore_compression,
    save_compressed,
    sparsity,
)


class Deeper(TinyAutoencoder):
    """Three layers, and a score that tells whether activations are rounded."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())

    def validation_step(self, batch, _):
        self.log("val/loss", (self(batch[0]) - batch[0]).square().mean())


def main(folder: Path, strategy: str, processes: int) -> None:
    """Train, and save what is known here."""
    seed_everything(0, verbose=False)
    model, pruning = Deeper(), GradualPruning(final_sparsity=0.75, end=0.5)
    rounding = QuantizationAwareTraining(weight_bits=4, activation_bits=4, freeze=0.6)
    artifact = ArtifactCallback(folder / f"{strategy}.lcz")
    saver = ModelCheckpoint(folder, save_last=True)
    trainer = quiet_trainer(
        folder,
        *(pruning, rounding, artifact, saver),
        strategy=strategy,
        devices=processes,
        enable_checkpointing=True,
    )
    trainer.fit(model, batches(), batches(seed=1))
    inside = trainer.callback_metrics["val/loss"].item()
    live = save_compressed(model, folder / f"{strategy}-main.lcz")
    found = {
        "file": (artifact.info.bytes, live.bytes),
        "sparsity": (pruning.sparsity, sparsity(model)),
        "state": str(compression_state(model)),
        "saved": str(compression_state(restore_compression(Deeper(), folder / "last.ckpt"))),
        "flags": (rounding.frozen, len(rounding.coverage), len(rounding.activation_coverage)),
        "inside": inside,
    }
    if processes == 1:
        (after,) = trainer.validate(model, batches(seed=1), verbose=False)
        found["after"] = after["val/loss"]
    torch.save(found, folder / f"{strategy}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
