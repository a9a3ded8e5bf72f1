"""Quality by criterion and sparsity: a VAE and a DCGAN on Fashion-MNIST, pruned for equal steps.

Each row starts from the same dense model of its seed, prunes for 60 % of 300 steps and recovers;
the dense twin trains on for the same steps. Finished rows are kept and not made again.

python experiments/bench_pruning_quality.py [rows.jsonl]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_rows import Rows
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress import BalanceGuard, GradualPruning, PosteriorGuard
from lightning_compress.config import config_dir
from lightning_compress.data import SplitDataModule
from lightning_compress.pruning.criteria import CRITERIA, Hutchinson
from lightning_compress.workflow.quality import Evaluator
from lightning_compress.workflow.training import build_model

STEPS, SPARSITIES, SEEDS = 300, (0.9, 0.95, 0.8, 0.98), (0, 1, 2)
MODELS = {
    "vae": (
        ["model=vae", "model.width=16"],
        4,
        ["encoder.body.down1", "encoder.mu", "encoder.logvar", "decoder.up2"],
    ),
    "dcgan": (
        [
            "model=dcgan",
            "model.width=16",
            "model.discriminator_width=16",
            "model.spectral_norm=true",
            "evaluate.metric=fid",
        ],
        2,
        ["generator.up2"],
    ),
}  # overrides, epochs of the dense model, the small layers that are left dense
# magnitude_l2 has the order of magnitude.
VARIANTS = [*sorted(set(CRITERIA) - {"magnitude_l2"}), "hutchinson", "magnitude, guarded"]


def main(path: Path) -> None:
    """Makes the missing rows: all criteria of a model and seed before the next."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = Rows(path, keys=("model", "seed", "sparsity", "variant"))
    for seed in SEEDS:
        for name in MODELS:
            bench = Bench(name, seed, path.parent)
            cells = [(0.0, "dense")]
            cells += [
                (s, v) for s in (SPARSITIES if seed == 0 else SPARSITIES[:1]) for v in VARIANTS
            ]
            for sparsity, variant in cells:
                rows.make(
                    partial(bench.row, variant, sparsity),
                    model=name,
                    seed=seed,
                    sparsity=sparsity,
                    variant=variant,
                )


class Bench:
    """One model and seed: the dense start, and what follows from it."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        overrides, self.epochs, self.spared = MODELS[name]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            self.cfg = compose("train", [*overrides, "data=fashion_mnist", f"seed={seed}"])
        self.name, self.seed = name, seed
        self.data: SplitDataModule = instantiate(self.cfg.data, _convert_="all")
        self.data.prepare_data()
        self.data.setup()
        self.start = folder / f"{name}-{seed}.pt"
        self._evaluator: Evaluator | None = None

    def pruning(self, variant: str, sparsity: float, model: LightningModule) -> list[Callback]:
        """The callbacks of a row."""
        guard = BalanceGuard() if self.name == "dcgan" else PosteriorGuard()
        criterion, *guarded = variant.split(", ")
        pruning = GradualPruning(
            final_sparsity=sparsity,
            end=0.6,
            frequency=12,
            criterion=Hutchinson(self._loss(model)) if criterion == "hutchinson" else criterion,
            scope="layer",
            exclude=self.spared,
        )
        return [pruning, *([guard] if guarded else [])]

    def _loss(self, model: Any) -> Callable[[], Tensor]:
        """The loss of a fixed batch, as Hutchinson's estimate wants it."""
        x = next(iter(self.data.train_dataloader()))[0]
        z = model.latents(len(x), seed=0)

        def loss() -> Tensor:
            if self.name == "dcgan":
                fake = model.generator(z)
                return nn.functional.softplus(-model.discriminator(fake)).mean()
            nll, kl = model.elbo_terms(x, generator=torch.Generator().manual_seed(0))
            return (nll + kl).mean()

        return loss

    def row(self, variant: str, sparsity: float) -> dict[str, float]:
        """Trains on from the dense start, and measures."""
        model = build_model(self.cfg, self.data, seed=self.seed)
        model.load_state_dict(self._dense())
        callbacks = [] if variant == "dense" else self.pruning(variant, sparsity, model)
        self._fit(model, callbacks, epochs=1, steps=STEPS)
        found = self._quality(model)
        return found

    def _dense(self) -> dict[str, Any]:
        if not self.start.exists():
            model = build_model(self.cfg, self.data, seed=self.seed)
            self._fit(model, [], epochs=self.epochs, steps=None)
            torch.save(model.state_dict(), self.start)
        return torch.load(self.start, weights_only=True)

    def _fit(
        self, model: LightningModule, callbacks: list[Callback], *, epochs: int, steps: int | None
    ) -> None:
        trainer = Trainer(
            max_epochs=epochs,
            limit_train_batches=steps,
            limit_val_batches=0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
            accelerator="cpu",
        )
        trainer.fit(model, datamodule=self.data)

    def _quality(self, model: LightningModule) -> dict[str, float]:
        if self._evaluator is None:
            kind = str(model.kind)
            self._evaluator = Evaluator(self.cfg.evaluate, self.data, kind, "fashion_mnist")
            if kind == "vae":
                self._evaluator.extractor = None  # the bound says enough, and is quick
        return self._evaluator.quality(model.eval())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bench/pruning_quality.jsonl"))
