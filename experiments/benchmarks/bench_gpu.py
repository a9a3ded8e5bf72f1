"""A training step with each callback over one without, on a CUDA device: interleaved ratios.

python experiments/benchmarks/bench_gpu.py [--width 1024] [--steps 100] [--rounds 5]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import GradualPruning, ProjectedEMA, QuantizationAwareTraining
from lightning_compress.callbacks import StopOnNonFinite


class Net(LightningModule):
    """Four square layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def _qat(scheme: str) -> Callable[[], list[Callback]]:
    return lambda: [QuantizationAwareTraining(scheme=scheme)]


CASES: dict[str, Callable[[], list[Callback]]] = {
    "nothing": list,
    "pruning": lambda: [GradualPruning(final_sparsity=0.9, end=1.0)],
    **{name: _qat(name) for name in ("symmetric", "learned_step", "codebook", "entropy")},
    "average": lambda: [ProjectedEMA(decay=0.99)],
    "non-finite guard": lambda: [StopOnNonFinite()],
}


def seconds(callbacks: list[Callback], width: int, steps: int) -> float:
    torch.manual_seed(0)
    model = Net(width)
    data = DataLoader(TensorDataset(torch.randn(64 * steps, width)), batch_size=64)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1, accelerator="cuda", devices=1, logger=False, callbacks=callbacks,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.fit(model, data)
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing is measured")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for round_ in range(chosen.rounds + 1):
        for name, make in CASES.items():
            taken = seconds(make(), chosen.width, chosen.steps)
            if round_:  # the first one warms up
                times[name].append(taken)
    print(f"{torch.cuda.get_device_name()}, {chosen.steps} steps of width {chosen.width}")
    for name, taken in times.items():
        pairs = zip(taken, times["nothing"], strict=True)
        ratios = [one / plain for one, plain in pairs]
        print(
            f"{name:18} {statistics.median(ratios):.3f}x ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
