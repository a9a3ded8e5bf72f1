"""LoggedPictures: sample images and histograms of weights, to the loggers that can take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.utils import make_grid

from lightning_compress.errors import require
from lightning_compress.modes import evaluating

__all__ = ["LoggedPictures"]

SEED = 12_345
BINS = 64


class LoggedPictures(Callback):
    """Log a grid of samples and each weight's histogram, now and then and at the end.

    Samples come from the same latents every time, and drawing them moves no random stream.
    TensorBoard and W&B take both, MLflow images only; other loggers are left alone.

    Args:
        every: epochs between two logs, 1 or more; the end of training always has one.
        samples: images in the grid.

    Raises:
        ValueError: for a number below 1.

    >>> LoggedPictures(every=5).every
    5
    """

    def __init__(self, *, every: int = 10, samples: int = 32) -> None:
        if every < 1 or samples < 1:
            raise ValueError(f"every={every!r} and samples={samples!r} must be 1 or more")
        self.every, self.samples = every, samples

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log every so many epochs."""
        if (trainer.current_epoch + 1) % self.every == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what training left, after the callbacks before this one."""
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, model: Any) -> None:
        takers = [one for one in trainer.loggers if type(one).__name__ in TAKERS]
        if not takers or not trainer.is_global_zero:
            return
        grid = _samples(model, self.samples)
        weights = {
            name: weight.detach().float().cpu()
            for name, weight in model.named_parameters()
            if weight.dim() > 1
        }
        for logger in takers:
            TAKERS[type(logger).__name__](logger, grid, weights, trainer.global_step)


def _samples(model: Any, count: int) -> Tensor | None:
    """A grid (C, H, W) in [0, 1] of what a model draws; None for one that draws no images."""
    if not hasattr(model, "latents") or getattr(model, "discrete", False):
        return None
    with torch.random.fork_rng(), evaluating(model):
        latents = model.latents(count, seed=SEED).to(model.device)
        return make_grid(model.images(latents).float().cpu().clamp(0, 1), nrow=8)


def _tensorboard(
    logger: Any, grid: Tensor | None, weights: Mapping[str, Tensor], step: int
) -> None:
    if grid is not None:
        logger.experiment.add_image("samples", grid, step)
    for name, weight in weights.items():
        logger.experiment.add_histogram(f"weights/{name}", weight, step)


def _wandb(logger: Any, grid: Tensor | None, weights: Mapping[str, Tensor], step: int) -> None:
    wandb = require("wandb", extra="wandb")
    found: dict[str, Any] = {
        f"weights/{name}": wandb.Histogram(np_histogram=np.histogram(weight.numpy(), bins=BINS))
        for name, weight in weights.items()
    }
    if grid is not None:
        found["samples"] = wandb.Image(grid)
    logger.experiment.log({**found, "trainer/global_step": step})


def _mlflow(logger: Any, grid: Tensor | None, weights: Mapping[str, Tensor], step: int) -> None:  # noqa: ARG001 (MLflow has no histograms)
    if grid is not None:
        pixels = (grid.permute(1, 2, 0) * 255).round().byte().numpy()
        logger.experiment.log_image(logger.run_id, pixels, key="samples", step=step)


Taker = Callable[[Any, "Tensor | None", Mapping[str, Tensor], int], None]
TAKERS: dict[str, Taker] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
}
