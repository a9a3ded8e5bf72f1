"""Command `federated`: clients in Flower's simulation, beside a centralised baseline.

The baseline is the experiment's dense model, trained on all rows in one place. What the clients
train together takes the place of the compressed one.
"""

from __future__ import annotations

import functools
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf

from lightning_compress.errors import require
from lightning_compress.federated.arrays import load_arrays, model_arrays
from lightning_compress.federated.partitions import partition_rows
from lightning_compress.lab.data import SplitDataModule
from lightning_compress.lab.report.wording import kilobytes
from lightning_compress.lab.workflow.quality import Evaluator, rows
from lightning_compress.lab.workflow.resume import Earlier
from lightning_compress.lab.workflow.run_identity import run_folder
from lightning_compress.lab.workflow.training import (
    FINAL,
    LAST,
    Trained,
    build_model,
    compression_callbacks,
)

__all__ = ["check_federated", "federated_training"]

CLIENTS = "clients"  # the folder of their states


def federated_training(
    cfg: DictConfig,
    data: SplitDataModule,
    folder: Path,
    evaluator: Evaluator,
    earlier: Earlier,  # noqa: ARG001 (its checkpoint lies in the folder already)
) -> tuple[Trained, dict[str, Any]]:
    """Train one model by many clients, resumable after each round.

    Returns:
        The global model, and the ledger under `"federated"`.

    Raises:
        MissingExtraError: without Flower.
        ValueError: for a setting out of its range.
    """
    require("flwr", extra="federated")
    from lightning_compress.federated import record_of, simulate, tensors_of_record
    from lightning_compress.federated.client import lightning_client

    settings = cfg.federated
    check_federated(settings)
    partition_rows(rows(data.train_dataset)[1], settings.clients, settings.partition)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # the progress says the same, a line a round
    model = build_model(cfg, data, seed=cfg.seed)
    up, down = (_codec(settings, way, model) for way in ("up", "down"))
    home, start = folder / "compressed", time.monotonic()
    home.mkdir(exist_ok=True)
    _carry_states(cfg, folder)
    text = OmegaConf.to_yaml(cfg, resolve=True)
    make = _ClientModel(text)
    app = lightning_client(
        make,
        _ClientData(text),
        up=up,
        down=down,
        local_epochs=settings.local_epochs,
        keep_optimizer=settings.keep_optimizer,
        callbacks=_ClientCallbacks(text),
        trainer=_trainer_settings(cfg),
        folder=folder / CLIENTS,
    )
    measure = _Measure(model, evaluator, settings.evaluate_every, settings.rounds)
    strategy = _strategy(cfg, up, down, home / LAST, _Progress(settings.rounds, evaluator.metric))

    def serve(grid: Any) -> Any:
        def evaluate(number: int, arrays: Any) -> Any:
            return measure(number, tensors_of_record(arrays))

        first = record_of(model_arrays(build_model(cfg, data, seed=cfg.seed)))
        return strategy.start(
            grid,
            first,
            num_rounds=settings.rounds,
            timeout=settings.timeout,
            evaluate_fn=evaluate,
        )

    simulate(
        app,
        serve,
        clients=settings.clients,
        cpus=settings.cpus,
        cpus_each=settings.cpus_each,
        gpus_each=settings.gpus_each,
    )
    load_arrays(model, strategy.exact)
    if settings.distillation is not None:
        model = _distilled(cfg, data, strategy.models)
    steps = _local_steps(cfg, data) * settings.rounds
    torch.save({"state_dict": model.state_dict(), "global_step": steps}, home / FINAL)
    trained = Trained(model, _curve(strategy.rounds, steps), steps, time.monotonic() - start)
    return trained, {"federated": _summary(cfg, strategy.rounds, model)}


def check_federated(settings: DictConfig) -> None:
    """Refuse wrong values of the `federated` settings, before the dense model trains.

    Raises:
        ValueError: with the key, the value and what is expected.
    """
    for key in ("clients", "rounds", "local_epochs", "evaluate_every"):
        if not isinstance(settings[key], int) or settings[key] < 1:
            raise ValueError(
                f"federated.{key}={settings[key]!r}: expected an integer of at least 1"
            )
    if isinstance(settings.fraction, str) or not 0 < settings.fraction <= 1:
        raise ValueError(f"federated.fraction={settings.fraction!r}: expected above 0, at most 1")


