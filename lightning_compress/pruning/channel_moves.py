"""Functions that move values: labels go the way that the values went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.pruning.channel_labels import Labels, Ledger
from lightning_compress.pruning.channel_names import JOINING, MERGING, name_of
from lightning_compress.pruning.channel_trace import Axes, Trace, tensors_in

__all__ = ["move"]


def move(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Send labels the way that the values went."""
    name, joined = name_of(func), name_of(func) in JOINING
    sources = [one for one in tensors_in((args, kwargs)) if joined or one is args[0]]
    if joined:
        _fill(trace, sources)
    axes: list[Axes] = [[None] * one.dim() for one in tensors_in(out)]
    for dim in range(sources[0].dim()):
        labels = [trace.axes(one)[dim] for one in sources]
        if all(one is None for one in labels):
            continue
        if joined and dim != _joined_axis(name, sources[0].dim(), args, kwargs):
            for one in labels[1:]:
                trace.ledger.join(labels[0], one)  # type: ignore[arg-type]
            labels = [labels[0]] * len(labels)
        stand_in = {
            id(one): _spread(one, dim, own) for one, own in zip(sources, labels, strict=True)
        }
        moved_args, moved_kwargs = pytree.tree_map(
            lambda one: stand_in.get(id(one), one),  # noqa: B023
            (args, kwargs),
        )
        found = tensors_in(func(*moved_args, **moved_kwargs))
        target = _target_axis(name, dim, sources[0].dim(), moved_args, moved_kwargs)
        carried = [_carry(trace.ledger, one, target) for one in found]
        _check_whole(trace.ledger, name, labels, carried)
        for index, (axis, own) in enumerate(carried):
            if axis is not None and axes[index][axis] is not None:
                trace.ledger.fix(own, f"{name} merges two axes")
                trace.ledger.fix(axes[index][axis], f"{name} merges two axes")
            elif axis is not None:
                axes[index][axis] = own
        _equal_pieces(trace.ledger, name, [own for _, own in carried])
    for result, one in zip(tensors_in(out), axes, strict=True):
        trace.label(result, one)


def _fill(trace: Trace, sources: Sequence[Tensor]) -> None:
    """What is joined with channels needs labels of its own, which stay."""
    for dim in range(sources[0].dim()):
        axes = [trace.axes(one)[dim] for one in sources]
        if all(one is None for one in axes):
            continue
        for one, labels in zip(sources, axes, strict=True):
            if labels is None:
                known = list(trace.axes(one))
                known[dim] = trace.ledger.fresh(one.shape[dim], "a tensor of fixed size")
                trace.ledger.fix(known[dim], "joined as a tensor of fixed size")
                trace.label(one, known)


def _carry(ledger: Ledger, moved: Tensor, target: int | None) -> tuple[int | None, Labels]:
    """The axis that labels lie along after a move, and the labels; others are joined."""
    values = moved.numpy()
    along = [dim for dim in range(values.ndim) if np.ptp(values, axis=dim).any()]
    if not along:
        single = [dim for dim in range(values.ndim) if values.shape[dim] == 1]
        axis = target if target in single else (single[-1] if single else None)
        return axis, np.unique(values)
    axis = target if target in along else along[0]
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    if len(along) > 1:
        ledger.join(np.repeat(rows[:, :1], rows.shape[1] - 1, axis=1), rows[:, 1:])
    return axis, np.ascontiguousarray(rows[:, 0])


def _check_whole(
    ledger: Ledger,
    name: str,
    labels: Sequence[Labels | None],
    carried: Sequence[tuple[int | None, Labels]],
) -> None:
    kept = [own for axis, own in carried if axis is not None]
    classes = np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)
    for one in labels:
        lost = one is not None and not (kept and len(np.unique(classes)) >= len(np.unique(one)))
        if lost and name not in MERGING:
            ledger.fix(one, f"{name} takes a part of them")


def _equal_pieces(ledger: Ledger, name: str, pieces: Sequence[Labels]) -> None:
    """Pieces are cut to equal sizes again when there are fewer channels."""
    if name not in ("chunk", "split", "tensor_split", "unbind", "split_with_sizes"):
        return
    if len({tuple(one) for one in pieces}) > 1:
        for piece in pieces[1:]:
            if len(piece) == len(pieces[0]):
                ledger.join(pieces[0], piece)
            else:
                ledger.fix(piece, f"{name} cuts them into unequal pieces")


def _spread(tensor: Tensor, dim: int, labels: Labels | None) -> Tensor:
    if labels is None or dim >= tensor.dim():
        return torch.full(tensor.shape, -1, dtype=torch.int64)
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return torch.from_numpy(labels).reshape(shape).expand(tensor.shape).contiguous()


def _joined_axis(name: str, rank: int, args: Any, kwargs: Any) -> int | None:
    """The axis that a function joins end to end; None where it makes one of its own."""
    if name == "stack":
        return None
    if name in ("hstack", "vstack", "dstack"):
        return {"hstack": min(1, rank - 1), "vstack": 0, "dstack": 2}[name]
    return kwargs.get("dim", args[1] if len(args) > 1 else 0) % rank


def _target_axis(name: str, dim: int, rank: int, args: Any, kwargs: Any) -> int | None:
    """Where an axis is after a move, as far as the arguments tell when it is split or stacked."""
    if name == "stack":
        place = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (rank + 1)
        return dim + (place <= dim)
    if name in ("view", "reshape", "unflatten"):
        sizes = next((list(one) for one in args[1:] if isinstance(one, (tuple, list))), None)
        first = args[1] % rank if name == "unflatten" else 0
        sizes = list(args[1:]) if sizes is None else sizes
        return first + sizes.index(-1) if -1 in sizes else None
    return dim
