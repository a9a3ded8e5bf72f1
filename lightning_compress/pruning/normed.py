"""weight_norm divides each row by its norm: a row that is pruned whole would give 0 / 0."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from lightning_compress.targets import Target

__all__ = ["normed_axis", "row_leaders"]

WHOLE = -1  # one norm for all weights, as torch calls it


def normed_axis(target: Target) -> int | None:
    """The axis along which weight_norm holds a norm each (-1: one for all); None without it.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> free = layer.parametrizations.weight
    >>> normed_axis(Target("", free, "original1", free.original1))
    0
    """
    if target.name == "original1":
        steps = [one for one in target.layer.children() if type(one).__name__ == "_WeightNorm"]
        return int(steps[0].dim) if steps else None  # type: ignore[arg-type]
    for hook in target.layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and target.name == f"{hook.name}_v":
            return WHOLE if hook.dim is None else int(hook.dim)
    return None


def row_leaders(values: Tensor, axis: int, closed: Tensor | None) -> Tensor:
    """True at the largest value of each index of the axis, of those that are not closed.

    Args:
        values: of any shape.
        axis: -1: of the whole tensor.
        closed: True where a weight is pruned and must not return; or None.

    >>> import torch
    >>> row_leaders(torch.tensor([[1.0, -3.0], [0.0, 0.0]]), 0, None)
    tensor([[False,  True],
            [ True, False]])
    """
    size = values.detach().abs()
    if closed is not None:
        size = size.masked_fill(closed, -1.0)
    rows = size.reshape(1, -1) if axis == WHOLE else size.movedim(axis, 0).flatten(1)
    flags = nn.functional.one_hot(rows.argmax(dim=1), rows.shape[1]).bool()
    if axis == WHOLE:
        return flags.view_as(size)
    return flags.view_as(size.movedim(axis, 0)).movedim(0, axis)
