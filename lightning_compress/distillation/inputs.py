"""Sample inputs of a student's module, so that mistakes show before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["sample_inputs"]


def sample_inputs(student: nn.Module, path: str, module: nn.Module) -> tuple[Any, ...] | None:
    """Two examples of what a module receives, or None when nothing tells.

    Taken from `student.parts()`, from `example_input_array` for the student itself, or from the
    first layer of a chain that begins with a linear one.

    >>> sample_inputs(nn.Identity(), "net", nn.Sequential(nn.Linear(3, 4)))[0].shape
    torch.Size([2, 3])
    """
    inputs = _given(student, path)
    if inputs is None and (size := _linear_input(module)) is not None:
        inputs = (torch.zeros(2, size),)
    return None if inputs is None else tuple(_placed(inputs, module))


def _given(student: nn.Module, path: str) -> tuple[Any, ...] | None:
    if path == "":
        example = getattr(student, "example_input_array", None)
        return example if isinstance(example, tuple) or example is None else (example,)
    parts = getattr(student, "parts", None)
    known = parts() if callable(parts) else {}
    return known[path][1] if path in known else None  # type: ignore[index, operator]


def _linear_input(module: nn.Module) -> int | None:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return module.in_features if isinstance(module, nn.Linear) else None


def _placed(inputs: tuple[Any, ...], module: nn.Module) -> tuple[Any, ...]:
    like = next((one for one in module.parameters() if one.is_floating_point()), None)

    def place(one: Any) -> Any:
        if not isinstance(one, Tensor) or like is None:
            return one
        return one.to(like.device, like.dtype if one.is_floating_point() else None)

    return pytree.tree_map(place, inputs)
