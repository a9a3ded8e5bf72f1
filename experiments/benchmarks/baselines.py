"""Converged dense baselines, from which rows of the benchmarks may start: made once, kept small.

Learning rates fall by a cosine to a hundredth, and stay there for a third where the plan says so.
After each epoch the metric is measured on the validation split; a baseline has converged when it
improved by less than the seeds' standard deviation over the last third of its steps. A model and
seed is trained in pieces: a stopped command goes on at the last whole epoch, and stops by itself
after `--minutes`. Finished ones are kept as half-precision `.lcz` files (all networks, the
discriminator too), and their rows are measured from what these files hold.

python experiments/benchmarks/baselines.py [--set fashion|digits] [--models vae ...] [--seeds 0 ...]
    [--minutes 60] [--plan] [--out experiments/rows/baselines]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from shared.baseline_plans import KEPT, MADE, PLANS, Plan
from shared.rows import Rows

from lightning_compress import load_compressed, save_compressed
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.evaluation.fidelity import fidelity
from lightning_compress.lab.evaluation.likelihood import likelihood
from lightning_compress.lab.evaluation.verdict import baseline_faults
from lightning_compress.lab.learning_rate import CosineAnnealing
from lightning_compress.lab.workflow.quality import Evaluator, generate, rows
from lightning_compress.lab.workflow.training import build_model

LEAST = 0.01  # of the learning rate, at the end
READ = 2000  # rows of the validation split at each reading
TIMED = 4  # steps that the plan of minutes is measured on
MOST_BYTES = 25_000_000  # of all files in the repository


def improvement(curve: Sequence[float]) -> float:
    """How much a metric fell over the last third of its readings; each end a mean of up to three.

    >>> improvement([9.0, 8.0, 7.0, 6.0, 5.0, 5.0, 4.0, 3.0, 2.0])
    3.0
    """
    at = len(curve) - max(1, len(curve) // 3)
    few = min(3, at, len(curve) - at)
    if few < 1:
        return math.inf
    return mean(curve[at - few : at]) - mean(curve[-few:])


def has_converged(curves: Sequence[Sequence[float]]) -> bool:
    """Whether every seed improved by less than the seeds' spread over its last third of steps.

    With fewer than two seeds there is no spread, and nothing is converged.

    >>> has_converged([[9.0, 5.0, 5.0, 5.0, 5.0, 5.0], [9.0, 5.5, 5.5, 5.5, 5.5, 5.5]])
    True
    """
    if len(curves) < 2:
        return False
    spread = stdev(curve[-1] for curve in curves)
    return all(improvement(curve) < spread for curve in curves)


class Piece(Callback):
    """A reading an epoch, and an end when the time is over.

    Args:
        reading: a model -> the metric on the validation split.
        until: `time.monotonic()` after which no further epoch begins.
    """

    def __init__(self, reading: Any, until: float) -> None:
        self.reading, self.until = reading, until
        self.curve: list[float] = []
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve, self.seconds = state_dict["curve"], state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.curve.append(self.reading(pl_module))
        pl_module.train()
        now = time.monotonic()
        self.seconds += now - self.start
        self.start = now
        print(f"epoch {trainer.current_epoch + 1}: {self.curve[-1]:.4f} on validation", flush=True)
        trainer.should_stop = trainer.should_stop or now > self.until


class Baseline:
    """One model and seed.

    Args:
        name: of the model.
        plan: how it is trained.
        seed: of weights and noise; splits and the feature network are the same for all.
        folder: where its file lies; made if it does not exist.
        limit: batches an epoch; None: all.
        scratch: where the checkpoint of an unfinished run lies; None: in `folder`.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        seed: int,
        folder: Path,
        *,
        limit: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.name, self.plan, self.seed, self.limit = name, plan, seed, limit
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            words = [*plan.overrides, f"seed={seed}", "data.seed=0"]
            self.cfg = compose("train", words)
        self.folder = folder
        scratch = folder if scratch is None else scratch
        for place in (folder, scratch):
            place.mkdir(parents=True, exist_ok=True)
        self.data: SplitDataModule = instantiate(self.cfg.data, _convert_="all")
        self.data.prepare_data()
        self.data.setup()
        self.last = scratch / f"{name}-{seed}.ckpt"
        self.file = folder / f"{name}-{seed}.lcz"
        called = next(one for one in plan.overrides if one.startswith("data="))
        kind = str(self.fresh().kind)
        self.evaluator = Evaluator(self.cfg.evaluate, self.data, kind, called.partition("=")[2])

    def fresh(self) -> Any:
        """The model as it is drawn."""
        return build_model(self.cfg, self.data, seed=self.seed)

    def reading(self, model: Any) -> float:
        """The metric on the validation split, with the same rows and latents each time."""
        x = rows(self.data.val_dataset)[0][:READ]
        if self.plan.metric == "neg_elbo":
            return likelihood(model, x)["neg_elbo"]
        network = self.evaluator.extractor
        if network is None:
            raise RuntimeError(f"{self.name}: the data have no labels, so no feature network")
        return fidelity(generate(model, len(x)), x, network.module)[self.plan.metric]

    def minutes(self) -> float:
        """What the training takes, by a few steps of it; readings besides."""
        model = self.fresh()
        trainer = self._trainer(1, limit=TIMED)
        trainer.fit(model, train_dataloaders=self.data.train_dataloader())
        start = time.monotonic()
        self._trainer(1, limit=TIMED).fit(model, train_dataloaders=self.data.train_dataloader())
        step = (time.monotonic() - start) / TIMED
        batches = len(self.data.train_dataloader())
        return step * min(batches, self.limit or batches) * self.plan.epochs / 60

    def train(self, until: float) -> Piece:
        """Go on until the end, or the first whole epoch after `until`; what is known by then."""
        piece, model = Piece(self.reading, until), self.fresh()
        annealing = CosineAnnealing(LEAST, flat=self.plan.flat)
        earlier = self.last if self.last.exists() else None
        trainer = self._trainer(self.plan.epochs, piece, annealing, limit=self.limit)
        torch.manual_seed(self.seed if earlier is None else self.seed + self._epochs(earlier))
        loader = self.data.train_dataloader()
        trainer.fit(model, train_dataloaders=loader, ckpt_path=earlier, weights_only=False)
        trainer.save_checkpoint(self.last)
        if len(piece.curve) == self.plan.epochs:
            save_compressed(model.cpu().eval(), self.file, float_dtype="fp16")
        return piece

    def row(self, piece: Piece) -> dict[str, Any]:
        """Test metrics of what the file holds, its bytes, and the curve on the validation split."""
        model = self.fresh()
        load_compressed(self.file, model)
        quality = self.evaluator.quality(model.eval())
        return {
            **quality,
            "bytes": self.file.stat().st_size,
            "curve": piece.curve,
            "improved": improvement(piece.curve),
            "faults": baseline_faults(quality),
            "train_seconds": round(piece.seconds, 1),
        }

    def _trainer(self, epochs: int, *callbacks: Callback, limit: int | None) -> Trainer:
        return Trainer(
            max_epochs=epochs,
            limit_train_batches=limit,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            accelerator="cpu",
            precision=self.plan.precision,
        )

    @staticmethod
    def _epochs(path: Path) -> int:
        return int(torch.load(path, map_location="cpu", weights_only=False)["epoch"])


