"""One call of a student's module, kept until its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.errors import TargetError

__all__ = ["Forward", "Term", "check_output", "detached"]

_PLAIN = (Tensor, int, float, bool, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Term:
    """One loss of a forward pass: its name, its weight and its value with a graph."""

    name: str
    weight: float
    value: Tensor


def detached(values: Any) -> Any:
    """The same structure with its tensors detached: equal storage, no graph."""
    return pytree.tree_map(lambda one: one.detach() if isinstance(one, Tensor) else one, values)


def check_output(output: Any, path: str) -> None:
    """Check that an output's tensors can be found.

    Raises:
        TargetError: for types that are neither tensors nor tuples, lists and dicts of them.
    """
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, _PLAIN):
            raise TargetError(
                f"{path!r} gives a {type(leaf).__name__}: distillation finds tensors in tuples, "
                "lists, named tuples and dicts only; pair a module inside that gives them"
            )


@dataclass(eq=False)
class Forward:
    """What a module received and gave, without graphs.

    Args:
        args: by position.
        kwargs: by name.
        autocast: (device type, enabled, dtype) of the call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, bool, torch.dtype]
    injected: bool = False
    material: list[Any] = field(default_factory=list)  # (output, features), flat and detached
    slots: dict[int, int] = field(default_factory=dict)  # of the material: index of the edge
    _spec: Any = None
    _watched: list[tuple[str, Tensor, int]] = field(default_factory=list)

    def keep(
        self, output: Any, features: dict[str, Tensor], carried: Sequence[Tensor]
    ) -> list[Tensor]:
        """Keep what the losses are taken of; returns the edges beyond the tensors carried."""
        flat, self._spec = pytree.tree_flatten((output, features))
        places, edges = {id(tensor): index for index, tensor in enumerate(carried)}, []
        for index, one in enumerate(flat):
            if not isinstance(one, Tensor) or not one.requires_grad:
                continue
            if id(one) not in places:
                places[id(one)] = len(carried) + len(edges)
                edges.append(one)
            self.slots[index] = places[id(one)]
        self.material = detached(flat)
        self.watch("an output", self.material)
        return edges

    def leaves(self) -> tuple[list[Tensor], Any, dict[str, Tensor]]:
        """Float32 leaves, one a slot, and the output and the features that hold them."""
        fresh = list(self.material)
        for index, one in enumerate(fresh):
            if isinstance(one, Tensor) and one.is_floating_point():
                fresh[index] = one.detach().float().requires_grad_(index in self.slots)
        output, features = pytree.tree_unflatten(fresh, self._spec)
        return [fresh[index] for index in self.slots], output, features

    def watch(self, what: str, values: Any) -> None:
        """Remember the versions of tensors, so that a change in place is noticed."""
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor) and not leaf.is_inference():
                self._watched.append((what, leaf, leaf._version))

    def check(self, path: str) -> None:
        """Check that nothing was changed in place since.

        Raises:
            RuntimeError: when something was; the teacher would see other values.
        """
        for what, tensor, version in self._watched:
            if tensor._version != version:
                raise RuntimeError(
                    f"{what} of {path!r}, shape {tuple(tensor.shape)}, was changed in place before "
                    "the backward pass: the teacher would see other values; clone it first"
                )

    def as_called(self) -> AbstractContextManager[Any]:
        """The autocast state of the call."""
        device, enabled, dtype = self.autocast
        return torch.autocast(device, dtype=dtype, enabled=enabled)
