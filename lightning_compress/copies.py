"""Copies of modules, and untrained weights that belong to trained ones: averages, LoRA's bases."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

__all__ = ["Copy", "adapters", "copy_module", "copyable", "frozen_copies"]

Module = TypeVar("Module", bound=nn.Module)

_ALIKE = 0.5  # cosine from which weights are an average of others; unrelated ones are near 0


@contextmanager
def copyable(*modules: nn.Module) -> Iterator[None]:
    """Modules that can be copied: computed tensors that they hold are cut from their graphs.

    The older `torch.nn.utils.weight_norm` and `spectral_norm` hang the weight of the last forward
    pass on the layer, with its graph, which torch refuses to copy. Each pass computes it anew.
    """
    held: list[tuple[Any, str, Any]] = [
        (attributes, name, value)
        for module in modules
        for one in module.modules()
        for attributes in (one.__dict__, one._buffers)
        for name, value in attributes.items()
        if any(map(_is_computed, value if isinstance(value, list) else [value]))
    ]
    for attributes, name, value in held:
        attributes[name] = [*map(_cut, value)] if isinstance(value, list) else _cut(value)
    try:
        yield
    finally:
        for attributes, name, value in held:
            attributes[name] = value


def _is_computed(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_leaf


def _cut(value: Any) -> Any:
    return value.detach().clone() if _is_computed(value) else value


def copy_module(module: Module) -> Module:
    """A copy of a module that has been run: `copy.deepcopy` refuses what the older norms leave.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     layer = nn.utils.weight_norm(nn.Linear(2, 1))
    >>> _ = layer(torch.zeros(1, 2))
    >>> copy_module(layer).weight.requires_grad
    False
    """
    with copyable(module):
        return copy.deepcopy(module)


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
