"""Tensors of a module by name for transport, and loading them into a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_compress.federated.updates import UpdateError

__all__ = ["load_arrays", "model_arrays"]


def model_arrays(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's `state_dict` on the CPU, without the `_orig_mod.` of compiled modules."""
    return {
        name.replace("_orig_mod.", ""): one.detach().cpu().clone()
        for name, one in module.state_dict().items()
    }


def load_arrays(module: torch.nn.Module, arrays: Mapping[str, Tensor]) -> None:
    """Load arrays into a module, in place; entries without an array stay.

    Raises:
        UpdateError: naming an array that the module does not have, or has in another shape.
    """
    own = {name.replace("_orig_mod.", ""): one for name, one in module.state_dict().items()}
    for name, one in arrays.items():
        if name not in own or own[name].shape != one.shape:
            has = tuple(own[name].shape) if name in own else "nothing"
            raise UpdateError(
                f"foreign: array {name!r} is {tuple(one.shape)}, the module has {has}"
            )
    with torch.no_grad():
        for name, one in arrays.items():
            own[name].copy_(one)
