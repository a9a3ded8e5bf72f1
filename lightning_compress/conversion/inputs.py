"""Sample inputs of a module: a tensor, or a tuple with one batch size."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_inputs", "take_rows"]


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
