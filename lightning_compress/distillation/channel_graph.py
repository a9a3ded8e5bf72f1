"""Follow channels through a student and its teacher, layer by layer, by symbolic tracing.

`pruning.channel_trace` follows them through a run on sample inputs, and so knows more layers and
any Python. It cannot serve here: `initialize_from_teacher` is given two modules and no inputs, and
many modules have none to tell (a chain of convolutions takes pictures of any size). Nor is the
question the same. Pruning removes the same place of all layers and directions of a GRU; a student
takes the best units of each layer by itself. Where two widths do not fit, it must say so, by the
layer; a run of the student alone cannot.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn

from lightning_compress.distillation.channels import Axis, Group, Use
from lightning_compress.errors import TargetError

__all__ = ["ChannelGraph", "shown"]

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


class ChannelGraph:
    """The axes of all tensors of a teacher, grouped by the channels they hold.

    Args:
        student: the narrower module.
        teacher: a module of the same structure.

    Raises:
        TargetError: when the two differ in structure, or hold layers that are not known here.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = _traceable(student), _traceable(teacher)
        self.uses: dict[str, list[Use]] = {}
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
        use = Use(tensor, dim, segments, scored)
        self.uses.setdefault(f"{path}.{name}", []).append(use)
        for segment in segments:
            assert isinstance(segment[0], Group)
            segment[0].root().uses.append((use, segment))