def told(found: Rows, plans: dict[str, Plan], folder: Path) -> None:
    """Print which baselines have converged, which are broken, and the bytes of all files."""
    for name, plan in plans.items():
        known = [row for row in found.known.values() if row["model"] == name]
        if not known:
            continue
        values = [row[plan.metric] for row in known]
        spread = f" ± {stdev(values):.3f} (standard deviation)" if len(values) > 1 else ""
        flat = has_converged([row["curve"] for row in known])
        faults = sorted({fault for row in known for fault in row["faults"]})
        word = "converged" if flat else "not converged"
        print(
            f"{name}: {plan.metric} {mean(values):.3f}{spread}, n = {len(values)}, {word}", *faults
        )
    size = sum(path.stat().st_size for path in folder.glob("*.lcz"))
    print(f"files: {size:,} bytes of at most {MOST_BYTES:,}")


def main() -> None:
    """Print the plan, then train what is missing until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=PLANS, default="fashion")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--minutes", type=float, default=60.0, help="of this piece")
    parser.add_argument("--plan", action="store_true", help="print it only")
    parser.add_argument("--epochs", type=int, help="instead of the plan's, to try the way")
    parser.add_argument("--out", type=Path, default=KEPT)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    until = time.monotonic() + 60 * chosen.minutes
    plans = {name: PLANS[chosen.set][name] for name in chosen.models or PLANS[chosen.set]}
    if chosen.epochs:
        plans = {name: replace(plan, epochs=chosen.epochs) for name, plan in plans.items()}
    folder, scratch = chosen.out / chosen.set, MADE / chosen.set
    found = Rows(folder / "rows.jsonl", keys=("model", "seed"))
    missing = [
        (name, seed)
        for name, plan in plans.items()
        for seed in (range(plan.seeds) if chosen.seeds is None else chosen.seeds)
        if not found.has(model=name, seed=seed)
    ]
    each = {
        name: Baseline(name, plans[name], 0, folder, scratch=scratch).minutes()
        for name in dict.fromkeys(name for name, _ in missing)
    }
    for name, minutes in each.items():
        seeds = [seed for one, seed in missing if one == name]
        whole = minutes * len(seeds)
        print(
            f"{name}: {minutes:.0f} minutes a seed, seeds {seeds}: {whole:.0f} minutes", flush=True
        )
    for name, seed in [] if chosen.plan else missing:
        if time.monotonic() > until:
            print("the time is over: the same command goes on")
            break
        one = Baseline(name, plans[name], seed, folder, scratch=scratch)
        piece = one.train(until)
        if one.file.exists():
            found.make(partial(one.row, piece), model=name, seed=seed)
    told(found, plans, folder)


if __name__ == "__main__":
    main()
