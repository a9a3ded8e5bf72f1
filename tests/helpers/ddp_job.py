"""Run by test_distributed.py: trains pruned models on some processes and saves what each has."""

import os
import sys
from pathlib import Path

import torch
from tiny import TinyAutoencoder, TinyGAN, quiet_trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_compress import GradualPruning


def fit(folder: Path, kind: str, processes: int) -> None:
    torch.manual_seed(1)
    model = TinyGAN() if kind == "gan" else TinyAutoencoder("SGD")
    if kind == "plain":  # BatchNorm would see half a batch in each process
        model.encoder[1] = torch.nn.Identity()
    # Each of N processes takes every N-th row: together they see the batches of a single one.
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    data, rank = TensorDataset(rows), int(os.environ.get("LOCAL_RANK", "0"))
    sampler = DistributedSampler(data, processes, rank, shuffle=False)
    loader = DataLoader(data, batch_size=8 // processes, sampler=sampler)
    pruning = GradualPruning(final_sparsity=0.8, regrow="gradient" if kind == "plain" else None)
    trainer = quiet_trainer(
        folder,
        pruning,
        devices=processes,
        use_distributed_sampler=False,  # Lightning's own shuffles
        # A GAN's losses leave one network out each, which Lightning wants to be told.
        strategy="auto" if processes == 1 else "ddp_find_unused_parameters_true",
    )
    trainer.fit(model, loader)
    masks = {slot.path: slot.pruned for slot in pruning.slots}
    state = {"model": model.state_dict(), "masks": masks, "steps": pruning.projector.steps}
    torch.save(state, folder / f"{kind}-{processes}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[3:]:  # a start takes its time
        fit(Path(sys.argv[1]), kind, int(sys.argv[2]))
