"""Grids for the entropy coder on a whole VAE: trained at their step against found afterwards.

A VAE of 0.87 million weights learns Fashion-MNIST; then its copies go on for equal steps: dense,
pruned, pruned and trained at the step. The pruned one is also put on the same grids when
its training has ended. All learning rates fall by one cosine. Finished rows are kept.

python experiments/benchmarks/bench_entropy.py [rows.jsonl]
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared.files import coded
from shared.finetuning import MODELS, Start
from shared.rows import Rows

from lightning_compress import (
    EntropyGrid,
    GradualPruning,
    QuantizationAwareTraining,
    quantize_weights,
)
from lightning_compress.lab.learning_rate import CosineAnnealing

EPOCHS, MORE = 5, 8  # of the dense model, and of each copy
# Zeros of the large layers, step in units of the rms of the non-zero weights, weight of the rate.
TRAINED = ((0.89, 0.6, 4.0), (0.925, 1.0, 20.0))
PRUNED = "pruned, float"


def callbacks(start: Start, zeros: float, step: float | None, rate: float) -> list[Any]:
    """Pruning, and the grid if it is trained at."""
    pruning = GradualPruning(
        final_sparsity=zeros,
        end=0.4,
        criterion="taylor",
        scope="layer",
        exclude=start.spared,
    )
    if step is None:
        return [pruning]
    grid = QuantizationAwareTraining(
        activation_bits=None, scheme="entropy", entropy=EntropyGrid(step=step, rate=rate), begin=0.3
    )
    return [pruning, grid]


def measured(start: Start, model: Any) -> dict[str, float]:
    size = coded(model).bytes
    dense = sum(4 * one.numel() for one in model.deployed_module().state_dict().values())
    return {**start.quality(model), "lcz": size, "ratio": dense / size}


def row(start: Start, made: list[Any], path: Path | None = None) -> dict[str, float]:
    """One copy, trained on and measured; kept at `path` for the rows that go on from it."""
    model = start.model()
    start.fit(model, [*made, CosineAnnealing(0.1)], epochs=MORE, steps=None)
    if path is not None:
        torch.save(model.state_dict(), path)
    return measured(start, model)


def afterwards(start: Start, path: Path, step: float) -> dict[str, float]:
    """The pruned copy on a grid that it was not trained at."""
    model = start.model()
    model.load_state_dict(torch.load(path, weights_only=True))
    quantize_weights(model, 8, scheme="entropy", step=step, per_channel=False)
    return measured(start, model)


def main(path: Path) -> None:
    """Makes the missing rows."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    MODELS["vae-whole"] = (["model=vae"], EPOCHS, MODELS["vae"][2])
    rows = Rows(path, keys=("variant", "zeros", "step", "rate", "epochs"))
    make = partial(rows.make, epochs=MORE)
    start = Start("vae-whole", 0, path.parent)
    for zeros, step, rate in TRAINED:
        made = callbacks(start, zeros, step, rate)
        make(partial(row, start, made), variant="trained", zeros=zeros, step=step, rate=rate)
    for zeros, step in dict.fromkeys((zeros, step) for zeros, step, _ in TRAINED):
        pruned = path.parent / f"vae-whole-{zeros}.pt"
        made = callbacks(start, zeros, None, 0.0)
        key: dict[str, Any] = {"zeros": zeros, "rate": 0.0}
        make(partial(row, start, made, pruned), variant=PRUNED, step=None, **key)
        make(partial(afterwards, start, pruned, step), variant="afterwards", step=step, **key)
    make(partial(row, start, []), variant="dense", zeros=0.0, step=None, rate=0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bench/entropy.jsonl"))
