"""Run by test_quantization_distributed.py: trains on some processes and saves what each has."""

from pathlib import Path

import torch
from processes import on, share_of, work
from tiny import TinyAutoencoder, TinyGAN, quiet_trainer

from lightning_compress import (
    EntropyGrid,
    GradualPruning,
    QuantizationAwareTraining,
    compression_state,
)

WAYS = {
    "gan": [{"scheme": "learned_step", "pact": True}],
    "vae": [{"scheme": "codebook"}],
    "plain": [  # as one process with the joined batches
        {"scheme": "symmetric"},
        {"scheme": "affine", "observer": "moving_average", "per_channel": False},
        {"scheme": "learned_step"},
        {"scheme": "codebook", "freeze": 0.6},
        {"scheme": "entropy", "entropy": EntropyGrid(rate=0.01, target_bits=2.5)},
        {"scheme": "rate_distortion", "lmbda": 0.1},
    ],
}


def train(folder: Path, kind: str, processes: int, rules: dict) -> dict:
    torch.manual_seed(1)
    model = TinyGAN() if kind == "gan" else TinyAutoencoder("SGD")
    if kind == "plain":  # BatchNorm would see half a batch in each process
        model.encoder[1] = torch.nn.Identity()
    quantization = QuantizationAwareTraining(weight_bits=4, **rules)
    pruning = GradualPruning(final_sparsity=0.5)
    trainer = quiet_trainer(folder, quantization, pruning, **on(processes))
    trainer.fit(model, share_of(processes))
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
    work(fit)
