"""A model in a Trainer as it is at a moment, with the callbacks that made it so, to go back to."""

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

__all__ = ["bytes_now", "go_back", "lose", "remember", "steered"]

Memory = dict[str, Any]


def steered(trainer: Trainer) -> list[Any]:
    """Callbacks whose state belongs to the weights of a moment."""
    others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in others if isinstance(one, WeightCallback) and isinstance(one, Steerable)]


def bytes_now(trainer: Trainer, module: LightningModule) -> float:
    """Predicted bytes, with the bits that weights get when training has ended."""
    later: dict[str, int] = {}
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, PostTrainingQuantization):
            later |= {row.path: one.weight_bits for row in one.coverage if row.selected}
    return predicted_bytes(module, later)


def remember(trainer: Trainer, module: LightningModule) -> Memory:
    """Weights, masks, optimizers, averages, and what callbacks know of them."""
    return {
        "model": take_snapshot(module, trainer.optimizers),
        "callbacks": {one.state_key: one.snapshot() for one in steered(trainer)},
        "averages": [
            {
                "tensors": {name: each.detach().clone() for name, each in all_tensors(one).items()},
                "structure": structure_of(one),
            }
            for one, _ in _averages(trainer)
        ],
        "lost": {},
    }


def lose(memory: Memory, kept: Kept) -> None:
    """Follow a removal of channels: which entries of the remembered model are still there."""
    memory["lost"] = compose(memory["lost"], kept)


def go_back(
    trainer: Trainer, module: LightningModule, memory: Memory, *, soft: bool = False
) -> None:
    """Put everything back, between two steps; `soft`: masks, grids and channels alone.

    Channels that were removed since come back physically, from the copy in memory: a model on
    trial is then the very model that would ship, in size, speed and statistics, and no second way
    of masking is needed that would have to agree with masks, grids, averages and norms.
    """
    for one in steered(trainer):
        one.back_to(memory["callbacks"][one.state_key])
    lost, memory["lost"] = memory["lost"], {}
    grown = regrow(module, trainer.optimizers, memory["model"], lost)
    if soft:
        restore_masks(module, memory["model"])
    else:
        restore_snapshot(module, trainer.optimizers, memory["model"])
    _show(trainer)
    _take_back_averages(trainer, memory["averages"], lost if grown else None, soft=soft)
    for one in trainer.callbacks if grown else ():  # type: ignore[attr-defined]
        if isinstance(one, FollowsReturn):
            one.on_channels_restored(module)


def _show(trainer: Trainer) -> None:
    for one in steered(trainer):
        if isinstance(one, MaskCallback):
            one.project()
        elif isinstance(one, QuantizationAwareTraining) and one.weights and one.started:
            one.weights.show()


def _take_back_averages(
    trainer: Trainer, memories: Sequence[Memory], lost: Kept | None, *, soft: bool
) -> None:
    """Averages as they were; `soft`: in the sizes that they had, where `lost` says what is left."""
    for (average, prefix), then in zip(_averages(trainer), memories, strict=True):
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
