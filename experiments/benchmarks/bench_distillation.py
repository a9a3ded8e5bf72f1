"""Small students with and without a teacher on Fashion-MNIST, for equal steps; rows as JSON lines.

python experiments/benchmarks/bench_distillation.py [--steps 600] [--seeds 0 1 2] [--out FOLDER]

A run that is in the rows already is not repeated, so a stopped command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from omegaconf import OmegaConf
from shared.rows import read_rows

from lightning_compress import KnowledgeDistillation, Pair, Perceptual, TeacherScore
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.data import IdxImages
from lightning_compress.lab.models import DCGAN, VAE
from lightning_compress.lab.workflow.quality import Evaluator

SIZES = {"gan": (0.5, 0.125), "vae": (1.0, 0.25)}  # width of the teacher and of the students
METRIC = {"gan": "fid", "vae": "neg_elbo"}
TEACHER_SEED, TEACHER_STEPS = 100, {"gan": 1800, "vae": 1200}
RELUS = [("relu0", "relu0"), ("relu1", "relu1")]


def gan(loss: Any = "mse", **options: Any) -> dict[str, Any]:
    """A GAN's pair; each loss as strong as the discriminator's gradient."""
    return {"pairs": [Pair("generator", loss=loss, **options)], "balance": "gradient_norm"}


def vae(
    encoder: Any = "gaussian_kl", decoder: Any = "bernoulli_kl", **options: Any
) -> dict[str, Any]:
    """A VAE's two pairs, in nats as its own loss."""
    pairs = [Pair("decoder", loss=decoder, **options)]
    return {"pairs": [Pair("encoder", loss=encoder), *pairs] if encoder else pairs}


ARMS: dict[str, dict[str, Any]] = {
    "gan/alone": {},
    "gan/mse": gan(),
    "gan/perceptual": gan(Perceptual()),
    "gan/mse + perceptual": gan(["mse", Perceptual()]),
    "gan/perceptual, initialized": gan(Perceptual()) | {"initialize": True},
    "gan/initialized": gan() | {"initialize": True, "weight": 0.0},
    "gan/l1": gan("l1"),
    "gan/teacher score": gan(TeacherScore(loss="match")),
    "gan/features": gan(None, features=RELUS),
    "gan/attention": gan(None, features=RELUS, feature_loss="attention"),
    "gan/similarity": gan(None, features=RELUS, feature_loss="similarity"),
    "gan/cka": gan(None, features=RELUS, feature_loss="cka"),
    "vae/alone": {},
    "vae/posterior + pixels": vae(),
    "vae/posterior + pixels, initialized": vae() | {"initialize": True},
    "vae/initialized": vae() | {"initialize": True, "weight": 0.0},
    "vae/posterior": {"pairs": [Pair("encoder", loss="gaussian_kl")]},
    "vae/posterior + prior samples": vae(prior=64),
    "vae/posterior + mse of logits": vae(decoder={"mse": 100.0}),
    "vae/posterior + features": vae(features=RELUS),
}


def build(kind: str, width: float, seed: int) -> DCGAN | VAE:
    seed_everything(seed, verbose=False)
    if kind == "vae":
        return VAE(image_size=28, width_multiplier=width)
    return DCGAN(image_size=28, width_multiplier=width, discriminator_width=16)


def fit(model: Any, data: IdxImages, steps: int, callbacks: list[Any]) -> float:
    per_step = 2 if isinstance(model, DCGAN) else 1  # Lightning counts the steps of all optimizers
    trainer = Trainer(
        max_steps=steps * per_step,
        accelerator="cpu",
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=f"of {list(ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/distillation"))
    parser.add_argument("--samples", type=int, default=10_000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    data = IdxImages(name="fashion_mnist", image_size=28, val_size=5000, batch_size=64, seed=0)
    data.prepare_data()
    data.setup()
    settings = OmegaConf.load(config_dir() / "evaluate" / "default.yaml")
    settings.samples = args.samples
    judges = {kind: Evaluator(settings, data, kind, "fashion_mnist") for kind in SIZES}  # type: ignore[arg-type]
    for seed in args.seeds:
        for arm in args.arms:
            run(arm, seed, args, data, judges)
    print(table(read(args.out), args.steps))


def run(arm: str, seed: int, args: Any, data: IdxImages, judges: dict[str, Evaluator]) -> None:
    kind = arm.split("/")[0]
    teacher = build(kind, SIZES[kind][0], TEACHER_SEED)
    path = args.out / f"teacher-{kind}-{TEACHER_STEPS[kind]}.pt"
    if not path.exists():
        seconds = fit(teacher, data, TEACHER_STEPS[kind], [])
        torch.save(teacher.state_dict(), path)
        write(args, f"{kind}/teacher", TEACHER_SEED, judges[kind].quality(teacher), seconds)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    done = {(row["arm"], row["seed"], row["steps"]) for row in read(args.out)}
    if (arm, seed, args.steps) in done:
        return
    student = build(kind, SIZES[kind][1], seed)
    distill = [KnowledgeDistillation(teacher, **ARMS[arm])] if ARMS[arm] else []
    seconds = fit(student, data, args.steps, distill)
    write(args, arm, seed, judges[kind].quality(student.eval()), seconds)


def write(args: Any, arm: str, seed: int, quality: dict[str, float], seconds: float) -> None:
    row = {"arm": arm, "seed": seed, "steps": args.steps, "seconds": seconds, "quality": quality}
    with (args.out / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{arm}, seed {seed}: {quality}, {seconds:.0f} s", flush=True)


def read(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rows.jsonl"
    return read_rows(path) if path.exists() else []


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """Markdown: mean and spread over seeds, and the share of the gap closed over equal seeds."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["steps"] == steps or row["seed"] == TEACHER_SEED:
            value = row["quality"][METRIC[row["arm"].split("/")[0]]]
            values[row["arm"]][row["seed"]] = value
    lines = ["| run | metric | mean | spread | seeds | gap closed |", "|---|---|---|---|---|---|"]
    for arm, found in sorted(
        values.items(), key=lambda pair: (pair[0][:3], mean(pair[1].values()))
    ):
        kind, mine = arm.split("/")[0], list(found.values())
        teacher = mean(values[f"{kind}/teacher"].values())
        alone = [values[f"{kind}/alone"][seed] for seed in found if seed in values[f"{kind}/alone"]]
        closed = (mean(alone) - mean(mine)) / (mean(alone) - teacher) if alone else 1.0
        spread = f"{stdev(mine):.2f}" if len(mine) > 1 else "-"
        cells = [arm, METRIC[kind], f"{mean(mine):.2f}", spread, str(len(mine)), f"{closed:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
