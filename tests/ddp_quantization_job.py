"""Run by test_quantization_distributed.py: trains on some processes and saves what each has."""

import os
import sys
from pathlib import Path

import torch
from tiny import TinyAutoencoder, TinyGAN, quiet_trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_compress import GradualPruning, QuantizationAwareTraining, compression_state


def main(folder: Path, kind: str, processes: int) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = TinyGAN() if kind == "gan" else TinyAutoencoder("SGD")
    if kind == "plain":  # BatchNorm would see half a batch in each process
        model.encoder[1] = torch.nn.Identity()
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    data, rank = TensorDataset(rows), int(os.environ.get("LOCAL_RANK", "0"))
    sampler = DistributedSampler(data, processes, rank, shuffle=False)
    loader = DataLoader(data, batch_size=8 // processes, sampler=sampler)
    scheme = {"gan": "learned_step", "vae": "codebook", "plain": "symmetric"}[kind]
    callbacks = [
        QuantizationAwareTraining(weight_bits=4, scheme=scheme, pact=kind == "gan"),
        GradualPruning(final_sparsity=0.5),
    ]
    trainer = quiet_trainer(
        folder,
        *callbacks,
        devices=processes,
        use_distributed_sampler=False,
        strategy="auto" if processes == 1 else "ddp_find_unused_parameters_true",
    )
    trainer.fit(model, loader)
    found = compression_state(model).activations
    grids = {
        path: [one and (one.scale, one.zero_point) for one in (pair.input, pair.output)]
        for path, pair in found.items()
    }
    state = {"model": model.state_dict(), "grids": grids}
    torch.save(state, folder / f"{processes}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
