"""Channel groups of a teacher and of a narrower student, and where their weights hold them."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_compress.errors import TargetError

__all__ = [
    "Axis",
    "Group",
    "StudentGraph",
    "TeacherAxis",
    "shown",
]


@dataclass(eq=False)
class TeacherAxis:
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
    uses: list[tuple[TeacherAxis, list[Group | int]]] = field(default_factory=list)
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


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ADDED = {operator.add, operator.iadd, operator.sub, operator.mul, torch.add, torch.mul}
_LONE = "layer."
_GATES = {"GRU": 3, "LSTM": 4, "RNN_TANH": 1, "RNN_RELU": 1}


def shown(path: str) -> str:
    """A path as its author wrote it."""
    return path.removeprefix(_LONE)


def _traceable(module: nn.Module) -> nn.Module:
    """A layer of torch's own would be traced into: it goes into a chain of one."""
    lone = fx.Tracer().is_leaf_module(module, "")
    return nn.Sequential(OrderedDict({_LONE[:-1]: module})) if lone else module


class StudentGraph:
    """The axes of all tensors of a teacher, grouped by the channels they hold.

    Args:
        student: the narrower module.
        teacher: a module of the same structure.

    Raises:
        TargetError: when the two differ in structure, or hold layers that are not known here.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = _traceable(student), _traceable(teacher)
        self.uses: dict[str, list[TeacherAxis]] = {}
        graphs = [self._trace(one) for one in (self.student, self.teacher)]
        ours, theirs = ([(n.op, str(n.target)) for n in graph.nodes] for graph in graphs)
        if ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), ("its end", "its end"))
            raise TargetError(
                f"student and teacher differ in structure: {first[0]} and {first[1]}; channels "
                "can only be copied between models that differ in width"
            )
        self.axes: dict[fx.Node, Axis | None] = {}
        for node in graphs[1].nodes:
            self.axes[node] = self._visit(node)

    @staticmethod
    def _trace(module: nn.Module) -> fx.Graph:
        try:
            return fx.Tracer().trace(module)
        except Exception as error:  # torch.fx raises whatever the forward pass raises
            raise TargetError(
                f"{type(module).__name__} cannot be traced, so its channels are not known "
                f"({type(error).__name__}: {error})"
            ) from error

    def _visit(self, node: fx.Node) -> Axis | None:
        if node.op == "call_module":
            return self._layer(str(node.target), self._of(node.args[0]))
        if node.op == "get_attr":
            raise TargetError(
                f"{str(node.target).removeprefix('root.')} is a free parameter: its channels are "
                "not known"
            )
        if node.op == "output":
            self._fix(node.args[0])
            return None
        if node.target in (torch.cat, torch.concat):
            return Axis.cat([self._of(one) for one in node.args[0]])  # type: ignore[union-attr]
        axes = [self._of(one) for one in node.args[:2]]
        if node.target in _ADDED and axes[0] is not None and len(axes) == 2 and axes[1] is not None:
            self._join(axes[0], axes[1], str(node))
        elif node.target in _ADDED and axes[0] is None and len(axes) == 2:
            return axes[1]
        return axes[0] if axes else None

    def _of(self, argument: Any) -> Axis | None:
        return self.axes.get(argument) if isinstance(argument, fx.Node) else None

    @staticmethod
    def _join(one: Axis, other: Axis, where: str) -> None:
        for mine, theirs in zip(one.segments, other.segments, strict=True):
            if mine is None or theirs is None or mine[1] != theirs[1]:
                raise TargetError(f"{where}: what is added differs in structure")
            mine[0].join(theirs[0])

    def _fix(self, output: Any) -> None:
        """What comes out has a meaning: it keeps its size and order."""
        if isinstance(output, (tuple, list)):
            for one in output:
                self._fix(one)
            return
        axis = self._of(output)
        for segment in axis.segments if axis else ():
            if segment is not None and segment[0].root().teacher != segment[0].root().student:
                group = segment[0].root()
                if not group.where.endswith("(recurrent state)"):
                    raise TargetError(
                        f"{group.where} is an output and has {group.student} channels in the "
                        f"student, {group.teacher} in the teacher: outputs must be equal in size"
                    )

    def _layer(self, path: str, axis: Axis | None) -> Axis | None:
        ours, theirs = self.student.get_submodule(path), self.teacher.get_submodule(path)
        where = shown(path)
        if type(ours) is not type(theirs):
            raise TargetError(f"{where}: {type(ours).__name__} and {type(theirs).__name__}")
        tensors = [*theirs.named_parameters(recurse=False), *theirs.named_buffers(recurse=False)]
        if not tensors and not list(theirs.parameters()):
            return axis
        if isinstance(theirs, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
            self._norm(path, axis, where)
            return axis
        if isinstance(theirs, nn.RNNBase):
            return self._recurrent(path, axis, where)
        if isinstance(theirs, nn.Embedding):
            group = Group(theirs.embedding_dim, ours.embedding_dim, where)  # type: ignore[union-attr]
            self._use(path, "weight", 1, [[group, 1]], scored=True)
            return Axis([(group, 1)])
        if getattr(theirs, "groups", 1) != 1 or not isinstance(
            theirs, (nn.Linear, *_CONVS, *_TRANSPOSED)
        ):
            raise TargetError(f"{where}: channels of {theirs} are not known here")
        return self._matmul(path, axis, where, transposed=isinstance(theirs, _TRANSPOSED))

    def _matmul(self, path: str, axis: Axis | None, where: str, *, transposed: bool) -> Axis:
        sides: list[Any] = [m.get_submodule(path) for m in (self.teacher, self.student)]
        sizes = [one.weight.shape for one in sides]
        inside, outside = (0, 1) if transposed else (1, 0)
        segments = (axis or Axis([None])).resolve(sizes[0][inside], sizes[1][inside], where)
        self._use(path, "weight", inside, segments, scored=False)
        group = Group(sizes[0][outside], sizes[1][outside], where)
        self._use(path, "weight", outside, [[group, 1]], scored=True)
        self._use(path, "bias", 0, [[group, 1]], scored=False)
        return Axis([(group, 1)])

    def _norm(self, path: str, axis: Axis | None, where: str) -> None:
        names = ("weight", "bias", "running_mean", "running_var")
        for name in names:
            sides = [
                getattr(m.get_submodule(path), name, None) for m in (self.teacher, self.student)
            ]
            if sides[0] is not None and sides[1] is not None:
                segments = (axis or Axis([None])).resolve(len(sides[0]), len(sides[1]), where)
                self._use(path, name, 0, segments, scored=False)

    def _recurrent(self, path: str, axis: Axis | None, where: str) -> Axis:
        theirs, ours = self.teacher.get_submodule(path), self.student.get_submodule(path)
        assert isinstance(theirs, nn.RNNBase)
        assert isinstance(ours, nn.RNNBase)
        if theirs.bidirectional or theirs.proj_size:
            raise TargetError(f"{where}: bidirectional or projected layers are not known here")
        gates, axis = _GATES[theirs.mode], axis or Axis([None])
        for layer in range(theirs.num_layers):
            sizes = [getattr(m, f"weight_ih_l{layer}").shape[1] for m in (theirs, ours)]
            self._use(
                path,
                f"weight_ih_l{layer}",
                1,
                axis.resolve(sizes[0], sizes[1], where),
                scored=False,
            )
            group = Group(theirs.hidden_size, ours.hidden_size, f"{where} (recurrent state)")
            self._use(path, f"weight_hh_l{layer}", 1, [[group, 1]], scored=False)
            for name in (f"weight_ih_l{layer}", f"weight_hh_l{layer}"):
                # The gates lie one after the other along the first axis, each a whole state long.
                self._use(path, name, 0, [[group, 1] for _ in range(gates)], scored=True)
                self._use(
                    path, name.replace("weight", "bias"), 0, [[group, 1] for _ in range(gates)]
                )
            axis = Axis([(group, 1)])
        return axis

    def _use(
        self,
        path: str,
        name: str,
        dim: int,
        segments: list[list[Group | int]],
        *,
        scored: bool = False,
    ) -> None:
        tensor = getattr(self.teacher.get_submodule(path), name, None)
        if tensor is None:
            return
        use = TeacherAxis(tensor, dim, segments, scored)
        self.uses.setdefault(f"{path}.{name}", []).append(use)
        for segment in segments:
            assert isinstance(segment[0], Group)
            segment[0].root().uses.append((use, segment))
