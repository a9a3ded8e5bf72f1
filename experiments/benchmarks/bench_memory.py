"""Memory of training with each callback, in units of the weights: the peak of a few Adam steps.

Each row is a process of its own: a chain of equal Linear layers, float32, on one thread, a batch of
4, with a prune event or the costly part of quantization in every step. What the process holds
before the model is made is taken off. Finished rows are kept; the table goes into docs/scale.md.

python experiments/benchmarks/bench_memory.py [million weights, 100]
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_pruning_scale import peak_megabytes
from lightning.pytorch import Callback, LightningModule, Trainer
from shared.pages import insert
from shared.rows import Rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    EntropyGrid,
    GradualPruning,
    KnowledgeDistillation,
    ProjectedEMA,
    QuantizationAwareTraining,
)

ROWS = Path(__file__).parents[1] / "rows" / "memory.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
MARKS = "<!-- memory -->", "<!-- /memory -->"
LAYERS, STEPS, BATCH, MEGA = 16, 4, 4, 2**20


class Chain(LightningModule):
    """Equal Linear layers, trained towards given outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def quantization(**rules: Any) -> Callable[[Chain], list[Callback]]:
    return lambda _: [QuantizationAwareTraining(activation_bits=None, frequency=1, **rules)]


def pruning(_: Chain) -> list[Callback]:
    return [GradualPruning(final_sparsity=0.9, frequency=1)]


def taught(model: Chain) -> list[Callback]:
    teacher = Chain(model.net[0].out_features)  # pyright: ignore[reportArgumentType]
    return [KnowledgeDistillation(teacher, pairs=["net"], losses="mse")]


RATE = {"scheme": "rate_distortion", "lmbda": 1.0}
ARMS: dict[str, Callable[[Chain], list[Callback]]] = {
    "no callback": lambda _: [],
    "`rate_distortion`": quantization(**RATE),
    "`GradualPruning`": pruning,
    "`QuantizationAwareTraining`, symmetric": quantization(),
    "`learned_step`": quantization(scheme="learned_step"),
    "`entropy`": quantization(scheme="entropy"),
    "`entropy` with its rate": quantization(scheme="entropy", entropy=EntropyGrid(rate=1.0)),
    "`GradualPruning` and `rate_distortion`": lambda m: [*pruning(m), *quantization(**RATE)(m)],
    "`ProjectedEMA` and `rate_distortion`": lambda m: [*quantization(**RATE)(m), ProjectedEMA()],
    "`KnowledgeDistillation`": taught,
    "`codebook`, 4 bits": quantization(scheme="codebook", weight_bits=4),
}


def peak(arm: str, million: int) -> float:
    """The largest memory of a fit, in units of the weights."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = peak_megabytes(reset=True)
    model = Chain(round((million * 1e6 / LAYERS) ** 0.5))
    weights = sum(one.numel() for one in model.parameters()) * 4 / MEGA
    data = TensorDataset(torch.randn(STEPS * BATCH, model.net[0].in_features))  # pyright: ignore
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=ARMS[arm](model),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=BATCH))
    return (peak_megabytes() - before) / weights


def measured(arm: str, million: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, str(million), arm]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"peak": round(float(done.stdout.split()[-1]), 2)}


def main(million: int) -> None:
    """Makes the missing rows and the table."""
    rows = Rows(ROWS, keys=("million", "arm"))
    lines = [
        f"| {million} million weights, {LAYERS} equal layers | peak, times the weights |",
        "| --- | --- |",
    ]
    for arm in ARMS:
        row = rows.make(lambda arm=arm: measured(arm, million), million=million, arm=arm)
        lines.append(f"| {arm} | {row['peak']:.1f} |")
        insert(PAGE, "\n".join(lines), *MARKS)


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    if len(sys.argv) > 2:
        print(peak(sys.argv[2], size))
    else:
        main(size)