def _codec(settings: DictConfig, way: str, model: Any) -> Any:
    """The codec of a direction; what is not deployed is sent as `equipment` says."""
    deployed = tuple(getattr(model, "deployed", ()))
    others = [name for name, _ in model.named_children() if deployed and name not in deployed]
    rules = {f"{name}.*": settings.equipment for name in others}
    given = OmegaConf.to_container(settings[way].rules, resolve=True)
    return instantiate(settings[way], rules={**given, **rules}, _convert_="all")  # pyright: ignore


def _distilled(
    cfg: DictConfig, data: SplitDataModule, clients: Sequence[tuple[float, dict[str, torch.Tensor]]]
) -> LightningModule:
    """A student of the clients' models of the last round, from samples of their generators.

    Raises:
        ValueError: when these models are gone, since the run was resumed after its last round.
    """
    from lightning_compress.federated import distill_samples

    if not clients:
        raise ValueError(
            "federated.distillation needs the clients' models of the last round, which no "
            "checkpoint holds: run again without ckpt_path"
        )
    teachers = []
    for _, arrays in clients:
        teacher = build_model(cfg, data, seed=cfg.seed)
        load_arrays(teacher, arrays)
        teachers.append(teacher.requires_grad_(False))
    return distill_samples(
        build_model(cfg, data, seed=cfg.seed),
        teachers,
        weights=[weight for weight, _ in clients],
        seed=cfg.seed,
        accelerator=cfg.trainer.accelerator,
        **cfg.federated.distillation,
    )


def _carry_states(cfg: DictConfig, folder: Path) -> None:
    """Copy the clients' states of the run that is resumed."""
    if cfg.ckpt_path is None:
        return
    source = run_folder(cfg.ckpt_path) / CLIENTS
    if source.is_dir() and source.resolve() != (folder / CLIENTS).resolve():
        shutil.copytree(source, folder / CLIENTS, dirs_exist_ok=True)


def _strategy(cfg: DictConfig, up: Any, down: Any, checkpoint: Path, progress: Any) -> Any:
    from lightning_compress.federated import CompressedStrategy

    settings = cfg.federated
    inner = instantiate(
        settings.strategy,
        fraction_train=float(settings.fraction),
        fraction_evaluate=0.0,
        min_train_nodes=1,
        min_available_nodes=settings.clients,
        _convert_="all",
    )
    return CompressedStrategy(
        inner,
        up=up,
        down=down,
        seed=cfg.seed,
        checkpoint=checkpoint,
        on_round=progress,
        hello_timeout=settings.timeout,
    )


def _trainer_settings(cfg: DictConfig) -> dict[str, Any]:
    """Settings of the trainer's config that apply to a client's rounds."""
    names = ("accelerator", "precision", "accumulate_grad_batches", "gradient_clip_val",
             "limit_train_batches")  # fmt: skip
    return {name: cfg.trainer[name] for name in names if cfg.trainer.get(name) is not None}


@functools.lru_cache(maxsize=2)
def _data_of(text: str) -> tuple[DictConfig, SplitDataModule, list[torch.Tensor]]:
    """The config, the data and the clients' rows; read once a process."""
    cfg = OmegaConf.create(text)
    assert isinstance(cfg, DictConfig)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    data: SplitDataModule = instantiate(cfg.data, _convert_="all")
    data.setup()
    _, labels = rows(data.train_dataset)
    settings = cfg.federated
    return cfg, data, partition_rows(labels, settings.clients, settings.partition, seed=cfg.seed)


@dataclass(frozen=True)
class _ClientModel:
    """Factory of the configured model, from the config alone: it is pickled to other processes."""

    text: str

    def __call__(self) -> LightningModule:
        cfg, data, _ = _data_of(self.text)
        return build_model(cfg, data, seed=cfg.seed)


