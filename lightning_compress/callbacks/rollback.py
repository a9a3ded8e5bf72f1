"""Save points of a model in training: weights, optimizers, averages and callbacks; roll back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.budget.levers import Steerable
from lightning_compress.budget.reference import predicted_bytes
from lightning_compress.budget.snapshot import (
    all_tensors,
    regrow,
    regrow_average,
    restore_masks,
    restore_snapshot,
    take_snapshot,
)
from lightning_compress.callbacks.base import WeightCallback
from lightning_compress.callbacks.knowledge_distillation import KnowledgeDistillation
from lightning_compress.callbacks.mask_callback import MaskCallback
from lightning_compress.callbacks.namespaces import averages_weights
from lightning_compress.callbacks.protocols import FollowsReturn
from lightning_compress.callbacks.quantization_aware_training import (
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lightning_compress.channels.graph import Kept
from lightning_compress.channels.resize import compose, structure_of

__all__ = ["bytes_now", "follow_removal", "make_save_point", "roll_back", "steerable_callbacks"]

SavePoint = dict[str, Any]


def steerable_callbacks(trainer: Trainer) -> list[Any]:
    """Callbacks whose state belongs to the weights of one step, and that a budget steers."""
    others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in others if isinstance(one, WeightCallback) and isinstance(one, Steerable)]


def bytes_now(trainer: Trainer, module: LightningModule) -> float:
    """Predicted bytes, with the bits that weights get when training has ended."""
    later: dict[str, int] = {}
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, PostTrainingQuantization):
            later |= {row.path: one.weight_bits for row in one.coverage if row.selected}
    return predicted_bytes(module, later)


def make_save_point(trainer: Trainer, module: LightningModule) -> SavePoint:
    """Save point of a run: weights, masks, optimizers, averages and state of callbacks."""
    return {
        "model": take_snapshot(module, trainer.optimizers),
        "callbacks": {one.state_key: one.snapshot() for one in steerable_callbacks(trainer)},
        "averages": [
            {
                "tensors": {name: each.detach().clone() for name, each in all_tensors(one).items()},
                "structure": structure_of(one),
            }
            for one, _ in _averages(trainer)
        ],
        "lost": {},
    }


def follow_removal(save_point: SavePoint, kept: Kept) -> None:
    """Record in a save point which of its channels were removed since."""
    save_point["lost"] = compose(save_point["lost"], kept)


def roll_back(
    trainer: Trainer, module: LightningModule, save_point: SavePoint, *, soft: bool = False
) -> None:
    """Roll back to a save point, between two steps; `soft`: masks, grids and channels alone.

    Channels that were removed since are restored physically, from the save point: a model on trial
    is then the very model that would be deployed, in size, speed and statistics, and no second way
    of masking is needed that would have to agree with masks, grids, averages and norms.
    """
    for one in steerable_callbacks(trainer):
        one.roll_back_to(save_point["callbacks"][one.state_key])
    lost, save_point["lost"] = save_point["lost"], {}
    grown = regrow(module, trainer.optimizers, save_point["model"], lost)
    if soft:
        restore_masks(module, save_point["model"])
    else:
        restore_snapshot(module, trainer.optimizers, save_point["model"])
    _show(trainer)
    _take_back_averages(trainer, save_point["averages"], lost if grown else None, soft=soft)
    for one in trainer.callbacks if grown else ():  # type: ignore[attr-defined]
        if isinstance(one, FollowsReturn):
            one.on_channels_restored(module)


def _show(trainer: Trainer) -> None:
    for one in steerable_callbacks(trainer):
        if isinstance(one, MaskCallback):
            one.project()
        elif isinstance(one, QuantizationAwareTraining) and one.weights and one.started:
            one.weights.show()


def _take_back_averages(
    trainer: Trainer, save_points: Sequence[SavePoint], lost: Kept | None, *, soft: bool
) -> None:
    """Restore averages; `soft`: their sizes alone, where `lost` has the remaining channels."""
    for (average, prefix), then in zip(_averages(trainer), save_points, strict=True):
        if lost is not None:
            own = {prefix + path: dims for path, dims in lost.items()}
            regrow_average(average, then["tensors"], then["structure"], own)
        if not soft:
            _fill(average, then["tensors"])


@torch.no_grad()
def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, one in all_tensors(module).items():
        one.copy_(tensors[name])


def _averages(trainer: Trainer) -> list[tuple[nn.Module, str]]:
    """Copies of the model that hold averages of it, and what their names begin with."""
    found: list[tuple[nn.Module, str]] = []
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if averages_weights(one, swa=False) and one._average_model is not None:
            found.append((one._average_model, "module."))
        elif isinstance(one, KnowledgeDistillation) and one.average is not None:
            found.append((one.average, ""))
    return found
