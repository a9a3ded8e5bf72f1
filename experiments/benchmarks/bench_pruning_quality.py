"""Quality by criterion and sparsity: a VAE and a DCGAN on Fashion-MNIST, pruned for equal steps.

Each row starts from the same dense model of its seed, prunes for 60 % of 300 steps and recovers;
the dense baseline trains on for the same steps. Finished rows are kept and not made again.

python experiments/benchmarks/bench_pruning_quality.py [rows.jsonl]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from shared.finetuning import MODELS, Start
from shared.rows import Rows
from torch import Tensor, nn

from lightning_compress import BalanceGuard, GradualPruning, PosteriorGuard
from lightning_compress.pruning.criteria import CRITERIA, Hutchinson

SPARSITIES, SEEDS = (0.9, 0.95, 0.8, 0.98), (0, 1, 2)
# magnitude_l2 has the order of magnitude.
VARIANTS = [
    *sorted(set(CRITERIA) - {"magnitude_l2"}),
    "hutchinson",
    "magnitude, guarded at 0.5",
    "magnitude, guarded at 0.95",
]


def main(path: Path) -> None:
    """Makes the missing rows: all criteria of a model and seed before the next."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(path, keys=("model", "seed", "sparsity", "variant"))
    for seed in SEEDS:
        for name in MODELS:
            start = Start(name, seed, path.parent)
            cells = [(0.0, "dense")]
            cells += [
                (s, v) for s in (SPARSITIES if seed == 0 else SPARSITIES[:1]) for v in VARIANTS
            ]
            for sparsity, variant in cells:
                rows.make(
                    partial(row, start, variant, sparsity),
                    model=name,
                    seed=seed,
                    sparsity=sparsity,
                    variant=variant,
                )


def row(start: Start, variant: str, sparsity: float) -> dict[str, float]:
    """Trains on from the dense start, and measures."""
    model = start.model()
    start.fit(model, [] if variant == "dense" else pruning(start, variant, sparsity, model))
    return start.quality(model)


def pruning(start: Start, variant: str, sparsity: float, model: Any) -> list[Callback]:
    """The callbacks of a row."""
    criterion, _, factor = variant.partition(", guarded at ")
    guard = BalanceGuard if start.name == "dcgan" else PosteriorGuard
    chosen = Hutchinson(fixed_loss(start, model)) if criterion == "hutchinson" else criterion
    callback = GradualPruning(
        final_sparsity=sparsity,
        end=0.6,
        frequency=12,
        criterion=chosen,
        scope="layer",
        exclude=start.spared,
    )
    return [callback, *([guard(factor=float(factor))] if factor else [])]


def fixed_loss(start: Start, model: Any) -> Callable[[], Tensor]:
    """The loss of one batch, as Hutchinson's estimate wants it."""
    x = next(iter(start.data.train_dataloader()))[0]
    z = model.latents(len(x), seed=0)

    def loss() -> Tensor:
        if start.name == "dcgan":
            return nn.functional.softplus(-model.discriminator(model.generator(z))).mean()
        nll, kl = model.elbo_terms(x, generator=torch.Generator().manual_seed(0))
        return (nll + kl).mean()

    return loss


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bench/pruning_quality.jsonl"))
