"""Allocation of bytes to layers: by sensitivity, uniform, Erdos-Renyi-Kernel; a VAE on digits.

One dense model, one scan of it. A pair of sparsity and bits for all layers gives a number of bytes
(of the weights' symbols); three ways to share it are trained on for equal steps: that pair, the
same with ERK densities, and sparsity and bits of each layer by Lagrange's condition on the scan
(`Sensitivity.recipe`). Sizes are those of the `.lcz` files. Rows that are done are kept.

python experiments/benchmarks/bench_allocation.py [rows.jsonl] [epochs]
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from shared.files import coded
from shared.rows import Rows

from lightning_compress import GradualPruning, QuantizationAwareTraining
from lightning_compress.budget.sensitivity import Sensitivity
from lightning_compress.lab.data import Digits
from lightning_compress.lab.evaluation.likelihood import likelihood
from lightning_compress.lab.evaluation.sensitivity import scan_sensitivity
from lightning_compress.lab.models import VAE
from lightning_compress.lab.workflow.quality import rows as images

WIDTH, DENSE_EPOCHS, SEEDS = 16, 60, (0, 1, 2)
PAIRS = ((0.8, 4), (0.9, 4), (0.95, 3), (0.98, 3))


class Bench:
    """One seed's dense model and its sensitivities.

    Args:
        seed: of weights and noise.
        epochs: that each row trains on.
        folder: where the dense weights are kept.
    """

    def __init__(self, seed: int, epochs: int, folder: Path) -> None:
        self.seed, self.epochs = seed, epochs
        self.data = Digits(batch_size=64, seed=seed)
        self.data.setup()
        weights = folder / f"digits-vae-{seed}.pt"
        model = self._model()
        if not weights.exists():
            self._fit(model, [], DENSE_EPOCHS)
            torch.save(model.state_dict(), weights)
        self.weights = torch.load(weights, weights_only=True)
        model.load_state_dict(self.weights)
        x = images(self.data.val_dataset)[0]
        self.scan: Sensitivity = scan_sensitivity(
            model, lambda one: likelihood(one, x)["neg_elbo"], metric="neg_elbo"
        )

    def row(self, way: str, pair: tuple[float, int]) -> dict[str, Any]:
        """Train on with one way to share the bytes of a pair, and measure."""
        seed_everything(self.seed, verbose=False)
        model = self._model()
        model.load_state_dict(self.weights)
        self._fit(model, self._callbacks(way, pair), self.epochs)
        size = coded(model).bytes
        found = likelihood(model.eval(), images(self.data.test_dataset)[0])
        return {"lcz": size, "neg_elbo": round(found["neg_elbo"], 3)}

    def _callbacks(self, way: str, pair: tuple[float, int]) -> list[Any]:
        if way == "dense":
            return []
        sparsity, chosen = pair[0], {one.path: pair for one in self.scan.layers}
        if way == "sensitivity":
            chosen = self.scan.recipe(self._bytes(pair))
        targets: dict[Any, float] = {
            path: zeros for path, (zeros, _) in chosen.items() if zeros > 0
        }
        grids = QuantizationAwareTraining(
            weight_bits={path: bits for path, (_, bits) in chosen.items()},
            activation_bits=None,
            per_channel=False,
            begin=0.6,
        )
        if way == "sensitivity" and not targets:  # fewer bits alone make room
            return [grids]
        pruning = GradualPruning(
            final_sparsity=targets if way == "sensitivity" else sparsity,
            scope="erk" if way == "erk" else "layer",
            end=0.6,
        )
        return [pruning, grids]

    def _bytes(self, pair: tuple[float, int]) -> float:
        rows = [{(s, b): c.size for s, b, c in one.choices()} for one in self.scan.layers]
        return sum(row[pair] for row in rows)

    def _model(self) -> VAE:
        seed_everything(self.seed, verbose=False)
        return VAE(image_size=16, width=WIDTH)

    def _fit(self, model: VAE, callbacks: list[Any], epochs: int) -> None:
        trainer = Trainer(
            max_epochs=epochs,
            limit_val_batches=0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
            accelerator="cpu",
        )
        trainer.fit(model, datamodule=self.data)


def main(path: Path, epochs: int) -> None:
    """Makes the missing rows."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(path, keys=("seed", "way", "sparsity", "bits"))
    for seed in SEEDS:
        bench = Bench(seed, epochs, path.parent)
        for way in ("dense", "uniform", "erk", "sensitivity"):
            for sparsity, bits in PAIRS if way != "dense" else PAIRS[:1]:
                measure = partial(bench.row, way, (sparsity, bits))
                rows.make(measure, seed=seed, way=way, sparsity=sparsity, bits=bits)


if __name__ == "__main__":
    rows_file = sys.argv[1] if len(sys.argv) > 1 else "outputs/bench/allocation.jsonl"
    main(Path(rows_file), int(sys.argv[2]) if len(sys.argv) > 2 else 20)
