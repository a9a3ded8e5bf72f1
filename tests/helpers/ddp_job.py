"""Run by test_distributed.py: trains pruned models on some processes and saves what each has."""

from pathlib import Path

import torch
from processes import on, share_of, work
from tiny import TinyAutoencoder, TinyGAN, quiet_trainer

from lightning_compress import GradualPruning


def fit(folder: Path, kind: str, processes: int) -> None:
    torch.manual_seed(1)
    model = TinyGAN() if kind == "gan" else TinyAutoencoder("SGD")
    if kind == "plain":  # BatchNorm would see half a batch in each process
        model.encoder[1] = torch.nn.Identity()
    pruning = GradualPruning(final_sparsity=0.8, regrow="gradient" if kind == "plain" else None)
    trainer = quiet_trainer(folder, pruning, **on(processes))
    trainer.fit(model, share_of(processes))
    masks = {projected.path: projected.pruned for projected in pruning.projected_weights}
    state = {"model": model.state_dict(), "masks": masks, "steps": pruning.projector.steps}
    torch.save(state, folder / f"{kind}-{processes}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    work(fit)
