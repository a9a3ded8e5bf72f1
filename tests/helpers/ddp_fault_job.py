"""Run by test_distributed_faults.py: a fit on two processes of which one goes wrong."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from processes import leave
from tiny import TinyAutoencoder, quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import GradualPruning, QuantizationAwareTraining
from lightning_compress.callbacks import StopOnNonFinite


class Fault(Callback):
    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            if self.kind == "raise":
                raise RuntimeError("a fault of rank 1")
            if self.kind == "nan":
                with torch.no_grad():
                    module.decoder.weight[0, 0] = float("nan")


def main(folder, kind):
    torch.manual_seed(1)
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    rows = torch.randn(64 if kind != "uneven" or rank == 0 else 48, 6)
    callbacks = [
        GradualPruning(final_sparsity=0.5), QuantizationAwareTraining(), StopOnNonFinite(),
        Fault(kind),
    ]  # fmt: skip
    trainer = quiet_trainer(
        folder, *callbacks, devices=2, use_distributed_sampler=False, max_epochs=3,
        strategy="ddp_find_unused_parameters_true",
    )  # fmt: skip
    trainer.fit(TinyAutoencoder("SGD"), DataLoader(TensorDataset(rows), batch_size=8))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave()
