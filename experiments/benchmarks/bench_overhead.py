"""Time of a training step under the headline's callbacks, against the same model without any.

python experiments/benchmarks/bench_overhead.py [steps of an epoch [copies]]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Callback
from shared.finetuning import Start
from shared.headline_arms import grids, int8, pruning
from shared.headline_runs import SETS
from shared.peers import teacher
from shared.turns import measure_steps

from lightning_compress.lab.workflow.training import build_model

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
COPIES = int(sys.argv[2]) if len(sys.argv) > 2 else 4
ARMS: dict[str, Callable[[Any, Any], list[Callback]]] = {
    "no callback": lambda *_: [],
    "90 % zeros": lambda runs, _: [pruning(runs, 0.9)],
    "W8A8": lambda *_: [int8()],
    "zeros and grids": lambda runs, _: [pruning(runs, 0.9), grids(runs, 0.5)],
    "zeros, grids, taught": lambda runs, dense: [
        pruning(runs, 0.9),
        grids(runs, 0.5),
        teacher(dense),
    ],
}


def fresh(start: Start, arm: str) -> tuple[Any, list[Callback]]:
    """A model with weights of its own, and the callbacks of a row."""
    runs: Any = SimpleNamespace(model=SETS["fashion"][start.name])
    model, dense = (build_model(start.cfg, start.data, seed=seed) for seed in (0, 1))
    return model, ARMS[arm](runs, dense.eval())


def main() -> None:
    """A table a model."""
    for name in ("vae", "dcgan"):
        plan = SETS["fashion"][name]
        with TemporaryDirectory() as folder:
            start = Start(name, 0, Path(folder), {name: ([*plan.overrides], 0, [])}, data=plan.data)
        print(name)
        setups = {arm: lambda arm=arm, start=start: fresh(start, arm) for arm in ARMS}
        measure_steps(setups, steps=STEPS, copies=COPIES)


if __name__ == "__main__":
    main()
