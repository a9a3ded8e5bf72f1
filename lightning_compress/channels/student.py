"""Begin a narrower student with its teacher's most important channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.channels.student_graph import StudentGraph, shown
from lightning_compress.errors import TargetError

__all__ = ["initialize_from_teacher"]


@torch.no_grad()
def initialize_from_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Copy a teacher's most important channels, by L2 norm, into a student of the same structure.

    A channel is chosen once: the rows of the layer that makes it, its norm's statistics and the
    columns of each layer that reads it are copied together, through reshapes, concatenations and
    sums; of a recurrent layer each gate gives the same units. Inputs and outputs are kept whole.

    Args:
        student: changed in place; a module that `torch.fx` can trace.
        teacher: the wider module.

    Raises:
        TargetError: when the two differ in more than width, or a layer's channels are not known.

    >>> teacher = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> student = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> weight = teacher[0].weight.requires_grad_(False)
    >>> _ = weight.copy_(torch.tensor([[1.0, 0], [0, 0.1], [0, 2]]))
    >>> initialize_from_teacher(student, teacher)
    >>> student[0].weight.tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    graph = StudentGraph(student, teacher)
    ours = dict(graph.student.named_parameters()) | dict(graph.student.named_buffers())
    theirs = dict(graph.teacher.named_parameters()) | dict(graph.teacher.named_buffers())
    copies: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        chosen = tensor.detach()
        for use in graph.uses.get(name, []):
            chosen = chosen.index_select(use.dim, use.index().to(chosen.device))
        target = ours.get(name)
        if target is None or target.shape != chosen.shape:
            shape = None if target is None else tuple(target.shape)
            raise TargetError(
                f"{shown(name)}: the student has {shape}, the teacher's channels "
                f"give {tuple(chosen.shape)}"
            )
        copies[name] = chosen
    for name, chosen in copies.items():  # only once all fit
        ours[name].copy_(chosen)
