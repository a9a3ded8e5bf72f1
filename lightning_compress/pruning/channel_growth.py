"""The way back in training: a module that lost channels gets the sizes that it had before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.pruning.channel_sizes import set_sizes, sizes_of_layers
from lightning_compress.pruning.channel_surgery import resize_tensor
from lightning_compress.pruning.channels import Kept
from lightning_compress.state import (
    RemovedChannels,
    forget_removed,
    note_removed,
    removed_channels,
)

__all__ = ["compose", "grow", "overlay", "structure_of"]


def compose(first: Kept, then: Kept) -> Kept:
    """Entries that stay of a module after two removals, counted as they were before the first.

    >>> one, two = torch.tensor([0, 2, 3]), torch.tensor([0, 2])
    >>> compose({"weight": {0: one}}, {"weight": {0: two}})["weight"][0].tolist()
    [0, 3]
    """
    found = {path: dict(dims) for path, dims in first.items()}
    for path, dims in then.items():
        known = found.setdefault(path, {})
        for dim, index in dims.items():
            known[dim] = known[dim][index] if dim in known else index
    return found


def overlay(before: Tensor, now: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """A tensor from before with the entries that are still there as they are now.

    Args:
        before: in the larger size.
        now: in the smaller one.
        kept: where its entries lie along axes of the larger one; axes that are not named are whole.

    >>> before, now = torch.zeros(3), torch.tensor([7.0, 8.0])
    >>> overlay(before, now, {0: torch.tensor([0, 2])}).tolist()
    [7.0, 0.0, 8.0]
    """
    if not kept:
        return now.clone()
    device = now.device
    places = [kept.get(dim, torch.arange(size)).to(device) for dim, size in enumerate(now.shape)]
    merged = before.to(now).clone()
    merged[torch.meshgrid(*places, indexing="ij")] = now
    return merged


def structure_of(module: nn.Module) -> dict[str, Any]:
    """All that `grow` needs to know of a module besides its tensors, as plain data."""
    lost = removed_channels(module)
    return {
        "sizes": sizes_of_layers(module),
        "lost": {"shapes": lost.shapes, "sizes": lost.sizes, "kept": lost.kept},
    }


@torch.no_grad()
def grow(module: nn.Module, tensors: Mapping[str, Tensor], structure: Mapping[str, Any]) -> None:
    """Give a module tensors of other sizes, in place; its layers know the sizes that they had.

    Args:
        module: whose parameters stay the objects that they are, without gradients.
        tensors: all parameters and buffers that change, by name.
        structure: what `structure_of` said when the module had these sizes.
    """
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, values in tensors.items():
        resize_tensor(own[name], values.to(own[name]).clone())
    set_sizes(module, structure["sizes"])
    forget_removed(module)
    lost = structure["lost"]
    note_removed(module, RemovedChannels(lost["shapes"], lost["sizes"], lost["kept"]))
