"""Untrained copies of trained weights: averages kept by hand, bases under adapters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

__all__ = ["Copy", "adapters", "frozen_copies"]

_ALIKE = 0.5  # cosine from which weights are an average of others; unrelated ones are near 0


@dataclass(frozen=True)
class Copy:
    """A module that no optimizer trains, with the structure and about the weights of one that is.

    Args:
        path: of the copy.
        source: path of the trained module.
    """

    path: str
    source: str


def frozen_copies(module: nn.Module, trained: Collection[int] | None = None) -> list[Copy]:
    """Copies of trained modules inside a module: an average that is kept by hand, say.

    Args:
        module: the whole.
        trained: ids of the parameters that optimizers own; None: those that require a gradient.

    >>> import copy
    >>> net = nn.Linear(2, 1)
    >>> average = copy.deepcopy(net).requires_grad_(False)
    >>> frozen_copies(nn.ModuleDict({"net": net, "average": average}))
    [Copy(path='average', source='net')]
    """
    if trained is None:
        trained = {id(one) for one in module.parameters() if one.requires_grad}
    sources: dict[tuple[object, ...], list[str]] = {}
    frozen: dict[str, tuple[object, ...]] = {}
    for path, one in module.named_modules():
        parameters = dict(one.named_parameters())
        if not path or not parameters:
            continue
        form = tuple(
            (name, () if isinstance(each, UninitializedParameter) else tuple(each.shape))
            for name, each in parameters.items()
        )
        if any(id(each) in trained for each in parameters.values()):
            sources.setdefault(form, []).append(path)
        else:
            frozen[path] = form
    found: list[Copy] = []
    for path, form in frozen.items():
        if any(path.startswith(f"{one.path}.") for one in found):
            continue
        own = module.get_submodule(path)
        alike = (one for one in sources.get(form, ()) if _alike(own, module.get_submodule(one)))
        if (source := next(alike, None)) is not None:
            found.append(Copy(path, source))
    return found


@torch.no_grad()
def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether the matrices of two modules of one structure point the same way."""
    pairs = [
        (a.detach().float().flatten(), b.detach().float().flatten())
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
        if a.dim() > 1 and a.shape == b.shape and not isinstance(a, UninitializedParameter)
    ]
    if not pairs or any(a.device != b.device for a, b in pairs):
        return False
    product = sum(float(a @ b) for a, b in pairs)
    norms = [sum(float(each[side].square().sum()) for each in pairs) for side in (0, 1)]
    return product > _ALIKE * (norms[0] * norms[1]) ** 0.5 or norms == [0.0, 0.0]


def adapters(module: nn.Module) -> dict[int, bool]:
    """Low-rank adapters beside frozen weights (LoRA, arXiv:2106.09685), by structure.

    A module with one frozen matrix, whose matrices that train are factors of one of its shape.

    Returns:
        By the parameter's id: True for the frozen base, False for its adapters.

    >>> layer = nn.ModuleDict({"base": nn.Linear(8, 6).requires_grad_(False)})
    >>> layer["a"], layer["b"] = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)
    >>> sorted(adapters(layer).values())
    [False, False, True]
    """
    found: dict[int, bool] = {}
    for one in reversed(list(module.modules())):  # the innermost first
        matrices = [each for each in one.parameters() if _is_matrix(each)]
        if any(id(each) in found for each in matrices):
            continue
        base = [each for each in matrices if not each.requires_grad]
        factors = [each for each in matrices if each.requires_grad]
        if len(base) == 1 and _are_factors(factors, base[0]):
            found |= {id(base[0]): True, **{id(each): False for each in factors}}
    return found


def _is_matrix(tensor: Tensor) -> bool:
    return not isinstance(tensor, UninitializedParameter) and tensor.dim() > 1


def _are_factors(factors: list[nn.Parameter], base: Tensor) -> bool:
    """Whether matrices go by twos through a rank that is smaller than the base has."""
    if len(factors) < 2 or len(factors) % 2:
        return False
    rows, columns = base.shape[:2]
    for first, second in zip(factors[::2], factors[1::2], strict=True):
        ranks = {one.shape[axis] for one in (first, second) for axis in (0, 1)} - {rows, columns}
        down, up = sorted((first, second), key=lambda one: columns not in one.shape[:2])
        if rows != columns and (columns not in down.shape[:2] or rows not in up.shape[:2]):
            return False
        if len(ranks) != 1 or ranks.pop() >= min(rows, columns):
            return False
    return True
