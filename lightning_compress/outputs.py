"""Tensors in what modules give: containers, dataclasses, mappings of any class, distributions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

__all__ = ["flatten", "map_tensors"]
Rebuild = Callable[[Iterator[Any]], Any]


def flatten(value: Any) -> tuple[list[Any], Rebuild]:
    """The leaves of an output in order, and how to build the same output of other leaves.

    Tuples, lists, named tuples, mappings (an `OrderedDict` and its subclasses too), dataclasses,
    `torch.distributions`, and objects that hold the moments of a distribution are looked into;
    anything else is a leaf.

    >>> import torch
    >>> normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    >>> leaves, rebuild = flatten({"z": normal, "n": 3})
    >>> len(leaves), rebuild(iter([leaves[0] + 1, *leaves[1:]]))["z"].loc
    (3, tensor([1., 1.]))
    """
    leaves: list[Any] = []
    return leaves, _walk(value, leaves)


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The same output with its tensors changed.

    >>> import torch
    >>> map_tensors(lambda one: one + 1, (torch.zeros(1), 2))
    (tensor([1.]), 2)
    """
    leaves, rebuild = flatten(value)
    return rebuild(iter([change(one) if isinstance(one, Tensor) else one for one in leaves]))


def _walk(value: Any, leaves: list[Any]) -> Rebuild:
    if isinstance(value, Mapping) and hasattr(value, "__setitem__"):
        return _parts(value, leaves, list(value), value.__getitem__, _set_item)
    if isinstance(value, (tuple, list)):
        rebuilds = [_walk(one, leaves) for one in value]
        make = type(value)._make if hasattr(value, "_make") else type(value)  # type: ignore[union-attr]
        return lambda given: make([one(given) for one in rebuilds])  # type: ignore[operator]
    if names := _attributes(value):
        return _parts(value, leaves, names, lambda name: getattr(value, name), object.__setattr__)
    leaves.append(value)
    return next


def _parts(
    value: Any,
    leaves: list[Any],
    names: list[Any],
    get: Callable[[Any], Any],
    put: Callable[[Any, Any, Any], None],
) -> Rebuild:
    rebuilds = [(name, _walk(get(name), leaves)) for name in names]

    def rebuild(given: Iterator[Any]) -> Any:
        made = copy.copy(value)
        for name, one in rebuilds:
            put(made, name, one(given))
        return made

    return rebuild


def _set_item(holder: Any, key: Any, value: Any) -> None:
    holder[key] = value


def _attributes(value: Any) -> list[str]:
    """Names of the attributes that hold tensors of an object; empty for what is a leaf."""
    if is_dataclass(value) and not isinstance(value, type):
        return [one.name for one in fields(value) if hasattr(value, one.name)]
    if isinstance(value, Distribution) or _has_moments(value):
        kinds = (Tensor, Distribution)
        return [name for name, one in vars(value).items() if isinstance(one, kinds)]
    return []


def _has_moments(value: Any) -> bool:
    """Whether an object is a normal distribution of a project's own class."""
    held = getattr(value, "__dict__", {})
    return not callable(value) and all(
        isinstance(held.get(one), Tensor) for one in ("mean", "logvar")
    )
