"""Learned maps from a student's sizes to its teacher's: a 1x1 convolution along one axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_compress.errors import TargetError

__all__ = ["ChannelAdapter", "differing_axis", "make_adapter"]


class ChannelAdapter(nn.Module):
    """A linear map along one axis: for (N, C, H, W) and axis 1 a 1x1 convolution.

    >>> ChannelAdapter(1, 3, 5)(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 5, 4, 4])
    """

    def __init__(self, axis: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.axis, self.map = axis, nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map the axis."""
        return self.map(x.movedim(self.axis, -1)).movedim(-1, self.axis)


def differing_axis(student: Sequence[int], teacher: Sequence[int], *, what: str) -> int | None:
    """The one axis behind the batch in which two shapes differ; None when they are equal.

    >>> differing_axis((2, 3, 4), (2, 5, 4), what="x")
    1

    Raises:
        TargetError: when more axes differ, or their number does.
    """
    pairs = list(zip(student[1:], teacher[1:], strict=False))
    axes = [axis for axis, (ours, theirs) in enumerate(pairs, 1) if ours != theirs]
    if len(student) != len(teacher) or len(axes) > 1:
        raise TargetError(
            f"{what}: the student gives {tuple(student)}, the teacher {tuple(teacher)}; a learned "
            "adapter maps one axis, and more than one differs: are latent and image sizes equal?"
        )
    return axes[0] if axes else None


def make_adapter(
    student: Sequence[int], teacher: Sequence[int], *, what: str, allowed: bool
) -> nn.Module | None:
    """The adapter that two shapes need, or None; weights drawn without moving random streams.

    Raises:
        TargetError: when one is needed and not allowed, or one axis is not enough.
    """
    axis = differing_axis(student, teacher, what=what)
    if axis is None:
        return None
    if not allowed:
        raise TargetError(
            f"{what}: the student gives {tuple(student)}, the teacher {tuple(teacher)}; for a loss "
            "that compares them give the pair adapter=True, or choose modules of equal sizes"
        )
    with torch.random.fork_rng([]):
        torch.manual_seed(student[axis] * 100_003 + teacher[axis])
        return ChannelAdapter(axis, student[axis], teacher[axis])
