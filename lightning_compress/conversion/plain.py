"""Copies of modules that only hold ordinary parameters."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

__all__ = ["plain_copy"]


def plain_copy(module: nn.Module) -> nn.Module:
    """An eval-mode CPU copy with ordinary, frozen parameters; the module stays as it is.

    spectral_norm, weight_norm and any other parametrization are folded into their weights, in the
    new (`torch.nn.utils.parametrizations`) and in the older form (`torch.nn.utils`).

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> sorted(plain_copy(layer).state_dict())
    ['bias', 'weight']
    """
    # The older spectral_norm, and recurrent layers, keep graph tensors, which deepcopy refuses.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for part in module.modules()
        for attribute in vars(part).values()
        for value in (attribute if isinstance(attribute, list) else [attribute])
        if isinstance(value, Tensor) and not value.is_leaf
    }
    plain = copy.deepcopy(module, memo).cpu().eval()
    for part in list(plain.modules()):
        _remove_parametrizations(part)
        _remove_old_norms(part)
    return plain.requires_grad_(False)


def _remove_parametrizations(part: nn.Module) -> None:
    if not parametrize.is_parametrized(part):
        return
    # A copy shares its class with the original, and removal deletes the class's property.
    shared = type(part)
    body = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    own = type(shared.__name__, shared.__bases__, body)
    part.__class__ = own  # pyright: ignore[reportAttributeAccessIssue]
    for name in list(part.parametrizations):  # pyright: ignore[reportArgumentType]
        parametrize.remove_parametrizations(part, name)


def _remove_old_norms(part: nn.Module) -> None:
    removers = {"SpectralNorm": remove_spectral_norm, "WeightNorm": remove_weight_norm}
    for hook in list(part._forward_pre_hooks.values()):
        remove = removers.get(type(hook).__name__)
        if remove is not None and type(hook).__module__.startswith("torch.nn.utils"):
            remove(part, hook.name)  # pyright: ignore[reportFunctionMemberAccess]
