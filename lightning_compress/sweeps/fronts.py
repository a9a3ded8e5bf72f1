"""`pareto.json`: the trials of a study that no other one beats."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_compress.files import write_atomically
from lightning_compress.sweeps.space import words_of

__all__ = ["FRONT", "write_front"]

FRONT = "pareto.json"


def write_front(study: Any, objectives: Sequence[tuple[str, str]], folder: Path) -> Path:
    """Write the front, best in the first objective first, and how many trials ended how.

    Args:
        study: Optuna's.
        objectives: (path into results.json, direction) each.
        folder: of the sweep; a trial's own folder in there is named by its number.
    """
    sign = -1 if objectives[0][1] == "maximize" else 1
    best = sorted(study.best_trials, key=lambda trial: (sign * trial.values[0], trial.number))
    names = [path for path, _ in objectives]
    content = {
        "objectives": [{"path": path, "direction": direction} for path, direction in objectives],
        "trials": dict(Counter(trial.state.name.lower() for trial in study.trials)),
        "front": [
            {
                "number": trial.number,
                "folder": str(trial.number),
                "values": dict(zip(names, trial.values, strict=True)),
                "overrides": words_of(trial.params),
            }
            for trial in best
        ],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return write_atomically(folder / FRONT, text, what="the Pareto front")
