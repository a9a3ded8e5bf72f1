"""Flower client of a LightningModule and a DataModule: Lightning trains, the mod compresses."""

# Flower is an extra: pyright also runs where it is not installed.
# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from torch import Tensor

from lightning_compress.federated.arrays import load_arrays, model_arrays
from lightning_compress.federated.messages import arrays_key, record_of, tensors_of_record
from lightning_compress.federated.mod import CompressedUpdates, client_name, store_of
from lightning_compress.federated.strategy import refuse_secure_aggregation
from lightning_compress.federated.updates import UpdateCodec

__all__ = ["ClientRound", "ProximalTerm", "lightning_client"]

PART = "training"
_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "devices": 1,
}


@dataclass(frozen=True)
class ClientRound:
    """One round of one client.

    Args:
        name: of the client: its partition's number where there is one.
        number: of the round, from 1.
        partitions: how many there are; None: the node does not say.
        config: what the strategy sent, such as FedProx's `proximal-mu`.
    """

    name: str
    number: int
    partitions: int | None
    config: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """Seed of the client's noise in this round.

        >>> ClientRound("3", 1, 10, {}).seed == ClientRound("3", 1, 10, {}).seed
        True
        """
        text = f"{self.name}-{self.number}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")


class ProximalTerm(Callback):
    """Adds `mu / 2 * |w - w_global|^2` to the loss, as FedProx asks its clients to.

    Li et al. 2020, https://arxiv.org/abs/1812.06127. The gradient `mu * (w - w_global)` is added
    before each optimizer step, so that it enters neither logs nor automatic differentiation.

    Args:
        mu: weight of the term.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self.start: dict[int, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keep the global model."""
        self.start = {id(one): one.detach().clone() for one in pl_module.parameters()}

    @torch.no_grad()
    def on_before_optimizer_step(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Add the term's gradient."""
        for group in optimizer.param_groups:
            for one in group["params"]:
                if one.grad is not None and id(one) in self.start:
                    one.grad.add_(one - self.start[id(one)], alpha=self.mu)


class _OptimizerState(Callback):
    """Restores the optimizers' states of the last round, and saves those of this one."""

    def __init__(self, states: Sequence[dict[str, Any]] | None) -> None:
        self.states = states
        self.kept: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        for optimizer, state in zip(trainer.optimizers, self.states or (), strict=False):
            optimizer.load_state_dict(state)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.kept = [optimizer.state_dict() for optimizer in trainer.optimizers]


def lightning_client(
    module: Callable[[], LightningModule],
    data: Callable[[ClientRound], LightningDataModule],
    *,
    up: UpdateCodec,
    down: UpdateCodec,
    local_epochs: int = 1,
    keep_optimizer: bool = False,
    callbacks: Callable[[ClientRound], Sequence[Callback]] | None = None,
    trainer: Mapping[str, Any] | None = None,
    shared_start: bool = True,
    folder: Path | None = None,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """A Flower `ClientApp` that trains a LightningModule and sends compressed updates.

    Args:
        module: makes the module; with the same weights everywhere if `shared_start` is set.
        data: makes a client's DataModule for a round.
        up: codec of the client's updates.
        down: codec of the server's.
        local_epochs: epochs a round.
        keep_optimizer: optimizers go on where the client's last round left them; False: anew.
        callbacks: Lightning callbacks of a client's round, ours among them.
        trainer: further arguments of Lightning's `Trainer`.
        shared_start: the factory gives the server the same weights (it seeds itself), so that the
            first model need not be sent; where it does not, the client asks for it.
        folder: where clients keep their state; None: in Flower's context.
        mods: further Flower mods, which see whole models.

    Raises:
        ValueError: for a mod of secure aggregation.
    """
    refuse_secure_aggregation(*mods)
    settings = {**_QUIET, **(trainer or {})}
    initial = (lambda: model_arrays(module())) if shared_start else None
    compressed = CompressedUpdates(up, down, initial=initial, folder=folder)
    app = ClientApp(mods=[compressed, *mods])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        now = _round_of(message, context)
        store = store_of(context, folder)
        seed_everything(now.seed, verbose=False)
        model, source = _loaded(module, message), data(now)
        before = store.load(PART, now.number) if keep_optimizer else None
        optimizers = _OptimizerState(before["optimizers"] if before else None)
        extra = list(callbacks(now)) if callbacks is not None else []
        if (mu := float(now.config.get("proximal-mu", 0.0))) > 0:
            extra.append(ProximalTerm(mu))
        fit = Trainer(max_epochs=local_epochs, callbacks=[*extra, optimizers], **settings)
        fit.fit(model, datamodule=source)
        if keep_optimizer:
            store.save(PART, now.number, {"optimizers": optimizers.kept})
        return _replied(message, {**_metrics(fit), "num-examples": _examples(fit)}, model)

    compressed.answer(app)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        now = _round_of(message, context)
        model, source = _loaded(module, message), data(now)
        judge = Trainer(**{**settings, "limit_val_batches": None})
        judge.validate(model, datamodule=source, verbose=False)
        loaders: Any = judge.val_dataloaders
        rows = len(loaders.dataset) if hasattr(loaders, "dataset") else 1
        return _replied(message, {**_metrics(judge), "num-examples": rows}, None)

    return app


def _round_of(message: Message, context: Context) -> ClientRound:
    config: dict[str, Any] = {}
    for record in message.content.config_records.values():
        config |= dict(record)
    count = context.node_config.get("num-partitions")
    return ClientRound(
        name=client_name(context),
        number=int(config.get("server-round", 0)),
        partitions=int(count) if isinstance(count, (int, str)) else None,
        config=config,
    )


def _loaded(module: Callable[[], LightningModule], message: Message) -> LightningModule:
    model = module()
    key = arrays_key(message.content)
    load_arrays(model, tensors_of_record(message.content.array_records[key]))
    return model


def _metrics(trainer: Trainer) -> dict[str, float]:
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _examples(trainer: Trainer) -> int:
    loader: Any = trainer.train_dataloader
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):  # a stream has no length
        return int(trainer.num_training_batches) * int(getattr(loader, "batch_size", 1) or 1)


def _replied(
    message: Message, metrics: Mapping[str, float], model: LightningModule | None
) -> Message:
    content = RecordDict({"metrics": MetricRecord(dict(metrics))})
    if model is not None:
        content[arrays_key(message.content)] = record_of(model_arrays(model))
    return Message(content, reply_to=message)
