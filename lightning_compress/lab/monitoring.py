"""Monitoring callbacks of the harness: metric history, early pruning of runs, images, progress."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torchvision.utils import make_grid

from lightning_compress.errors import check_choice, require
from lightning_compress.modes import evaluating

__all__ = [
    "GiveUp",
    "History",
    "HopelessRunError",
    "LoggedPictures",
    "PlainProgress",
    "progress_callback",
]


class History(Callback):
    """Keep every logged metric once an epoch, as rows `(batches seen, metric, value)`.

    >>> History().rows
    []
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Add the logged metrics of the epoch."""
        batches = trainer.fit_loop.total_batch_idx + 1
        for name, value in sorted(trainer.callback_metrics.items()):
            if math.isfinite(number := float(value)):
                self.rows.append((batches, name, number))

    def state_dict(self) -> dict[str, Any]:
        """All rows so far."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the rows of a checkpoint."""
        self.rows = [tuple(row) for row in state_dict["rows"]]


class HopelessRunError(RuntimeError):
    """A run that was pruned: its quality fell too far below the dense model's."""


class GiveUp(Callback):
    """Prune a run whose metric stays much worse than the dense run's at the same epoch.

    Args:
        rows: the dense run's curve, as `History` keeps it.
        monitor: the metric's name.
        mode: "min" or "max", the better direction.
        max_loss: largest tolerated loss, as a fraction of the dense value.
        after: fraction of the run before which no run is pruned.
        patience: consecutive checks beyond `max_loss` that prune the run.

    Raises:
        ValueError: for an argument out of its range.

    >>> GiveUp([(10, "val/elbo", -20.0)], monitor="val/elbo", mode="max", max_loss=0.25).patience
    2
    """

    def __init__(
        self,
        rows: Sequence[tuple[int, str, float]],
        *,
        monitor: str,
        mode: str,
        max_loss: float,
        after: float = 0.5,
        patience: int = 2,
    ) -> None:
        check_choice("mode", mode, ("min", "max"))
        if not max_loss > 0:
            raise ValueError(f"hopeless.max_loss={max_loss!r} must be above 0, or null")
        if not 0 <= after <= 1:
            raise ValueError(f"hopeless.after={after!r} must lie in [0, 1]")
        if patience < 1:
            raise ValueError(f"hopeless.patience={patience!r} must be 1 or more")
        self.reference = {step: value for step, name, value in rows if name == monitor}
        self.monitor, self.sign = monitor, 1.0 if mode == "min" else -1.0
        self.max_loss, self.after, self.patience = max_loss, after, patience
        self.misses, self._last = 0, float("nan")

    def loss(self, step: int, value: float) -> float | None:
        """Loss of a value against the dense one at the step, as a fraction; None: unknown.

        >>> curve = [(10, "val/elbo", -20.0), (20, "val/elbo", -10.0)]
        >>> GiveUp(curve, monitor="val/elbo", mode="max", max_loss=0.25).loss(15, -25.0)
        0.25
        """
        before = [at for at in self.reference if at <= step]
        if not before or self.reference[max(before)] == 0:
            return None
        dense = self.reference[max(before)]
        return self.sign * (value - dense) / abs(dense)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Check the epoch, if its value is new and the fraction `after` of the run is over.

        Raises:
            HopelessRunError: with both values.
        """
        value = float(trainer.callback_metrics.get(self.monitor, self._last))
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if value == self._last or epoch < self.after * epochs:
            return
        self._last = value
        loss = self.loss(trainer.fit_loop.total_batch_idx + 1, value)
        self.misses = self.misses + 1 if loss is not None and loss > self.max_loss else 0
        if self.misses >= self.patience:
            raise HopelessRunError(
                f"{self.monitor} is {value:.4g} after epoch {epoch} of {epochs}, {loss:.0%} worse "
                f"than the dense model there; more than {self.max_loss:.0%} prunes the run"
            )

    def state_dict(self) -> dict[str, float]:
        """The count of misses."""
        return {"misses": self.misses}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on counting."""
        self.misses = int(state_dict["misses"])


SEED = 12_345
BINS = 64


class LoggedPictures(Callback):
    """Log a grid of sample images and weight histograms, every few epochs and at the end.

    Samples come from the same latents every time, and drawing them leaves random streams as they
    are. TensorBoard and W&B get both, MLflow images only, other loggers nothing.

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
        """Log the final model, after the callbacks before this one."""
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, model: Any) -> None:
        loggers = [one for one in trainer.loggers if type(one).__name__ in LOG_FUNCTIONS]
        if not loggers or not trainer.is_global_zero:
            return
        grid = _samples(model, self.samples)
        weights = {
            name: weight.detach().float().cpu()
            for name, weight in model.named_parameters()
            if weight.dim() > 1
        }
        for logger in loggers:
            LOG_FUNCTIONS[type(logger).__name__](logger, grid, weights, trainer.global_step)


def _samples(model: Any, count: int) -> Tensor | None:
    """A grid (C, H, W) in [0, 1] of a model's samples; None for models without images."""
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


LogFunction = Callable[[Any, "Tensor | None", Mapping[str, Tensor], int], None]
LOG_FUNCTIONS: dict[str, LogFunction] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
}


class PlainProgress(Callback):
    """Progress as plain lines: epoch, seconds, and the metrics of the epoch.

    Args:
        label: name of the model in the lines.
        lines: about how many lines a run prints.
        stream: where to; None: standard output.

    >>> PlainProgress("dense", lines=5).lines
    5
    """

    def __init__(self, label: str, *, lines: int = 10, stream: TextIO | None = None) -> None:
        self.label, self.lines, self.stream = label, lines, stream
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Start the clock."""
        self._start = time.monotonic()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Print a line after the first, the last and every so many epochs."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        every = max(1, epochs // self.lines)
        if epoch % every and epoch not in (1, epochs):
            return
        shown = [f"{name} {float(value):.4g}" for name, value in trainer.callback_metrics.items()]
        seconds = time.monotonic() - self._start
        line = f"{self.label}: epoch {epoch}/{epochs}, {seconds:.0f} s, {', '.join(shown)}"
        print(line, file=self.stream or sys.stdout, flush=True)


def progress_callback(label: str) -> Callback:
    """A bar if standard output is a terminal, else plain lines.

    >>> type(progress_callback("dense")).__name__
    'PlainProgress'
    """
    return TQDMProgressBar() if sys.stdout.isatty() else PlainProgress(label)
