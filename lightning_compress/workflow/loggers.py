"""Loggers whose files lie in the run's own folder, and what closes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_compress.errors import require

__all__ = ["close_loggers", "mlflow_logger", "wandb_logger"]


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
