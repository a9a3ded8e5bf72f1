"""Dynamic axes of a file's inputs, and inputs of other sizes to check them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Axes", "axes_of"]

BATCH = "batch"

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Axes:
    """The free axes of each input.

    Args:
        free: axis -> name, for each input; the batch among them, where it is free.
        batched: whether an input has the batch on axis 0.
        fixed: the batch size that the file has; None where any does.
        steps: name -> what its sizes are multiples of.
    """

    free: tuple[Mapping[int, str], ...]
    batched: tuple[bool, ...]
    fixed: int | None = None
    steps: Mapping[str, int] | None = None

    def count(self, inputs: Inputs) -> int:
        """The batch size of inputs; 1 where none has a batch."""
        sizes = [len(one) for one, batched in zip(inputs, self.batched, strict=True) if batched]
        return sizes[0] if sizes else 1

    def rows(self, inputs: Inputs, count: int) -> Inputs:
        """The inputs with exactly `count` examples: cut, or repeated in turn."""
        return tuple(
            one[torch.arange(count, device=one.device) % len(one)] if batched else one
            for one, batched in zip(inputs, self.batched, strict=True)
        )

    def at_most(self, inputs: Inputs, count: int) -> Inputs:
        """The inputs as a file of this batch takes them, with no more rows than `count`."""
        return self.rows(inputs, self.fixed or min(self.count(inputs), count))

    def batches(self, inputs: Inputs) -> list[Inputs]:
        """The sample at its batch size, one more and one, and at a second size of other axes."""
        count = self.count(inputs)
        counts = [self.fixed] if self.fixed else sorted({count, count + 1, 1})
        if not any(self.batched):
            counts = [1]
        batches = [self.rows(inputs, one) for one in counts]
        return batches + ([self.resized(batches[0])] if self.named() else [])

    def named(self) -> set[str]:
        """Names of the axes beside the batch."""
        return {
            name
            for free, batched in zip(self.free, self.batched, strict=True)
            for axis, name in free.items()
            if axis or not batched
        }

    def resized(self, inputs: Inputs) -> Inputs:
        """Inputs of the next larger size along all axes but the batch, repeated to fill it."""
        result = []
        for one, free, batched in zip(inputs, self.free, self.batched, strict=True):
            for axis, name in free.items():
                if axis or not batched:
                    size = one.shape[axis]
                    more = size + (self.steps or {}).get(name, 1)
                    one = one.index_select(axis, torch.arange(more) % size)
            result.append(one)
        return tuple(result)

    def with_steps(self, steps: Mapping[str, int]) -> Axes:
        """With sizes that are multiples of something."""
        return replace(self, steps=dict(steps))


def _asked(dynamic: object) -> dict[str, dict[int, str]]:
    """Axes and their names of each input, copied."""
    if dynamic is None:
        return {}
    nested = isinstance(dynamic, Mapping)
    if not nested or not all(isinstance(one, Mapping) for one in dynamic.values()):
        raise ValueError(
            f"dynamic={dynamic!r}: give the axes of each input and their names, such as "
            "{'x': {2: 'height', 3: 'width'}}"
        )
    return {name: dict(found) for name, found in dynamic.items()}


def axes_of(
    names: Sequence[str],
    inputs: Inputs,
    dynamic: Mapping[str, Mapping[int, str]] | None,
    batch: int | None,
) -> Axes:
    """The axes that a user sets as dynamic.

    Args:
        names: of the inputs.
        inputs: a sample.
        dynamic: input -> axis -> name. Of an input that stands here without axis 0 while its size
            is not the others' batch, or with no axes at all, axis 0 is no batch.
        batch: the batch size that the file is to have; None: any.

    Raises:
        ValueError: for an input or an axis that there is not, a name of two sizes, inputs without
            examples, or batches of several sizes.

    >>> x = torch.zeros(2, 3, 8, 8)
    >>> axes_of(["x"], (x,), {"x": {2: "height"}}, None).free
    ({0: 'batch', 2: 'height'},)
    """
    asked = _asked(dynamic)
    if unknown := set(asked) - set(names):
        raise ValueError(f"dynamic: no input {sorted(unknown)}; there are {list(names)}")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch={batch!r}: valid are None (any size) and integers from 1 on")
    for name, one in zip(names, inputs, strict=True):
        for axis in asked.get(name, {}):
            if not isinstance(axis, int) or not 0 <= axis < one.dim():
                raise ValueError(
                    f"dynamic: {name} has no axis {axis!r}, its shape is {tuple(one.shape)}"
                )
    batched = tuple(
        one.dim() > 0 and asked.get(name) != {} for name, one in zip(names, inputs, strict=True)
    )
    shapes = [tuple(one.shape) for one in inputs]
    sizes = {len(one) for one, has in zip(inputs, batched, strict=True) if has}
    if len(sizes) > 1:
        raise ValueError(
            f"inputs need one common batch size on axis 0, got shapes {shapes}; an input without "
            "a batch axis is named with no axes: dynamic={'name': {}}"
        )
    if 0 in sizes:
        raise ValueError(f"inputs need at least one example, got shapes {shapes}")
    free = []
    for name, has in zip(names, batched, strict=True):
        own = dict(asked.get(name, {}))
        if has and batch is None:
            own = {0: BATCH} | own
        free.append(own)
    _check_names(free, inputs)
    return Axes(tuple(free), batched, batch)


def _check_names(free: Sequence[Mapping[int, str]], inputs: Inputs) -> None:
    sizes: dict[str, int] = {}
    for one, axes in zip(inputs, free, strict=True):
        for axis, name in axes.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"dynamic: {name!r} is no name of an axis: use a word")
            if sizes.setdefault(name, one.shape[axis]) != one.shape[axis]:
                raise ValueError(
                    f"dynamic: axis {name!r} has the sizes {sizes[name]} and {one.shape[axis]}: "
                    "axes of different sizes need different names"
                )
