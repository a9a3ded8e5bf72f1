"""Time of a training step with a teacher, against the student alone plus the teacher's forward.

python experiments/benchmarks/bench_distillation_cost.py [steps of an epoch [copies]]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Callback
from shared.turns import measure_steps

from lightning_compress import KnowledgeDistillation, Pair
from lightning_compress.lab.models import DCGAN

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
COPIES = int(sys.argv[2]) if len(sys.argv) > 2 else 6
BY_HAND = "alone + teacher's forward"
PAIRS: dict[str, list[Any]] = {
    "mse": ["generator"],
    "mse + features": [Pair("generator", features=[("relu1", "relu1")])],
}


def asked_by_hand(model: DCGAN, teacher: DCGAN) -> None:
    """Let the teacher's forward pass run wherever the student trains, and drop what it gives."""

    def ask(_module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            with torch.no_grad():
                teacher.generator(*args)

    model.generator.register_forward_hook(ask)


def fresh(arm: str) -> tuple[DCGAN, list[Callback]]:
    model, teacher = (DCGAN(image_size=28, width_multiplier=w) for w in (0.125, 0.5))
    teacher.eval()
    if arm == BY_HAND:
        asked_by_hand(model, teacher)
    pairs = PAIRS.get(arm)
    return model, [KnowledgeDistillation(teacher, pairs=pairs)] if pairs else []


if __name__ == "__main__":
    arms = [BY_HAND, "alone", *PAIRS]
    measure_steps({arm: lambda arm=arm: fresh(arm) for arm in arms}, steps=STEPS, copies=COPIES)
