"""Sample inputs of modules: batches as arguments, and what a submodule receives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.modes import evaluating, own_random_stream

__all__ = [
    "as_inputs",
    "calibration_batches",
    "placed",
    "run_batch",
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


def calibration_batches(
    data: Iterable[object] | Tensor, batch_to_args: Callable[[Any], Any] | None = None
) -> list[object]:
    """The batches of calibration data, checked.

    Args:
        data: inputs of the module: each a tensor, a tuple or list of arguments, or a dict of
            keyword arguments. A single tensor is one batch.
        batch_to_args: from what `data` yield to such inputs, where they are more, labels say.

    Raises:
        ValueError: when there is nothing, or values that are NaN or infinite.

    >>> len(calibration_batches([torch.zeros(2, 3), (torch.ones(2, 3),)]))
    2
    """
    batches: list[object] = [data] if isinstance(data, Tensor) else list(data)
    if batch_to_args is not None:
        batches = [batch_to_args(batch) for batch in batches]
    tensors = [[one for one in _values(batch) if isinstance(one, Tensor)] for batch in batches]
    if not any(one.numel() for row in tensors for one in row):
        raise ValueError("the calibration data are empty: give at least one batch of inputs")
    for index, row in enumerate(tensors):
        for one in row:
            if one.is_floating_point() and not bool(torch.isfinite(one).all()):
                raise ValueError(f"batch {index} of the calibration data holds NaN or infinity")
    return batches


def _values(batch: object) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


def run_batch(module: nn.Module, batch: object) -> object:
    """Call a module on a batch of `calibration_batches`.

    Raises:
        ValueError: naming the batch, when the module cannot take it.
    """
    try:
        return module(**batch) if isinstance(batch, Mapping) else module(*_values(batch))
    except (TypeError, RuntimeError) as error:
        if not isinstance(batch, (tuple, list, Mapping)):
            raise  # there is nothing to choose in it
        raise ValueError(
            f"{type(module).__name__} cannot be called with a batch of the data, "
            f"{_described(batch)}: {error}. Say what it is called with: "
            "batch_to_args=lambda batch: ..., which returns a tensor, a tuple of arguments, or a "
            "dict of them"
        ) from error


def _described(batch: object) -> str:
    def named(one: object) -> str:
        if isinstance(one, Tensor):
            return f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}"
        return type(one).__name__

    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {named(one)}" for key, one in batch.items()) + "}"
    inside = ", ".join(map(named, _values(batch)))
    return f"({inside})" if isinstance(batch, (tuple, list)) else inside
