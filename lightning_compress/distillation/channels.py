"""Which axes of which weights hold the same channels, in a teacher and a narrower student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_compress.errors import TargetError

__all__ = ["Axis", "Group", "Use"]


@dataclass(eq=False)
class Use:
    """One axis of a teacher's tensor along which channels lie.

    Args:
        tensor: of the teacher.
        dim: the axis.
        segments: (group, repeat) in the order they lie along it.
        scored: whether the norms along it say how important a channel is.
    """

    tensor: Tensor
    dim: int
    segments: list[list[Group | int]]
    scored: bool

    def index(self) -> Tensor:
        """Positions along the axis that the student keeps."""
        kept, offset = [], 0
        for group, repeat in _pairs(self.segments):
            units = group.kept()[:, None] * repeat + torch.arange(repeat)
            kept.append(offset + units.flatten())
            offset += group.teacher * repeat
        return torch.cat(kept)

    def scores(self, wanted: Group) -> Tensor:
        """Sum of squares of each channel of a group."""
        squares = self.tensor.detach().double().cpu().square()
        along = squares.movedim(self.dim, 0).flatten(1).sum(1)
        total, offset = torch.zeros(wanted.teacher, dtype=torch.double), 0
        for group, repeat in _pairs(self.segments):
            length = group.teacher * repeat
            if group is wanted:
                total += along[offset : offset + length].view(-1, repeat).sum(1)
            offset += length
        return total


def _pairs(segments: list[list[Group | int]]) -> list[tuple[Group, int]]:
    found = []
    for group, repeat in segments:
        assert isinstance(group, Group)
        assert isinstance(repeat, int)
        found.append((group.root(), repeat))
    return found


@dataclass(eq=False)
class Group:
    """Channels that are kept or left out together.

    Args:
        teacher: how many the teacher has.
        student: how many the student has.
        where: what made them, for messages.
    """

    teacher: int
    student: int
    where: str
    uses: list[tuple[Use, list[Group | int]]] = field(default_factory=list)
    parent: Group | None = None
    _kept: Tensor | None = None

    def root(self) -> Group:
        """The group that this one was joined with."""
        return self if self.parent is None else self.parent.root()

    def join(self, other: Group) -> None:
        """Become one with another group, as a sum of two layers asks for.

        Raises:
            TargetError: when they are not of one size.
        """
        mine, theirs = self.root(), other.root()
        if mine is theirs:
            return
        if (mine.teacher, mine.student) != (theirs.teacher, theirs.student):
            raise TargetError(f"{mine.where} and {theirs.where} are added, but differ in size")
        mine.uses += theirs.uses
        theirs.parent = mine

    def split(self, block: int) -> None:
        """Be units of `block` neighbours from now on, as after an Unflatten.

        Raises:
            TargetError: when the size does not divide.
        """
        group = self.root()
        if group.teacher % block or group.student % block:
            raise TargetError(f"{group.where}: its channels do not come in blocks of {block}")
        group.teacher, group.student = group.teacher // block, group.student // block
        for _, segment in group.uses:
            assert isinstance(segment[1], int)
            segment[1] *= block

    def kept(self) -> Tensor:
        """Indices, ascending, of the teacher's most important channels by L2 norm.

        Raises:
            TargetError: when the student has more channels than the teacher.
        """
        if self._kept is None:
            if self.student > self.teacher:
                raise TargetError(
                    f"{self.where}: the student has {self.student} channels, the teacher only "
                    f"{self.teacher}: nothing to choose from"
                )
            used = {id(use): use for use, _ in self.uses if use.scored}.values()
            scores = sum((use.scores(self) for use in used), torch.zeros(self.teacher).double())
            order = scores.argsort(descending=True, stable=True)
            self._kept = order[: self.student].sort().values
        return self._kept


@dataclass(eq=False)
class Axis:
    """The channels of a value that flows between layers; a None is an input's own axis."""

    segments: list[tuple[Group, int] | None]

    @staticmethod
    def cat(axes: Sequence[Axis | None]) -> Axis:
        """The channels of several values one after the other."""
        joined: list[tuple[Group, int] | None] = []
        for axis in axes:
            joined += [None] if axis is None else axis.segments
        return Axis(joined)

    def resolve(self, teacher: int, student: int, where: str) -> list[list[Group | int]]:
        """Segments that make up `teacher` and `student` channels of a layer's input.

        Raises:
            TargetError: when they cannot.
        """
        known = [one for one in self.segments if one is not None]
        lengths = [
            sum(getattr(group.root(), side) * repeat for group, repeat in known)
            for side in ("teacher", "student")
        ]
        missing = len(self.segments) - len(known)
        if missing == 1:
            rest = (teacher - lengths[0], student - lengths[1])
            if rest[0] != rest[1] or rest[0] <= 0:
                raise TargetError(f"{where}: inputs of {rest[1]} and {rest[0]} differ in size")
            free = (Group(rest[0], rest[0], where), 1)
            return [[*(one or free)] for one in self.segments]
        if (teacher, student) == tuple(lengths):
            return [[*one] for one in known]
        return self._reshaped(known, (teacher, student), lengths, where)

    @staticmethod
    def _reshaped(
        known: list[tuple[Group, int]],
        sizes: tuple[int, int],
        lengths: list[int],
        where: str,
    ) -> list[list[Group | int]]:
        if len(known) == 1:
            group, repeat = known[0]
            for block in (sizes[0] // lengths[0], lengths[0] // sizes[0]):
                if block > 1 and sizes == (lengths[0] * block, lengths[1] * block):
                    return [[group, repeat * block]]
                shrinks = tuple(lengths) == (sizes[0] * block, sizes[1] * block)
                if block > 1 and repeat == 1 and shrinks:
                    group.split(block)
                    return [[group, 1]]
        raise TargetError(
            f"{where} takes {sizes[1]} channels in the student and {sizes[0]} in the teacher, but "
            f"is given {lengths[1]} and {lengths[0]}: how they belong together is not known"
        )
