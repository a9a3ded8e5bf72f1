"""Initialize a narrower student with its teacher's most important channels.

Student and teacher are read side by side from the structure that `torch.fx` records, each into a
`ChannelDependencies` of its own, by the layer rules that channel removal uses (`layer_rules`). The
rules see stand-in tensors of a layer's own sizes, so no sample inputs are needed.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_compress.channels.function_rules import function_rule
from lightning_compress.channels.graph import ChannelGraph, Kept, read_graph
from lightning_compress.channels.layer_rules import NORM_TENSORS, layer_rule
from lightning_compress.channels.trace import Nodes, Trace
from lightning_compress.errors import TargetError
from lightning_compress.projection import select_entries

__all__ = ["MatchedChannels", "MatchedGroup", "initialize_from_teacher"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.PReLU)  # by channel
_MIXED = {torch.matmul, operator.matmul, torch.bmm, torch.baddbmm, torch.einsum}
_MIXED |= {functional.scaled_dot_product_attention, "matmul", "bmm"}
_ADDED = {operator.add, operator.iadd, operator.sub, operator.mul, torch.add, torch.mul}
_LONE = "layer."
Pair = tuple[Nodes, Nodes]  # of the teacher and of the student
# The channels of a value between layers, piece by piece; None: an input's own, of unknown size.
Pieces = list["Pair | None"]


@torch.no_grad()
def initialize_from_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Copy a teacher's most important channels, by L2 norm, into a student of the same structure.

    A channel is chosen once: the rows of the layer that makes it, its norm's statistics and the
    columns of each layer that reads it are copied together, through reshapes, concatenations and
    sums; of a recurrent layer each gate gives the same units, of a GroupNorm each group gives as
    many channels, or whole groups go along. Inputs and outputs are kept whole.

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
    matched = MatchedChannels(student, teacher)
    ours, theirs = (_tensors(one) for one in (matched.student, matched.teacher))
    scores = _squares(matched.graph, theirs)
    kept = matched.kept([_largest(scores[one.units], one.count) for one in matched.groups])
    copies: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        chosen = select_entries(tensor.detach(), kept.get(name, {}))
        target = ours.get(name)
        if target is None or target.shape != chosen.shape:
            shape = None if target is None else tuple(target.shape)
            raise TargetError(
                f"{_shown(name)}: the student has {shape}, the teacher's channels "
                f"give {tuple(chosen.shape)}"
            )
        copies[name] = chosen
    for name, chosen in copies.items():  # only once all fit
        ours[name].copy_(chosen)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _squares(graph: ChannelGraph, tensors: dict[str, Tensor]) -> Tensor:
    """The squared L2 norm of each unit, over the weights that make it."""
    total = torch.zeros(graph.count, dtype=torch.double)
    for (path, dim), units in graph.axes.items():
        tensor, role = tensors[path], graph.roles[path, dim]
        tied = role == "through" and tensor.dim() > 1  # made by one layer and read by another
        if role == "out" or tied:
            squares = tensor.detach().double().cpu().square().movedim(dim, 0).flatten(1).sum(1)
            total.index_add_(0, torch.from_numpy(units), squares)
    return total


def _largest(scores: Tensor, count: int) -> Nodes:
    """Positions, ascending, of the largest scores; of equal ones the first."""
    order = scores.argsort(descending=True, stable=True)
    return np.sort(order[:count].numpy())


@dataclass(frozen=True)
class MatchedGroup:
    """Units of a teacher that are chosen among each other for a student.

    Args:
        units: their numbers in the teacher's `ChannelGraph`.
        count: how many of them the student has.
        where: the layer that makes them, for messages.
    """

    units: Nodes
    count: int
    where: str


class MatchedChannels:
    """The channel dependencies of a teacher, matched with those of a narrower student.

    Args:
        student: the narrower module.
        teacher: a module of the same structure.

    Attributes:
        student: as traced: a single layer of torch's own is put into a chain of one.
        teacher: the same.
        graph: of the teacher.
        groups: the teacher's units, and how many of each group the student has.

    Raises:
        TargetError: when the two differ in structure, or hold layers that are not known here.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = _traceable(student), _traceable(teacher)
        self._traces = tuple(
            Trace(one, layer_rule, function_rule, units_per_level=True)
            for one in (self.teacher, self.student)
        )
        self._states: set[int] = set()  # the teacher's nodes of recurrent states
        self._values: dict[fx.Node, Pieces] = {}
        for node in self._nodes():
            self._values[node] = self._visit(node)
        self.graph = read_graph(self._traces[0])
        self.groups = self._groups()

    def kept(self, chosen: Sequence[Nodes]) -> Kept:
        """Entries of the teacher's tensors that the student gets.

        Args:
            chosen: for each group, positions among its units.
        """
        gone = np.ones(self.graph.count, dtype=bool)
        for group, positions in zip(self.groups, chosen, strict=True):
            gone[group.units[positions]] = False
        return self.graph.kept(gone)

    def _nodes(self) -> list[fx.Node]:
        ours, theirs = (list(_fx_graph(one).nodes) for one in (self.student, self.teacher))
        pairs = [[(n.op, str(n.target)) for n in nodes] for nodes in (ours, theirs)]
        if pairs[0] != pairs[1]:
            both = zip(*pairs, strict=False)
            first = next((pair for pair in both if pair[0] != pair[1]), ("its end", "its end"))
            raise TargetError(
                f"student and teacher differ in structure: {first[0]} and {first[1]}; channels "
                "can only be copied between models that differ in width"
            )
        return theirs

    def _groups(self) -> list[MatchedGroup]:
        """Units that lie in the same label ranges are chosen among each other."""
        theirs, ours = (_by_ranges(trace) for trace in self._traces)
        groups = []
        for ranges, units in theirs.items():
            where = _shown(self._traces[0].dependencies.ranges[ranges[0]].where)
            count = len(ours.get(ranges, ()))
            if count > len(units):
                raise TargetError(
                    f"{where}: the student has {count} channels, the teacher only "
                    f"{len(units)}: nothing to choose from"
                )
            groups.append(MatchedGroup(units, count, where))
        return groups

    def _visit(self, node: fx.Node) -> Pieces:
        if node.op == "call_module":
            return self._layer(str(node.target), self._of(node.args[0]))
        if node.op == "get_attr":
            raise TargetError(
                f"{str(node.target).removeprefix('root.')} is a free parameter: its channels are "
                "not known"
            )
        if node.op == "output":
            self._check_output(node.args[0])
            return [None]
        if node.target in (torch.cat, torch.concat):
            return [piece for one in node.args[0] for piece in self._of(one)]  # type: ignore[union-attr]
        values = [self._of(one) for one in node.args[:2]]
        if node.target in _MIXED and any(value != [None] for value in values):
            raise TargetError(
                f"{node} multiplies two values, as attention does: which of their channels belong "
                "together is not known here"
            )
        if node.target in _ADDED and len(values) == 2:
            if values[0] == [None]:
                return values[1]
            if values[1] != [None]:
                self._join(values[0], values[1], str(node))
        return values[0] if values else [None]

    def _of(self, argument: Any) -> Pieces:
        return self._values[argument] if isinstance(argument, fx.Node) else [None]

    def _join(self, one: Pieces, other: Pieces, where: str) -> None:
        mine, theirs = _whole(one), _whole(other)
        if mine is None or theirs is None:
            raise TargetError(f"{where}: what is added differs in structure")
        if [len(side) for side in mine] != [len(side) for side in theirs]:
            raise TargetError(
                f"{where}: what is added has {len(mine[1])} and {len(theirs[1])} channels in the "
                f"student, {len(mine[0])} and {len(theirs[0])} in the teacher"
            )
        for trace, left, right in zip(self._traces, mine, theirs, strict=True):
            trace.dependencies.connect(left, right)

    def _check_output(self, output: Any) -> None:
        """What comes out has a meaning: it keeps its size and order."""
        if isinstance(output, (tuple, list)):
            for one in output:
                self._check_output(one)
            return
        for piece in self._of(output):
            if piece is None or len(piece[0]) == len(piece[1]):
                continue
            if int(piece[0][0]) not in self._states:
                raise TargetError(
                    f"{self._where(piece)} is an output and has {len(piece[1])} channels in the "
                    f"student, {len(piece[0])} in the teacher: outputs must be equal in size"
                )

    def _where(self, piece: Pair) -> str:
        """The layer that makes a piece."""
        spaces = self._traces[0].dependencies.ranges
        return _shown(next(one.where for one in spaces if piece[0][0] in one.nodes))

    def _layer(self, path: str, value: Pieces) -> Pieces:
        theirs, ours = (trace.root.get_submodule(path) for trace in self._traces)
        where = _shown(path)
        if type(ours) is not type(theirs):
            raise TargetError(f"{where}: {type(ours).__name__} and {type(theirs).__name__}")
        if isinstance(theirs, nn.GroupNorm):
            value = self._grouped(theirs, ours, value, where)
        tensors = [*theirs.named_parameters(recurse=False), *theirs.named_buffers(recurse=False)]
        if not tensors and not list(theirs.parameters()):
            return value
        if isinstance(theirs, (*_NORMS, nn.GroupNorm)):
            if getattr(theirs, "num_parameters", None) != 1:  # a PReLU's single slope fits any size
                self._norm(path, value, where)
            return value
        _check_known(theirs, where)
        read: list[Nodes | None] = [None, None]
        if not isinstance(theirs, nn.Embedding):
            read = list(self._read(value, (_inputs(theirs), _inputs(ours)), where))
        made = [_apply(trace, path, nodes) for trace, nodes in zip(self._traces, read, strict=True)]
        if isinstance(theirs, nn.RNNBase):
            self._states.update(made[0].tolist())
        return [(made[0], made[1])]

    def _grouped(self, theirs: Any, ours: Any, value: Pieces, where: str) -> Pieces:
        """Channels of a GroupNorm, which takes means over each group: it stays a group."""
        sizes = [one.num_channels // one.num_groups for one in (theirs, ours)]
        alike = theirs.num_groups == ours.num_groups
        if not alike and sizes[0] != sizes[1]:
            raise TargetError(
                f"{where}: {ours.num_groups} groups of {sizes[1]} channels in the student, "
                f"{theirs.num_groups} of {sizes[0]} in the teacher: their number or their size "
                "must be equal"
            )
        read = self._read(value, (theirs.num_channels, ours.num_channels), where)
        for trace, nodes, size in zip(self._traces, read, sizes, strict=True):
            rows = nodes.reshape(-1, size)
            if alike:  # label ranges of their own: a group's channels are chosen among each other
                for row in rows:
                    trace.dependencies.connect(trace.dependencies.new_nodes(size, where), row)
            else:
                trace.dependencies.connect(np.repeat(rows[:, :1], size - 1, axis=1), rows[:, 1:])
        return [read]

    def _norm(self, path: str, value: Pieces, where: str) -> None:
        layers = [trace.root.get_submodule(path) for trace in self._traces]
        for name in NORM_TENSORS:
            tensors = [getattr(layer, name, None) for layer in layers]
            if tensors[0] is None or tensors[1] is None:
                continue
            read = self._read(value, (len(tensors[0]), len(tensors[1])), where)
            for trace, tensor, nodes in zip(self._traces, tensors, read, strict=True):
                trace.dependencies.use(str(trace.path_of(tensor)), 0, nodes, "through")

    def _read(self, value: Pieces, sizes: tuple[int, int], where: str) -> Pair:
        """Nodes, in teacher and student, of the entries that a layer of these sizes reads.

        Raises:
            TargetError: when the sizes of the value and of the layer do not belong together.
        """
        known = [piece for piece in value if piece is not None]
        lengths = [sum(len(piece[side]) for piece in known) for side in (0, 1)]
        if len(value) - len(known) == 1:
            rest = (sizes[0] - lengths[0], sizes[1] - lengths[1])
            if rest[0] != rest[1] or rest[0] <= 0:
                raise TargetError(f"{where}: inputs of {rest[1]} and {rest[0]} differ in size")
            fresh = [trace.dependencies.new_nodes(rest[0], where) for trace in self._traces]
            free = (fresh[0], fresh[1])
            return _joined([free if piece is None else piece for piece in value])
        if len(value) == len(known) and sizes == tuple(lengths):
            return _joined(known)
        if len(value) == len(known) == 1:
            copies, left = divmod(sizes[0], lengths[0])
            if not left and sizes == (lengths[0] * copies, lengths[1] * copies):  # as by a Flatten
                return np.repeat(known[0][0], copies), np.repeat(known[0][1], copies)
            block, left = divmod(lengths[0], sizes[0])
            if not left and tuple(lengths) == (sizes[0] * block, sizes[1] * block):
                return self._in_blocks(known[0], block)  # as by an Unflatten
        raise TargetError(
            f"{where} takes {sizes[1]} channels in the student and {sizes[0]} in the teacher, but "
            f"is given {lengths[1]} and {lengths[0]}: how they belong together is not known"
        )

    def _in_blocks(self, piece: Pair, block: int) -> Pair:
        rows = [nodes.reshape(-1, block) for nodes in piece]
        for trace, one in zip(self._traces, rows, strict=True):
            trace.dependencies.connect(np.repeat(one[:, :1], block - 1, axis=1), one[:, 1:])
        return rows[0][:, 0], rows[1][:, 0]


def _joined(pieces: Sequence[Pair]) -> Pair:
    teacher, student = (np.concatenate(side) for side in zip(*pieces, strict=True))
    return teacher, student


def _whole(value: Pieces) -> Pair | None:
    """All nodes of a value; None where a piece is an input's own."""
    known = [piece for piece in value if piece is not None]
    return _joined(known) if len(known) == len(value) else None


def _by_ranges(trace: Trace) -> dict[tuple[int, ...], Nodes]:
    """The units of one trace, by the numbers of the label ranges in which they lie."""
    classes = trace.dependencies.components()
    found: dict[int, list[int]] = {}
    for number, space in enumerate(trace.dependencies.ranges):
        for unit in np.unique(classes[space.nodes]).tolist():
            found.setdefault(unit, []).append(number)
    ranges: dict[tuple[int, ...], list[int]] = {}
    for unit in sorted(found):
        ranges.setdefault(tuple(found[unit]), []).append(unit)
    return {key: np.array(units) for key, units in ranges.items()}


def _apply(trace: Trace, path: str, read: Nodes | None) -> Nodes:
    """The nodes of what a layer makes, by its rule on stand-in tensors without values."""
    layer: Any = trace.root.get_submodule(path)
    spatial = [1] * (layer.weight.dim() - 2) if isinstance(layer, (*_CONVS, *_TRANSPOSED)) else []
    before = [1, 1] if isinstance(layer, nn.RNNBase) else [1]
    x = torch.empty(*before, *([] if read is None else [len(read)]), *spatial, device="meta")
    shown = torch.empty(*before, _outputs(layer), *spatial, device="meta")
    axes: list[Nodes | None] = [None] * x.dim()
    if read is not None:
        axes[len(before)] = read
    trace.set_axes(x, axes)
    layer_rule(trace, path, layer, (x,), (shown, None) if len(before) == 2 else shown)
    made = trace.axes(shown)[len(before)]
    assert made is not None
    return made


def _inputs(layer: Any) -> int:
    """How many channels a layer reads."""
    if isinstance(layer, nn.RNNBase):
        return layer.input_size
    return layer.weight.shape[0 if isinstance(layer, _TRANSPOSED) else 1]


def _outputs(layer: Any) -> int:
    """How many channels a layer makes."""
    if isinstance(layer, nn.RNNBase):
        return layer.hidden_size
    return layer.weight.shape[1 if isinstance(layer, (*_TRANSPOSED, nn.Embedding)) else 0]


def _check_known(layer: nn.Module, where: str) -> None:
    """Refuse a layer that has no rule, or whose rule matches no student."""
    if isinstance(layer, nn.RNNBase):
        if layer.bidirectional or layer.proj_size:
            raise TargetError(f"{where}: bidirectional or projected layers are not known here")
        return
    known = isinstance(layer, (nn.Linear, nn.Embedding, *_CONVS, *_TRANSPOSED))
    if not known or getattr(layer, "groups", 1) != 1:
        raise TargetError(f"{where}: channels of {layer} are not known here")


def _shown(path: str) -> str:
    """A path as its author wrote it."""
    return path.removeprefix(_LONE)


def _traceable(module: nn.Module) -> nn.Module:
    """A layer of torch's own would be traced into: it goes into a chain of one."""
    lone = fx.Tracer().is_leaf_module(module, "")
    return nn.Sequential(OrderedDict({_LONE[:-1]: module})) if lone else module


def _fx_graph(module: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(module)
    except Exception as error:  # torch.fx raises whatever the forward pass raises
        raise TargetError(
            f"{type(module).__name__} cannot be traced, so its channels are not known "
            f"({type(error).__name__}: {error})"
        ) from error
