"""Train one model of an experiment, dense or compressed, resumable at every epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import DictConfig
from torch import nn

from lightning_compress.callbacks import RandomState, StopOnNonFinite
from lightning_compress.callbacks.recipe import KINDS
from lightning_compress.channels.resize import rebuild_channels
from lightning_compress.errors import TargetError, require
from lightning_compress.lab.checkpointing import EpochCheckpoint
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.monitoring import History, LoggedPictures, progress_callback

__all__ = [
    "InterruptedRunError",
    "Trained",
    "build_model",
    "close_loggers",
    "compression_callbacks",
    "load_trained",
    "mlflow_logger",
    "take_weights",
    "train",
    "wandb_logger",
]


def mlflow_logger(save_dir: str, *, tracking_uri: str | None = None, **options: Any) -> Any:
    """Lightning's MLFlowLogger with a SQLite store; MLflow no longer takes a folder of files.

    Args:
        save_dir: the run's folder; without a `tracking_uri` the store lies in `mlflow` there.
        tracking_uri: of a store that runs share, such as `sqlite:///mlflow.db`.
        options: of `MLFlowLogger`.

    Raises:
        MissingExtraError: when mlflow is not installed.
    """
    require("mlflow", extra="mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    home = Path(save_dir).absolute() / "mlflow"
    if tracking_uri is None:
        home.mkdir(parents=True, exist_ok=True)
        tracking_uri = f"sqlite:///{home / 'mlflow.db'}"
        options = {"artifact_location": (home / "artifacts").as_uri(), **options}
    return MLFlowLogger(tracking_uri=tracking_uri, save_dir=save_dir, **options)


def wandb_logger(save_dir: str, **options: Any) -> Any:
    """Lightning's WandbLogger with its files in `wandb` in the run's folder.

    Args:
        save_dir: the run's folder.
        options: of `WandbLogger`.

    Raises:
        MissingExtraError: when wandb is not installed.
    """
    require("wandb", extra="wandb")
    from lightning.pytorch.loggers import WandbLogger

    Path(save_dir).mkdir(parents=True, exist_ok=True)
    return WandbLogger(save_dir=save_dir, **options)


def close_loggers(loggers: Iterable[Any]) -> None:
    """End what a logger would carry over into the next training of the same process."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


RECIPE = "lightning_compress.compression_recipe"
FINAL, LAST, INTERRUPTED = "final.ckpt", "last.ckpt", "interrupted.ckpt"


class InterruptedRunError(RuntimeError):
    """A run that was stopped by Ctrl-C or SIGTERM; what it had is in its folder, to go on from."""


@dataclass(frozen=True)
class Trained:
    """A trained model: its curve, optimizer steps and seconds of training."""

    model: LightningModule
    rows: list[tuple[int, str, float]]
    steps: int
    seconds: float


def build_model(cfg: DictConfig, data: SplitDataModule, *, seed: int) -> LightningModule:
    """The configured model with its sizes taken from the data, weights drawn from the seed.

    Raises:
        ValueError: when the data cannot feed the model.
    """
    missing = [key for key, value in cfg.model.items() if value is None and key in data.dims]
    sizes = {key: data.dims[key] for key in missing}
    needed = getattr(get_class(cfg.model._target_), "data_kinds", None)
    if needed is not None and data.kind not in needed:
        raise ValueError(
            f"model {cfg.model._target_} takes data of kind {list(needed)}, "
            f"but {cfg.data._target_} gives {data.kind!r}"
        )
    seed_everything(seed, verbose=False)
    return instantiate(cfg.model, **sizes, _convert_="all")


def compression_callbacks(
    settings: DictConfig, model: Any, *, irreducible: Mapping[str, float] | None = None
) -> list[Callback]:
    """The callbacks of the config's `compression`; those of a recipe are made for the model.

    Args:
        settings: by method, or a recipe.
        model: the model, or its class.
        irreducible: values of logged metrics that no model can better.
    """
    found: list[Callback] = []
    for one in settings.values():
        if one._target_ != RECIPE:
            found.append(instantiate(one, _convert_="all"))
            continue
        kind = model if isinstance(model, nn.Module) else _kind_of_class(model)
        given: dict[str, Any] = {"model": kind} if one.model is None else {}
        if one.irreducible is None:
            given["irreducible"] = (irreducible or {}).get(one.monitor, 0.0)
        found += instantiate(one, _convert_="all", _partial_=True)(**given)
    return found


def _kind_of_class(kind: Any) -> str:
    return kind.kind if getattr(kind, "kind", None) in KINDS else "other"


