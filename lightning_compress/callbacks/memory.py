"""A model in a Trainer as it is at a moment, with the callbacks that made it so, to go back to."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from lightning_compress.adaptive.sizes import predicted_bytes
from lightning_compress.adaptive.snapshots import restore_masks, restore_snapshot, take_snapshot
from lightning_compress.callbacks.base import WeightCallback
from lightning_compress.callbacks.masking import MaskCallback
from lightning_compress.callbacks.post_training import PostTrainingQuantization
from lightning_compress.callbacks.quantization import QuantizationAwareTraining

__all__ = ["bytes_now", "go_back", "remember", "steered"]

Memory = dict[str, Any]


def steered(trainer: Trainer) -> list[Any]:
    """Callbacks whose state belongs to the weights of a moment."""
    others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in others if isinstance(one, WeightCallback) and hasattr(one, "back_to")]


def bytes_now(trainer: Trainer, module: LightningModule) -> float:
    """Predicted bytes, with the bits that weights get when training has ended."""
    later: dict[str, int] = {}
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, PostTrainingQuantization):
            later |= {row.path: one.weight_bits for row in one.coverage if row.selected}
    return predicted_bytes(module, later)


def remember(trainer: Trainer, module: LightningModule) -> Memory:
    """Weights, masks, optimizers, averages, and what callbacks know of them."""
    averages = [one._average_model for one in _averaging(trainer)]
    return {
        "model": take_snapshot(module, trainer.optimizers),
        "callbacks": {one.state_key: one.snapshot() for one in steered(trainer)},
        "averages": [
            None if one is None else {key: each.clone() for key, each in one.state_dict().items()}
            for one in averages
        ],
    }


def go_back(
    trainer: Trainer, module: LightningModule, memory: Memory, *, soft: bool = False
) -> None:
    """Put everything back, between two steps; `soft`: masks and grids alone."""
    for one in steered(trainer):
        one.back_to(memory["callbacks"][one.state_key])
    if soft:
        restore_masks(module, memory["model"])
    else:
        restore_snapshot(module, trainer.optimizers, memory["model"])
    for one in steered(trainer):
        if isinstance(one, MaskCallback):
            one.project()
        elif isinstance(one, QuantizationAwareTraining) and one.weights and one.started:
            one.weights.show()
    for one, state in zip(_averaging(trainer), memory["averages"], strict=True) if not soft else ():
        if one._average_model is not None and state is not None:
            one._average_model.load_state_dict(state)


def _averaging(trainer: Trainer) -> list[Any]:
    others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in others if isinstance(one, WeightAveraging)]
