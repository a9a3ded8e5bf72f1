"""Sizes of a snapshot again: channels that were removed since come back into a model in training.

They come back with the weights, masks and momenta that they had; what stayed is as it is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.adaptive.snapshots import Snapshot, all_tensors, mask_in, slots_of
from lightning_compress.pruning.channel_growth import grow, overlay
from lightning_compress.pruning.channels import Kept

__all__ = ["regrow", "regrow_average"]


@torch.no_grad()
def regrow(
    module: nn.Module, optimizers: Sequence[Optimizer], snapshot: Snapshot, lost: Kept
) -> bool:
    """Give a module in training, and its optimizers, the sizes of a snapshot.

    Between two steps; nothing is projected.

    Args:
        module: changed in place; its parameters stay the objects that they are.
        optimizers: all of them.
        snapshot: as `take_snapshot` made it.
        lost: the entries of its tensors that are still there, by path and axis.

    Returns:
        Whether any size changed.
    """
    changed = _changed(module, snapshot["tensors"])
    if not changed:
        return False
    _regrow_states(optimizers, changed, snapshot, lost)
    slots = {name: slot for name, slot in slots_of(module).items() if name in changed}
    masks = {}
    for name, slot in slots.items():
        if slot.pruned is not None:
            then = mask_in(snapshot, name)
            whole = torch.ones(snapshot["tensors"][name].shape, dtype=torch.bool)
            masks[name] = overlay(whole if then is None else then, ~slot.pruned, lost[name])
    now = {**changed, **{name: slot.forget() for name, slot in slots.items()}}
    before = {**snapshot["tensors"], **snapshot["hidden"]}
    grown = {name: overlay(before[name], one.detach(), lost[name]) for name, one in now.items()}
    grow(module, grown, snapshot["structure"])
    for name, mask in masks.items():
        slots[name].set_mask(mask)
    return True


@torch.no_grad()
def regrow_average(
    average: nn.Module, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], lost: Kept
) -> None:
    """The same for a copy of a module that holds an average; all by the names of the copy.

    Args:
        average: changed in place.
        tensors: that it had.
        structure: of then, as `structure_of` has it.
        lost: the entries of these tensors that are still there.
    """
    changed = _changed(average, tensors)
    grown = {name: overlay(tensors[name], one, lost[name]) for name, one in changed.items()}
    grow(average, grown, structure)


def _changed(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    now = all_tensors(module)
    return {name: one for name, one in now.items() if one.shape != tensors[name].shape}


def _regrow_states(
    optimizers: Sequence[Optimizer], changed: Mapping[str, Tensor], snapshot: Snapshot, lost: Kept
) -> None:
    for optimizer, then in zip(optimizers, snapshot["optimizers"], strict=True):
        for name, parameter in changed.items():
            state = optimizer.state.get(parameter, {})  # type: ignore[call-overload]
            for key, value in list(state.items()):
                if not isinstance(value, Tensor) or value.numel() == 1 < parameter.numel():
                    continue
                if value.shape != parameter.shape:  # of a form of its own: it begins anew
                    optimizer.state.pop(parameter, None)  # type: ignore[call-overload]
                    break
                empty = torch.zeros_like(snapshot["tensors"][name])
                before = then.get(name, {}).get(key, empty)
                state[key] = overlay(before, value, lost[name])
