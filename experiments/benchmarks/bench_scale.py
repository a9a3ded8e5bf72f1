"""A generator of 100 million weights from pruning to its file and back: time and memory.

python experiments/benchmarks/bench_scale.py [width of the widest layer, 2048] [training steps, 8]
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_pruning_scale import peak_megabytes
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    GradualPruning,
    QuantizationAwareTraining,
    load_compressed,
    save_compressed,
    sparsity,
)

LATENT, BATCH = 64, 2


class Generator(LightningModule):
    """Latents to 64 x 64 images; trained towards given ones, which is enough to move weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Unflatten(1, (LATENT, 1, 1))]
        sizes = [LATENT, width, width, width // 2, 64, 3]
        for index, (before, after) in enumerate(itertools.pairwise(sizes)):
            stride, padding = (1, 0) if index == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(before, after, 4, stride, padding), nn.ReLU()]
        self.generator = nn.Sequential(*layers[:-1], nn.Tanh())

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        latents, images = batch
        return (self.generator(latents) - images).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


@contextmanager
def stage(name: str, weights: float) -> Iterator[None]:
    """Print what the block took; memory in units of the weights' own."""
    before, start = peak_megabytes(reset=True), time.perf_counter()
    yield
    seconds, peak = time.perf_counter() - start, peak_megabytes()
    print(
        f"{name:34} | {seconds:7.1f} s | {peak / weights:5.2f} | {(peak - before) / weights:5.2f}"
    )


def fit(model: Generator, steps: int, *callbacks: Any) -> None:
    """Train for some steps."""
    data = TensorDataset(torch.randn(steps * BATCH, LATENT), torch.rand(steps * BATCH, 3, 64, 64))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=BATCH))


def main(width: int, steps: int) -> None:
    """Prints a row a stage."""
    torch.manual_seed(0)
    make: Callable[[], Generator] = lambda: Generator(width)  # noqa: E731
    model = make()
    count = sum(one.numel() for one in model.parameters())
    weights = 4 * count / 2**20
    print(f"{count / 1e6:.1f} million weights, {weights:.0f} MB in float32; memory x the weights")
    print(f"{'stage':34} | {'time':>9} | {'peak':>5} | on top of before")
    with stage(f"{steps} dense steps with Adam", weights):
        fit(model, steps)
    with stage(f"{steps} steps to 90 % and a grid", weights):
        pruning = GradualPruning(final_sparsity=0.9, end=0.6)
        fit(
            model, steps, pruning, QuantizationAwareTraining(activation_bits=None, scheme="entropy")
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.lcz")
        with stage("save_compressed, codec='fast'", weights):
            info = save_compressed(model.generator, path, codec="fast")
        fresh = make()
        with stage("load_compressed", weights):
            load_compressed(path, fresh.generator)
        with stage("load_compressed(stream=True)", weights):
            load_compressed(path, fresh.generator, stream=True)
    same = fresh.generator.state_dict()
    assert all(torch.equal(same[name], one) for name, one in model.generator.state_dict().items())
    print(
        f"{info.bytes:,} bytes, {info.ratio:.1f}x smaller, {sparsity(model):.4f} zeros, all equal"
    )


if __name__ == "__main__":
    main(*([int(word) for word in sys.argv[1:]] + [2048, 8][len(sys.argv) - 1 :]))
