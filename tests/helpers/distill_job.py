"""Run by test_distillation_distributed.py: distills on some processes and saves what each has."""

import os
import sys
from pathlib import Path

import torch
from distilling import Student, TaughtGAN, make
from lightning.pytorch import Callback
from tiny import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_compress import KnowledgeDistillation, Pair


class Wide(Student):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.decoder = nn.Sequential(nn.Linear(8, 11), nn.Tanh(), nn.Linear(11, 6))


def main(folder: Path, kind: str, processes: int) -> None:
    torch.set_num_threads(1)
    pair = Pair("decoder", features=[("1", "1")])
    if kind == "gan":
        model, teacher, pair = make(TaughtGAN), make(TaughtGAN, seed=1), Pair("generator")
    else:
        model, teacher = make(Student, optimizer="SGD"), make(Wide, seed=1)
    balance = "gradient_norm" if kind == "balanced" else None
    kd = KnowledgeDistillation(teacher, pairs=[pair], weight=2.0, balance=balance)
    # Each of N processes takes every N-th row: together they see the batches of a single one.
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    data, rank = TensorDataset(rows), int(os.environ.get("LOCAL_RANK", "0"))
    sampler = DistributedSampler(data, processes, rank, shuffle=False)
    saved = {}

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            saved["adapters"] = {
                name: value.clone()
                for paired in kd.session.paired_modules
                for name, value in paired.adapters.state_dict().items()
            }
            saved["teacher_calls"] = [paired.teacher_calls for paired in kd.session.paired_modules]

    trainer = quiet_trainer(
        folder,
        kd,
        Look(),
        devices=processes,
        use_distributed_sampler=False,
        # A GAN's losses leave one network out each, which Lightning wants to be told.
        strategy="auto"
        if processes == 1
        else f"ddp{'_find_unused_parameters_true' * (kind == 'gan')}",
    )
    trainer.fit(model, DataLoader(data, batch_size=8 // processes, sampler=sampler))
    saved["model"] = model.state_dict()
    torch.save(saved, folder / f"{processes}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
