"""Quality and size by scheme and bits: a VAE and a DCGAN on Fashion-MNIST, equal steps.

Each row starts from the same dense model, trains 300 steps with the callbacks of its variant, and
is measured on its grids, weights and activations alike. Finished rows are kept.

python experiments/benchmarks/bench_quantization.py [rows.jsonl [page.md]]

With a page, only the tables of the rows so far are put into it.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Callback
from shared.files import coded
from shared.finetuning import MODELS, Start
from shared.pages import insert
from shared.peers import calibrate
from shared.rows import Rows, mean_and_spread, read_rows

from lightning_compress import (
    EntropyGrid,
    GradualPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
)

SEEDS = (0, 1, 2)
ONE_SEED = ("affine", "codebook", "learned_step")
RATE = {"vae": 50.0, "dcgan": 0.2}  # of the entropy scheme: a twentieth of the loss at 2 bits
PRUNED = "90 % zeros, "
METRIC = {"vae": "neg_elbo", "dcgan": "fid"}
TITLES = {"vae": "VAE | −ELBO, nats", "dcgan": "DCGAN | Fréchet distance"}


def trained(
    bits: int | None, activations: int | None, scheme: str = "symmetric", **more: Any
) -> Any:
    """Quantization while training."""
    return QuantizationAwareTraining(
        weight_bits=bits, activation_bits=activations, scheme=scheme, freeze=0.8, **more
    )


VARIANTS: dict[str, Any] = {
    "dense": lambda _: [],
    "post-training W8A8": lambda _: [],
    "post-training W4A8": lambda _: [],
    "trained W8A8": lambda _: [trained(8, 8)],
    "trained W4A8": lambda _: [trained(4, 8)],
    "trained W4A8, affine": lambda _: [trained(4, 8, "affine")],
    "trained W4A8, learned_step": lambda _: [trained(4, 8, "learned_step")],
    "trained W4, codebook": lambda _: [trained(4, None, "codebook")],
    f"{PRUNED}float": lambda _: [],
    f"{PRUNED}post-training 4 bits": lambda _: [
        PostTrainingQuantization(weight_bits=4, per_channel=False)
    ],
    f"{PRUNED}trained 4 bits": lambda _: [trained(4, None, per_channel=False)],
    f"{PRUNED}trained entropy": lambda _: [
        trained(8, None, "entropy", entropy=EntropyGrid(step=1.0))
    ],
    f"{PRUNED}trained entropy, rate": lambda name: [
        trained(8, None, "entropy", entropy=EntropyGrid(step=1.0, rate=RATE[name]))
    ],
}


def main(path: Path) -> None:
    """Makes the missing rows: all variants of seed 0 first."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(path, keys=("model", "seed", "variant"))
    for seed in SEEDS:
        for name in MODELS:
            start = Start(name, seed, path.parent)
            for variant in VARIANTS:
                if seed == 0 or not variant.endswith(ONE_SEED):
                    rows.make(partial(row, start, variant), model=name, seed=seed, variant=variant)


def row(start: Start, variant: str) -> dict[str, float]:
    """Trains on from the dense start, quantizes, measures, and saves the file."""
    model = start.model()
    callbacks: list[Callback] = list(VARIANTS[variant](start.name))
    if variant.startswith(PRUNED):
        pruning = GradualPruning(
            final_sparsity=0.9,
            end=0.6,
            frequency=12,
            criterion="taylor",
            scope="layer",
            exclude=start.spared,
        )
        callbacks.append(pruning)
    start.fit(model, callbacks)
    if variant.startswith("post-training"):
        calibrate(model, start.data, weight_bits=int(variant[-3]))
    found = start.quality(model)
    info = coded(model)
    return found | {"lcz": info.bytes, "ratio": round(info.ratio, 2)}


def tables(rows: list[dict[str, Any]]) -> str:
    """Means over seeds; "against dense" compares each seed with its own dense row."""
    lines = []
    for name, metric in METRIC.items():
        own = [row for row in rows if row["model"] == name]
        dense = {row["seed"]: row[metric] for row in own if row["variant"] == "dense"}
        lines += [f"| {TITLES[name]} | against dense | active units | `.lcz` ratio | seeds |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for variant in VARIANTS:
            found = [row for row in own if row["variant"] == variant]
            if not found:
                continue
            more = [100 * (row[metric] / dense[row["seed"]] - 1) for row in found]
            change = "" if variant == "dense" else f"{mean_and_spread(more, '+.1f')} %"
            units = (
                mean_and_spread([row["active_units"] for row in found], ".0f")
                if name == "vae"
                else ""
            )
            ratio = mean(row["ratio"] for row in found)
            quality = mean_and_spread([row[metric] for row in found])
            lines.append(
                f"| {variant} | {quality} | {change} | {units} | {ratio:.1f} | {len(found)} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    PATH = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bench/quantization.jsonl")
    if len(sys.argv) > 2:
        insert(Path(sys.argv[2]), tables(read_rows(PATH)))
    else:
        main(PATH)
