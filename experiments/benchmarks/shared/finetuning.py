"""Short runs from one dense start: a small VAE and a small DCGAN on Fashion-MNIST, or others."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_compress.lab.config import config_dir
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.workflow.quality import Evaluator
from lightning_compress.lab.workflow.training import build_model

__all__ = ["EARLY", "MODELS", "STEPS", "Start"]

STEPS = 300
EARLY = {"scope": "layer", "criterion": "taylor", "end": 0.1}  # how a VAE's channels go best
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
}  # overrides, epochs of the dense model, the small layers that pruning leaves dense


class Start:
    """A dense model of a kind and seed, trained once, and what follows from it.

    Args:
        name: in `MODELS`.
        seed: of weights and noise; splits, order and the network whose features judge images are
            the same for all seeds.
        folder: where the dense weights are kept.
        models: overrides, epochs and small layers by name.
        data: overrides that choose the data.
        images: whether the images of a VAE are measured too, which takes a minute.
        precision: Lightning's, of all training.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        folder: Path,
        models: Mapping[str, tuple[list[str], int, list[str]]] = MODELS,
        *,
        data: Sequence[str] = ("data=fashion_mnist",),
        images: bool = False,
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
    ) -> None:
        overrides, self.epochs, self.spared = models[name]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            self.cfg = compose("train", [*overrides, *data, f"seed={seed}", "data.seed=0"])
        self.name, self.seed, self.images = name, seed, images
        self.precision: Literal["32-true", "bf16-mixed"] = precision
        self.data_name = data[0].partition("=")[2]
        self.data: SplitDataModule = instantiate(self.cfg.data, _convert_="all")
        self.data.prepare_data()
        self.data.setup()
        self.weights = folder / f"{name}-{seed}.pt"
        self._evaluator: Evaluator | None = None

    def model(self) -> Any:
        """The model as the dense training left it."""
        model = build_model(self.cfg, self.data, seed=self.seed)
        if not self.weights.exists():
            self.fit(model, [], epochs=self.epochs, steps=None)
            torch.save(model.state_dict(), self.weights)
        model = build_model(self.cfg, self.data, seed=self.seed)
        model.load_state_dict(torch.load(self.weights, weights_only=True))
        return model

    def fit(
        self,
        model: LightningModule,
        callbacks: Sequence[Callback],
        *,
        epochs: int = 1,
        steps: int | None = STEPS,
        validate: int = 0,
    ) -> None:
        """Trains on; `validate` batches of validation after each epoch of so many steps."""
        trainer = Trainer(
            max_epochs=epochs,
            limit_train_batches=steps,
            limit_val_batches=validate,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
            accelerator="cpu",
            precision=self.precision,
        )
        trainer.fit(model, datamodule=self.data)

    def quality(self, model: Any) -> dict[str, float]:
        """As an experiment measures it; of a VAE the likelihood alone unless `images`."""
        return self.evaluator(model).quality(model.eval())

    def evaluator(self, model: Any) -> Evaluator:
        """What measures it."""
        if self._evaluator is None:
            kind = str(model.kind)
            self._evaluator = Evaluator(self.cfg.evaluate, self.data, kind, self.data_name)
            if kind == "vae" and not self.images:
                self._evaluator.extractor = None
        return self._evaluator
