"""Sample inputs of a submodule, known before training begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.modes import evaluating, own_random_stream

__all__ = [
    "as_inputs",
    "placed",
    "sample_inputs",
    "take_rows",
]


def as_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The positional inputs of a module as a tuple.

    Raises:
        ValueError: without an input, or when the inputs' batch sizes (axis 0) differ.

    >>> len(as_inputs(torch.zeros(2, 3)))
    1
    """
    batch = inputs if isinstance(inputs, tuple) else (inputs,)
    shapes = [tuple(part.shape) for part in batch]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"inputs need one common batch size on axis 0, got shapes {shapes}")
    if shapes[0][0] == 0:
        raise ValueError(f"inputs need at least one example, got shapes {shapes}")
    return batch


def take_rows(inputs: Tensor | tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """The inputs with exactly `count` examples: cut, or repeated in turn.

    >>> take_rows(torch.tensor([1, 2]), 3)
    (tensor([1, 2, 1]),)
    """
    batch = as_inputs(inputs)
    return tuple(part[torch.arange(count, device=part.device) % len(part)] for part in batch)


def sample_inputs(student: nn.Module, path: str, module: nn.Module) -> tuple[Any, ...] | None:
    """Some examples of what a module receives, or None when nothing tells.

    Taken from `student.parts()`; from a run of the student on its `example_input_array`; or from
    the first layer of a chain that begins with a linear one.

    >>> sample_inputs(nn.Identity(), "net", nn.Sequential(nn.Linear(3, 4)))[0].shape
    torch.Size([2, 3])
    """
    parts = getattr(student, "parts", None)
    known: Any = parts() if callable(parts) else {}
    if path in known:
        return tuple(placed(known[path][1], module))
    found = _by_running(student, module)
    if found is None and (size := _linear_input(module)) is not None:
        found = tuple(placed((torch.zeros(2, size),), module))
    return found


def _by_running(student: nn.Module, module: nn.Module) -> tuple[Any, ...] | None:
    example = getattr(student, "example_input_array", None)
    if example is None:
        return None
    example = example if isinstance(example, tuple) else (example,)
    seen: list[tuple[Any, ...]] = []

    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args)

    handle = module.register_forward_pre_hook(look)
    try:
        with evaluating(student, eager=True), own_random_stream(student):
            student(*placed(example, student))
    finally:
        handle.remove()
    return seen[0] if seen else None


def _linear_input(module: nn.Module) -> int | None:
    module = getattr(module, "_orig_mod", module)
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return module.in_features if isinstance(module, nn.Linear) else None


def placed(inputs: tuple[Any, ...], module: nn.Module) -> tuple[Any, ...]:
    """Inputs brought to the device and the floating-point type of a module."""
    like = next((one for one in module.parameters() if one.is_floating_point()), None)

    def place(one: Any) -> Any:
        if not isinstance(one, Tensor) or like is None:
            return one
        return one.to(like.device, like.dtype if one.is_floating_point() else None)

    return pytree.tree_map(place, inputs)
