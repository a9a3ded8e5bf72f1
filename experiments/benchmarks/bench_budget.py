"""A budget in one run against the best of a grid: a VAE and a DCGAN on Fashion-MNIST.

All start from the same dense model. Each point of the grid (four sparsities, three steps of
entropy grids) trains on for 300 steps; the budget for 900, and stops where the validation metric
of the dense model after 300 more steps would be 2 % worse. Sizes are of `.lcz` files, qualities on
the test split, beside that of the dense model after 300 and after 900 more steps. Where no point of
the grid is within the 2 %, a second budget is as wide as the grid's best point needs. Rows that
are done are kept.

python experiments/benchmarks/bench_budget.py [rows.jsonl] [steps]
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from shared.files import coded
from shared.finetuning import MODELS, STEPS, Start
from shared.rows import Rows

from lightning_compress import (
    EntropyGrid,
    GradualPruning,
    QualityBudget,
    QuantizationAwareTraining,
    ScoreMonitor,
)
from lightning_compress.lab.evaluation.fidelity import fidelity
from lightning_compress.lab.evaluation.likelihood import likelihood
from lightning_compress.lab.evaluation.verdict import verdict as judged
from lightning_compress.lab.workflow.quality import generate
from lightning_compress.lab.workflow.quality import rows as images

SPARSITIES, GRID_STEPS = (0.8, 0.9, 0.95, 0.98), (0.5, 1.0, 2.0)
DEGRADATION, TIMES = 0.02, 3
PACE = 15  # steps between two readings of the budget's run
METRIC = {"vae": "neg_elbo", "dcgan": "fid"}
ROWS = 2000  # of the validation split, at each reading


class Bench:
    """One model and seed.

    Args:
        start: the dense model.
        steps: of a plain run.
    """

    def __init__(self, start: Start, steps: int) -> None:
        self.start, self.steps = start, steps
        self.x = images(start.data.val_dataset)[0][:ROWS]

    def reading(self, model: Any) -> float:
        """The metric on the validation split, with the same rows and latents each time."""
        if self.start.name == "vae":
            return likelihood(model, self.x)["neg_elbo"]
        network = self.start.evaluator(model).extractor
        if network is None:
            raise RuntimeError("the data have no labels: no feature network")
        return fidelity(generate(model, len(self.x)), self.x, network.module)["fid"]

    def pruning(self, sparsity: float) -> GradualPruning:
        """As the grid's and the budget's runs have it."""
        return GradualPruning(
            final_sparsity=sparsity,
            end=0.6,
            frequency=max(1, self.steps // 25),
            criterion="taylor",
            exclude=self.start.spared,
        )

    def grids(self, step: float) -> QuantizationAwareTraining:
        """Grids for the entropy coder."""
        return QuantizationAwareTraining(
            activation_bits=None, scheme="entropy", entropy=EntropyGrid(step=step), freeze=0.95
        )

    def dense(self, times: int) -> dict[str, Any]:
        """The dense model after as many steps."""
        return self._measured([], times)

    def point(self, sparsity: float, step: float) -> dict[str, Any]:
        """A point of the grid."""
        return self._measured([self.pruning(sparsity), self.grids(step)], 1)

    def budget(self, reference: float, degradation: float = DEGRADATION) -> dict[str, Any]:
        """One run with a budget."""
        budget = QualityBudget(
            "val/score",
            degradation,
            reference=reference,
            begin=0.0,
            end=0.85,
            search={"undo": "projection"},
            limits={"max_sparsity": 0.995, "steps": (0.5, 3.0)},
        )
        monitor = ScoreMonitor(lambda model: {"val/score": self.reading(model)})
        callbacks = [monitor, budget, self.pruning(0.9), self.grids(1.0)]
        row = self._measured(callbacks, TIMES, epochs=max(3, self.steps * TIMES // PACE))
        last = budget.search.good if budget.search is not None else None
        settings = [] if last is None else zip(budget.levers, last.levels, strict=True)
        return row | {
            "found": [lever.setting(level) for lever, level in settings],
            "tried": [vars(trial) for trial in budget.history],
            "degradation": degradation,
        }

    def _measured(self, callbacks: list[Callback], times: int, epochs: int = 1) -> dict[str, Any]:
        model = self.start.model()
        steps = max(1, self.steps * times // epochs)
        self.start.fit(
            model, callbacks, epochs=epochs, steps=steps, validate=1 if epochs > 1 else 0
        )
        found = {"quality": self.start.quality(model)[METRIC[self.start.name]]}
        return found | {
            "lcz": coded(model).bytes,
            "validation": self.reading(model),
            "steps": steps * epochs,
        }


def main(path: Path, steps: int) -> None:
    """Makes the missing rows and says which model is smaller at the same quality."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(path, keys=("model", "seed", "variant"))
    for name in MODELS:
        bench = Bench(Start(name, 0, path.parent), steps)
        make = partial(rows.make, model=name, seed=0)
        dense = make(partial(bench.dense, 1), variant="dense")
        longer = make(partial(bench.dense, TIMES), variant=f"dense, {TIMES}x")
        found = make(partial(bench.budget, dense["validation"]), variant="budget")
        grid = [
            make(partial(bench.point, sparsity, step), variant=f"{sparsity:.0%}, step {step}")
            for sparsity in SPARSITIES
            for step in GRID_STEPS
        ]
        print(verdict(name, found, grid, longer), flush=True)
        best = min(row["validation"] for row in grid) / dense["validation"] - 1
        if best > DEGRADATION:
            wide = partial(bench.budget, dense["validation"], best)
            print(verdict(name, make(wide, variant="budget, as wide"), grid), flush=True)


def verdict(
    name: str,
    found: dict[str, Any],
    grid: list[dict[str, Any]],
    dense: dict[str, Any] | None = None,
) -> str:
    """The budget's model beside the smallest of the grid that is as good, and the dense one."""
    fitting = [row for row in grid if row["quality"] <= found["quality"]]
    text = (
        f"{name}: budget {found['lcz']:,} bytes at {found['quality']:.2f} in {found['steps']} steps"
    )
    if dense is not None:
        key = METRIC[name]
        pair = judged(key, [{key: dense["quality"]}], [{key: found["quality"]}])
        text += f", {pair.difference:+.2f} beside the dense model, no loss {pair.word} (n = 1)"
    if not fitting:
        nearest = min(grid, key=lambda row: row["quality"])
        where = f"{nearest['quality']:.2f} with {nearest['lcz']:,} bytes"
        return f"{text}; no point of the grid is as good, the best is at {where}"
    best = min(fitting, key=lambda row: row["lcz"])
    smallest = f"{best['lcz']:,} bytes at {best['quality']:.2f} ({best['variant']})"
    times = best["lcz"] / found["lcz"]
    return f"{text}; of {len(grid)} grid points as good: {smallest}, {times:.2f}x as large"


if __name__ == "__main__":
    rows_file = sys.argv[1] if len(sys.argv) > 1 else "outputs/bench/budget.jsonl"
    main(Path(rows_file), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS)