def train(
    cfg: DictConfig,
    data: SplitDataModule,
    folder: Path,
    *,
    seed: int,
    callbacks: Sequence[Callback] = (),
    ckpt_path: Path | None = None,
    start: nn.Module | None = None,
) -> Trained:
    """Train the configured model; the folder gets a checkpoint an epoch and a final one.

    Args:
        cfg: the whole config.
        data: the data, set up.
        folder: of this model, such as `<run>/dense`.
        seed: of weights and noise.
        callbacks: compression and measurement, before the app's own.
        ckpt_path: an interrupted training's checkpoint.
        start: a model whose weights this one begins with, see `take_weights`.

    Raises:
        InterruptedRunError: after Ctrl-C or SIGTERM.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, history, begun = build_model(cfg, data, seed=seed), History(), time.monotonic()
    if start is not None:
        take_weights(model, start)
    extra = instantiate(cfg.callbacks, _convert_="all") or {}
    trainer: Trainer = instantiate(
        cfg.trainer,
        default_root_dir=folder,
        logger=_loggers(cfg, folder),
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
        enable_checkpointing=True,
        callbacks=[
            *callbacks,
            *extra.values(),
            StopOnNonFinite(),
            RandomState(),
            history,
            LoggedPictures(),
            progress_callback(folder.name),
            EpochCheckpoint(folder / LAST, folder / INTERRUPTED),
        ],
        _convert_="all",
    )
    try:
        _fit(trainer, model, data, ckpt_path)
    finally:
        close_loggers(trainer.loggers)
    trainer.save_checkpoint(folder / FINAL)
    (folder / INTERRUPTED).unlink(missing_ok=True)
    if trainer.received_sigterm:  # after the last batch, when nothing looks for it any more
        raise InterruptedRunError(f"interrupted after the training of {folder.name}")
    return Trained(model, history.rows, trainer.global_step, time.monotonic() - begun)


def take_weights(model: nn.Module, other: nn.Module) -> None:
    """Give a model the weights of another one, child by child.

    A child whose tensors differ in name or size, such as a narrower decoder, keeps its own weights
    and is named.

    Args:
        model: changed in place.
        other: such as the dense model.

    Raises:
        ValueError: when no child fits, or when one does not that is frozen: nothing would train it.
    """
    ours, theirs = _children(model), _children(other)
    kept = sorted(name for name in ours if _sizes(ours[name]) != _sizes(theirs.get(name, {})))
    trained = {
        name.partition(".")[0] for name, one in model.named_parameters() if one.requires_grad
    }
    if stuck := sorted({*kept} - trained):
        raise ValueError(
            f"start=dense: {stuck} of the compressed model differ in size from the dense model's "
            "and are frozen: they would stay as drawn; give them the dense model's sizes"
        )
    if len(kept) == len(ours):
        raise ValueError(f"start=dense: no part fits the dense model's: {kept} differ in size")
    if kept:
        rank_zero_info(f"start=dense: {kept} differ in size and keep weights of their own")
    for child in ours.keys() - {*kept}:
        model.load_state_dict(theirs[child], strict=False)


def _children(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The state of each child module, by full names."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        found.setdefault(name.partition(".")[0], {})[name] = tensor
    return found


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def load_trained(cfg: DictConfig, data: SplitDataModule, path: Path) -> Trained:
    """A model and its curve from a checkpoint; nothing in the file is executed.

    Raises:
        FileNotFoundError: without such a file.
        ValueError: when its weights do not fit the configured model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = build_model(cfg, data, seed=cfg.seed)
    try:
        rebuild_channels(model, checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TargetError) as error:
        raise ValueError(f"{path} does not fit the model {cfg.model._target_}: {error}") from error
    rows = checkpoint.get("callbacks", {}).get("History", {}).get("rows", [])
    return Trained(model, [tuple(row) for row in rows], checkpoint["global_step"], 0.0)


def _loggers(cfg: DictConfig, folder: Path) -> list[Any] | bool:
    built = [instantiate(one, save_dir=str(folder)) for one in (cfg.logger or {}).values()]
    return built or False


def _fit(
    trainer: Trainer, model: LightningModule, data: SplitDataModule, ckpt_path: Path | None
) -> None:
    try:
        resumed = None if ckpt_path is None else str(ckpt_path)
        trainer.fit(model, datamodule=data, ckpt_path=resumed)
    except SystemExit as stop:  # what Lightning makes of Ctrl-C and SIGTERM
        if trainer.interrupted:
            raise InterruptedRunError(f"interrupted in epoch {trainer.current_epoch}") from stop
        raise