@dataclass(frozen=True)
class _ClientData:
    """A client's rows, in another order each round."""

    text: str

    def __call__(self, now: Any) -> LightningDataModule:
        _, data, parts = _data_of(self.text)
        return data.part(parts[int(now.name)], seed=now.seed)


@dataclass(frozen=True)
class _ClientCallbacks:
    """The callbacks of a client's round, built anew."""

    text: str

    def __call__(self, now: Any) -> Sequence[Callback]:  # noqa: ARG002
        cfg, _, _ = _data_of(self.text)
        built = [instantiate(one, _convert_="all") for one in cfg.federated.callbacks.values()]
        return [*built, *compression_callbacks(cfg.compression, get_class(cfg.model._target_))]


class _Measure:
    """The global model's quality, at every so many rounds and after the last."""

    def __init__(self, model: Any, evaluator: Evaluator, every: int, last: int) -> None:
        self.model, self.evaluator, self.every, self.last = model, evaluator, every, last

    def __call__(self, number: int, arrays: dict[str, torch.Tensor]) -> Any:
        from flwr.app import MetricRecord  # pyright: ignore[reportMissingImports]

        if number == 0 or (number % self.every and number != self.last):
            return None
        load_arrays(self.model, arrays)
        quality = self.evaluator.quality(self.model.cpu().eval())
        return MetricRecord({name: float(value) for name, value in quality.items()})


class _Progress:
    """One line a round."""

    def __init__(self, last: int, metric: str) -> None:
        self.last, self.metric = last, metric

    def __call__(self, row: dict[str, Any]) -> None:
        found = row.get("quality", {}).get(self.metric)
        words = [
            f"round {row['round']}/{self.last}: {row['clients']} clients",
            f"up {kilobytes(row['up'])}, down {kilobytes(row['down'])}",
            *([] if found is None else [f"{self.metric} {found:.4g}"]),
            f"{row['seconds']:.1f} s",
        ]
        print(", ".join(words), flush=True)
        for name, reason in row["refused"].items():
            print(f"  client {name} is left out: {reason}", file=sys.stderr, flush=True)
        if not row["clients"]:
            reasons = "; ".join(sorted(set(row["refused"].values()))) or "nobody answered"
            raise ValueError(f"round {row['round']}: no client's update could be used: {reasons}")


def _local_steps(cfg: DictConfig, data: SplitDataModule) -> int:
    """Optimizer steps of all clients together in a round, each as long as the baseline's."""
    share = cfg.federated.fraction * cfg.federated.local_epochs
    return max(1, round(share * len(data.train_dataset) / data.batch_size))


def _curve(ledger: Sequence[dict[str, Any]], steps: int) -> list[tuple[int, str, float]]:
    each = steps // max(len(ledger), 1)
    return [
        (each * row["round"], f"federated/{name}", float(value))
        for row in ledger
        for name, value in row.get("quality", {}).items()
    ]


def _codec_seconds(ledger: Sequence[dict[str, Any]]) -> float:
    """Of the server, and of the slowest client of each round."""
    return sum(row["codec_seconds"] + row["client_codec_seconds"] for row in ledger)


def _summary(
    cfg: DictConfig, ledger: Sequence[dict[str, Any]], model: LightningModule
) -> dict[str, Any]:
    """The ledger and its sums, with what 32-bit models both ways would have taken."""
    settings = cfg.federated
    up, down = (sum(row[way] for row in ledger) for way in ("up", "down"))
    floats = sum(4 * one.numel() for one in model.state_dict().values() if one.is_floating_point())
    plain = floats * sum(row["clients"] + len(row["refused"]) for row in ledger)
    seconds = sum(row["seconds"] for row in ledger)
    return {
        "clients": settings.clients,
        "fraction": settings.fraction,
        "local_epochs": settings.local_epochs,
        "partition": settings.partition,
        "strategy": settings.strategy._target_,
        "up": up,
        "down": down,
        "fp32_each_way": plain,
        "ratio_up": plain / up if up else None,
        "ratio": 2 * plain / (up + down) if up + down else None,
        "codec_share": _codec_seconds(ledger) / seconds if seconds else None,
        "rounds": [dict(row) for row in ledger],
    }
