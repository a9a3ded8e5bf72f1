"""Time and memory of a prune event over 1, 10 and 100 million weights, in one thread.

python experiments/benchmarks/bench_pruning_scale.py [million weights ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

from lightning_compress.projection import Projector
from lightning_compress.pruning.criteria import make_criterion
from lightning_compress.pruning.granularity import Layout, make_granularity
from lightning_compress.pruning.mask_plan import MaskPlan
from lightning_compress.pruning.masks import SCOPES
from lightning_compress.targets import select

LAYERS, EVENTS = 8, 5


def peak_megabytes(*, reset: bool = False) -> float:
    """The largest resident memory since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main(millions: list[int]) -> None:
    """Prints a row a size."""
    torch.set_num_threads(1)
    print("million weights | seconds an event | ms a million | peak memory on top, x the weights")
    for million in millions:
        rows = million * 1_000_000 // LAYERS // 1000
        model = nn.Sequential(*(nn.Linear(1000, rows, bias=False) for _ in range(LAYERS)))
        projector = Projector.of(model)
        projected_weights = [projector.add(target) for target in select(model).targets]
        floors = {projected.path: 0.01 for projected in projected_weights}
        plan = MaskPlan(
            make_granularity("unstructured"),
            SCOPES["global"],
            reopen=False,
            layouts={projected.path: Layout() for projected in projected_weights},
            floors=floors,
        )
        criterion, seconds, extra = make_criterion("magnitude"), [], 0.0
        for event in range(EVENTS):
            before = peak_megabytes(reset=True)
            start = time.perf_counter()
            masks = plan.masks(
                projected_weights,
                [criterion.scores(one) for one in projected_weights],
                0.5 + event / 10,
            )
            for projected, mask in zip(projected_weights, masks, strict=True):
                projected.set_mask(mask)
                projected.project()
            seconds.append(time.perf_counter() - start)
            del masks
            extra = max(extra, peak_megabytes() - before)
        size = sum(projected.target.numel for projected in projected_weights) * 4 / 2**20
        took = median(seconds)
        print(f"{million:15} | {took:16.3f} | {1e3 * took / million:12.1f} | {extra / size:.2f}")
        projector.detach()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [1, 10, 100])
