"""Snapshots: save points of a model in training (weights, masks, optimizers), and rolling back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.channels.graph import Kept
from lightning_compress.channels.resize import grow, overlay, structure_of
from lightning_compress.projection import ProjectedWeight, Projector, parameter_ids
from lightning_compress.pruning.masks import pack_mask, unpack_mask

__all__ = [
    "Snapshot",
    "all_tensors",
    "mask_in",
    "projected_weights_of",
    "regrow",
    "regrow_average",
    "restore_masks",
    "restore_snapshot",
    "take_snapshot",
]
Snapshot = dict[str, Any]


@torch.no_grad()
def take_snapshot(module: nn.Module, optimizers: Sequence[Optimizer]) -> Snapshot:
    """All parameters and buffers, sizes, latent values, masks (bit-packed) and optimizer states.

    Learning rates are not in it: their schedules go on with the run. A second of two optimizers
    on the same parameter is told apart by its place.

    Args:
        module: in training, between two steps.
        optimizers: all of them.
    """
    projected_weights = projected_weights_of(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    hidden = {
        name: projected_weights[name].values()
        for name in projected_weights
        if projected_weights[name].latent is not None
    }
    masks = {name: projected.pruned for name, projected in projected_weights.items()}
    return {
        "tensors": {name: one.detach().clone() for name, one in all_tensors(module).items()},
        "structure": structure_of(module),
        "hidden": {name: one.detach().clone() for name, one in hidden.items()},
        "masks": {
            name: (pack_mask(~one), tuple(one.shape))
            for name, one in masks.items()
            if one is not None
        },
        "optimizers": [
            {
                names[id(parameter)]: _copied(state)
                for parameter, state in optimizer.state.items()
                if id(parameter) in names
            }
            for optimizer in optimizers
        ],
    }


@torch.no_grad()
def restore_snapshot(
    module: nn.Module, optimizers: Sequence[Optimizer], snapshot: Snapshot
) -> None:
    """Roll a model in training back to a snapshot; its grids are the caller's.

    Sizes are those of the snapshot already: see `regrow`.

    Between two steps, before anything is projected: whoever makes grids restores them first.
    """
    projected_weights, parameters = projected_weights_of(module), dict(module.named_parameters())
    for name, tensor in all_tensors(module).items():
        if name not in projected_weights:
            tensor.copy_(snapshot["tensors"][name])
    for name, projected in projected_weights.items():
        projected.set_mask(mask_in(snapshot, name))
        projected.set_values(
            snapshot["hidden"].get(name, snapshot["tensors"][name]).to(projected.data)
        )
        projected.project()
    for optimizer, states in zip(optimizers, snapshot["optimizers"], strict=True):
        owned = parameter_ids(optimizer)
        for name, parameter in parameters.items():
            if id(parameter) not in owned:
                continue
            optimizer.state.pop(parameter, None)
            if name in states:
                optimizer.state[parameter] = _copied(states[name], like=parameter)


@torch.no_grad()
def restore_masks(module: nn.Module, snapshot: Snapshot) -> None:
    """Roll back masks alone: restored weights get their saved values, the others stay."""
    for name, projected in projected_weights_of(module).items():
        mask = mask_in(snapshot, name)
        mask = None if mask is None else mask.to(projected.data.device)
        if projected.pruned is not None and not projected.dense_gradient:
            reopened = projected.pruned if mask is None else projected.pruned & mask
            before = snapshot["hidden"].get(name, snapshot["tensors"][name]).to(projected.data)
            values = torch.where(reopened, before, projected.values())
            projected.set_mask(mask)
            projected.set_values(values)
        else:
            projected.set_mask(mask)
        projected.project()


def mask_in(snapshot: Snapshot, name: str) -> Tensor | None:
    """The mask of a parameter, True where a weight stays; None without one."""
    packed = snapshot["masks"].get(name)
    return None if packed is None else unpack_mask(*packed)


def projected_weights_of(module: nn.Module) -> dict[str, ProjectedWeight]:
    """Projected parameters by the name that the module gives them."""
    projector = Projector.find(module)
    known = projector.projected_weights.values() if projector is not None else ()
    by_id = {id(projected.parameter): projected for projected in known}
    pairs = ((name, by_id.get(id(one))) for name, one in module.named_parameters())
    return {name: projected for name, projected in pairs if projected is not None}


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _copied(state: dict[str, Any], like: Tensor | None = None) -> dict[str, Any]:
    """A copy of an optimizer's state of one parameter; tensors of its shape go to its device."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value if like is None or value.dim() == 0 else value.to(like.device)
        return moved.detach().clone()

    return {key: copy(value) for key, value in state.items()}


@torch.no_grad()
def regrow(
    module: nn.Module, optimizers: Sequence[Optimizer], snapshot: Snapshot, lost: Kept
) -> bool:
    """Resize a module in training and its optimizers to the sizes of a snapshot.

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
    projected_weights = {
        name: projected
        for name, projected in projected_weights_of(module).items()
        if name in changed
    }
    masks = {}
    for name, projected in projected_weights.items():
        if projected.pruned is not None:
            then = mask_in(snapshot, name)
            whole = torch.ones(snapshot["tensors"][name].shape, dtype=torch.bool)
            masks[name] = overlay(whole if then is None else then, ~projected.pruned, lost[name])
    now = {**changed, **{name: projected.forget() for name, projected in projected_weights.items()}}
    before = {**snapshot["tensors"], **snapshot["hidden"]}
    grown = {name: overlay(before[name], one.detach(), lost[name]) for name, one in now.items()}
    grow(module, grown, snapshot["structure"])
    for name, mask in masks.items():
        projected_weights[name].set_mask(mask)
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
