"""Run by test_quantization_distributed.py: trains on some processes and saves what each has."""

import os
import sys
from pathlib import Path

import torch
from tiny import TinyAutoencoder, TinyGAN, quiet_trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_compress import GradualPruning, QuantizationAwareTraining, compression_state

WAYS = {
    "gan": [{"scheme": "learned_step", "pact": True}],
    "vae": [{"scheme": "codebook"}],
    "plain": [  # as one process with the joined batches
        {"scheme": "symmetric"},
        {"scheme": "affine", "observer": "moving_average", "per_channel": False},
        {"scheme": "learned_step"},
        {"scheme": "codebook", "freeze": 0.6},
        {"scheme": "entropy", "rate": 0.01, "target_bits": 2.5},
    ],
}


def train(folder: Path, kind: str, processes: int, rules: dict) -> dict:
    torch.manual_seed(1)
    model = TinyGAN() if kind == "gan" else TinyAutoencoder("SGD")
    if kind == "plain":  # BatchNorm would see half a batch in each process
        model.encoder[1] = torch.nn.Identity()
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    data, rank = TensorDataset(rows), int(os.environ.get("LOCAL_RANK", "0"))
    sampler = DistributedSampler(data, processes, rank, shuffle=False)
    loader = DataLoader(data, batch_size=8 // processes, sampler=sampler)
    quantization = QuantizationAwareTraining(weight_bits=4, **rules)
    trainer = quiet_trainer(
        folder,
        quantization,
        GradualPruning(final_sparsity=0.5),
        devices=processes,
        use_distributed_sampler=False,
        strategy="auto" if processes == 1 else "ddp_find_unused_parameters_true",
    )
    trainer.fit(model, loader)
    found = compression_state(model)
    activations = {
        path: [one and (one.scale, one.zero_point) for one in (pair.input, pair.output)]
        for path, pair in found.activations.items()
    }
    return {
        "model": model.state_dict(),
        "masks": found.masks,
        "weights": {path: vars(grid) for path, grid in found.grids.items()},
        "activations": activations,
        "rank": trainer.global_rank,
    }


def fit(folder: Path, kind: str, processes: int) -> None:
    states = [train(folder, kind, processes, rules) for rules in WAYS[kind]]
    rank = {state.pop("rank") for state in states}.pop()
    torch.save(states, folder / f"{kind}-{processes}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[3:]:  # a start takes its time
        fit(Path(sys.argv[1]), kind, int(sys.argv[2]))
