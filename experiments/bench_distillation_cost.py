"""Time of a training step with a teacher, against the student alone plus the teacher's forward.

All runs train in one process and take turns batch by batch, so that a busy moment of the machine
meets each of them. Usage: python experiments/bench_distillation_cost.py [steps]
"""

from __future__ import annotations

import sys
import threading
import warnings
from statistics import median, quantiles
from typing import Any

import torch
from bench_pruning import Turns
from lightning.pytorch import Trainer, seed_everything

from lightning_compress import KnowledgeDistillation, Pair
from lightning_compress.models import DCGAN

STEPS, WARMUP = int(sys.argv[1]) if len(sys.argv) > 1 else 40, 5


def asked_by_hand(model: DCGAN, teacher: DCGAN) -> None:
    """Let the teacher's forward pass run wherever the student trains, and drop what it gives."""

    def ask(_module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            with torch.no_grad():
                teacher.generator(*args)

    model.generator.register_forward_hook(ask)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    batches = [(torch.rand(64, 1, 28, 28), torch.zeros(64)) for _ in range(STEPS)]
    features = Pair("generator", features=[("relu1", "relu1")])
    arms = ["alone + teacher's forward", "alone", "mse", "mse + features", "alone, again"]
    turns = [threading.Semaphore(int(index == 0)) for index in range(len(arms))]
    clocks, threads = [Turns(index, turns) for index in range(len(arms))], []
    for clock, arm in zip(clocks, arms, strict=True):
        seed_everything(0, verbose=False)
        model, teacher = (DCGAN(image_size=28, width_multiplier=w) for w in (0.125, 0.5))
        teacher.eval()
        if arm.endswith("forward"):
            asked_by_hand(model, teacher)
        pairs = {"mse": ["generator"], "mse + features": [features]}.get(arm)
        distill = [KnowledgeDistillation(teacher, pairs=pairs)] if pairs else []
        trainer = Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            callbacks=[*distill, clock],
        )
        loader = torch.utils.data.DataLoader(batches, batch_size=None)  # pyright: ignore
        threads.append(threading.Thread(target=trainer.fit, args=(model, loader)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    base = clocks[0].times[WARMUP:]
    for arm, clock in zip(arms, clocks, strict=True):
        mine = clock.times[WARMUP:]
        ratios = [one / other for one, other in zip(mine, base, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(
            f"{arm:28} {1e3 * median(mine):8.1f} ms a step, {median(ratios):.3f}x "
            f"(quartiles {low:.3f} to {high:.3f}), all steps {sum(mine) / sum(base):.3f}x"
        )


if __name__ == "__main__":
    main()
