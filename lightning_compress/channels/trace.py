"""Trace channel dependencies through one forward pass of a module.

The module runs on sample inputs under a torch function mode, so that any Python in its forward
pass will do. Layers have rules of their own (`layer_rules`), and so have the functions between
them (`function_rules`); where nothing is known, all channels that are read stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_compress.channels.own_sizes import heads_of
from lightning_compress.outputs import flatten

__all__ = [
    "Axes",
    "AxisUse",
    "ChannelDependencies",
    "Event",
    "NodeRange",
    "Nodes",
    "Scale",
    "Trace",
    "tensors_in",
]
Nodes = NDArray[np.int64]
Axes = list["Nodes | None"]


@dataclass(frozen=True)
class AxisUse:
    """One axis of a parameter or buffer, and the nodes of its entries.

    Args:
        path: of the tensor in the traced module.
        dim: the axis.
        nodes: one for each entry of the axis.
        role: "out": a weight that makes the entries; "in": one that reads them, so that zeros
            there hide whatever they hold; "through": all else, such as biases and norms.
    """

    path: str
    dim: int
    nodes: Nodes
    role: str


@dataclass(frozen=True)
class Event:
    """A sum or mean over channels, and what it is called."""

    nodes: Nodes
    how: str


@dataclass(frozen=True)
class Scale:
    """Entries of a weight that make up for channels that an event sums over.

    Args:
        path: of the weight.
        dim: the axis.
        places: along it.
        event: its number.
        power: of n / n' that what they multiply changes by.
        own: whether the layer itself computes this factor, from the size of its weight.
    """

    path: str
    dim: int
    places: Nodes
    event: int
    power: float
    own: bool = False


@dataclass(frozen=True)
class NodeRange:
    """Nodes that were created together: the output of a layer, or an axis of an input."""

    where: str
    nodes: Nodes


class ChannelDependencies:
    """Dependency graph of one trace: nodes are entries along axes, edges couple them.

    A connected component is a unit: its entries are removed together or kept together.

    >>> dependencies = ChannelDependencies()
    >>> one, two = dependencies.new_nodes(2, "one"), dependencies.new_nodes(2, "two")
    >>> dependencies.connect(one, two)
    >>> dependencies.components().tolist()
    [0, 1, 0, 1]
    """

    def __init__(self) -> None:
        self.count = 0
        self.ranges: list[NodeRange] = []
        self.uses: dict[tuple[str, int], AxisUse] = {}
        self.work: dict[str, float] = {}  # multiply-accumulates of an example for each weight
        self.fixed: list[tuple[Nodes, str]] = []
        self.released: list[Nodes] = []
        self.sized: dict[str, Nodes] = {}  # layers without tensors that know a size
        self.events: list[Event] = []
        self.scales: list[Scale] = []
        self.tags: dict[int, tuple[int, float]] = {}  # of nodes: the event that changes them
        self.nonzero: set[int] = set()  # nodes whose values are not 0 where their weights are
        self._edges: list[tuple[Nodes, Nodes]] = []

    def new_nodes(self, size: int, where: str) -> Nodes:
        """New nodes without edges."""
        nodes = np.arange(self.count, self.count + size)
        self.count += size
        self.ranges.append(NodeRange(where, nodes))
        return nodes

    def connect(self, one: Nodes, other: Nodes) -> None:
        """Add edges between nodes, pair by pair."""
        self._edges.append((one.ravel(), other.ravel()))

    def fix(self, nodes: Nodes | None, reason: str) -> None:
        """Keep the units of these nodes."""
        if nodes is not None and nodes.size:
            self.fixed.append((nodes.ravel(), reason))

    def new_event(self, nodes: Nodes, how: str) -> int:
        """The number of a new sum over channels."""
        self.events.append(Event(nodes, how))
        return len(self.events) - 1

    def scale(self, path: str, dim: int, places: Nodes, event: int, power: float) -> None:
        """Let entries of a weight make up for an event; they can for one alone."""
        for other in self.scales:
            if other.path == path and not other.own and np.isin(places, other.places).any():
                one = self.events[event]
                self.fix(one.nodes, f"{one.how}, and {path} makes up for another such")
                return
        self.scales.append(Scale(path, dim, places, event, power))

    def own_scale(self, path: str, dim: int, nodes: Nodes, power: float) -> None:
        """Let a weight make up for a factor that its layer computes from how many nodes it reads.

        Beside events that it makes up for too; once, however often the layer is called.
        """
        if not any(one.own and one.path == path for one in self.scales):
            event = self.new_event(nodes, "the scale of a weight is computed from its size")
            self.scales.append(Scale(path, dim, np.arange(len(nodes)), event, power, own=True))

    def release(self, nodes: Nodes) -> None:
        """Allow removal although inputs or outputs hold the nodes: recurrent states fed back."""
        self.released.append(nodes.ravel())

    def use(self, path: str, dim: int, nodes: Nodes, role: str) -> None:
        """Record the nodes along an axis; an axis that is recorded twice connects both."""
        known = self.uses.get((path, dim))
        if known is None:
            self.uses[path, dim] = AxisUse(path, dim, nodes, role)
            return
        self.connect(known.nodes, nodes)
        if known.role != role and "through" not in (known.role, role):
            # Made by one layer and read by another, as tied weights are.
            self.uses[path, dim] = AxisUse(path, dim, known.nodes, "through")

    def add_work(self, path: str, positions: float) -> None:
        """Count how often each weight of a tensor is multiplied for one example."""
        self.work[path] = self.work.get(path, 0.0) + positions

    def components(self) -> Nodes:
        """The connected component of each node, numbered by its first node."""
        if not self._edges:
            return np.arange(self.count)
        ends = [np.concatenate(side) for side in zip(*self._edges, strict=True)]
        ones = np.ones(len(ends[0]), dtype=np.int8)
        graph = coo_matrix((ones, tuple(ends)), shape=(self.count, self.count))
        return _by_first(connected_components(graph, directed=False)[1].astype(np.int64))

    def kept_reasons(self, components: Nodes) -> dict[int, str]:
        """Components that are kept, with the first reason that was given."""
        free = set(_members(components, self.released))
        held: dict[int, str] = {}
        for nodes, reason in self.fixed:
            edge = reason.startswith(("input", "output"))
            for one in np.unique(components[nodes]).tolist():
                if not (edge and one in free):
                    held.setdefault(one, reason)
        return held


def _members(components: Nodes, nodes: Iterable[Nodes]) -> list[int]:
    return [one for some in nodes for one in np.unique(components[some]).tolist()]


def _by_first(components: Nodes) -> Nodes:
    """The same components, numbered in the order of their first members."""
    _, first, inverse = np.unique(components, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse.ravel()]


class Trace(TorchFunctionMode):
    """One traced run: the nodes along each axis of each tensor that was seen.

    Args:
        root: the module that is run.
        layers: `layers(trace, path, layer, args, output)` sets the nodes of a layer's output and
            returns True where it has a rule; with `output=None` it only returns whether.
        functions: `functions(trace, function, args, kwargs, output)` nodes the output of a
            function between layers.
        channelwise: functions and layer classes that treat each channel by itself.
        tapped: paths of modules whose outputs keep their sizes, and why.
        units_per_level: each level of a recurrent layer has units of its own; else the same place
            of every level is one unit, since one size serves them all.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Callable[..., bool],
        functions: Callable[..., None],
        channelwise: Sequence[Any] = (),
        tapped: Mapping[str, str] | None = None,
        *,
        units_per_level: bool = False,
    ) -> None:
        super().__init__()
        self.units_per_level = units_per_level
        self.tapped = tapped or {}
        self.root, self.dependencies = root, ChannelDependencies()
        self.layers, self.functions, self.channelwise = layers, functions, tuple(channelwise)
        self._known: dict[int, tuple[Tensor, Axes]] = {}
        self._sums: dict[int, tuple[Tensor, tuple[int, float]]] = {}
        self._weights: dict[int, tuple[str, int]] = {}  # parameters by the first node of an axis
        self.stack: list[nn.Module] = [root]  # modules that are running
        self._own = {
            id(tensor): path
            for named in (root.named_buffers(), root.named_parameters())
            for path, tensor in named
        }
        self._inside = 0
        self.batch = 1
        self.from_inputs = 0  # nodes below are those of inputs
        self.input_axes: list[Axes] = []
        self.output_axes: list[Axes] = []
        self.given_states: list[Nodes] = []  # of recurrent layers, where the module is given them

    def run(self, inputs: Sequence[Any]) -> Any:
        """Run the module; inputs and outputs keep their sizes."""
        tensors = [one for one in pytree.tree_leaves(tuple(inputs)) if isinstance(one, Tensor)]
        self.batch = next((len(one) for one in tensors if one.dim()), 1)
        for number, tensor in enumerate(tensors):
            axes: Axes = [None]
            for dim in range(1, tensor.dim()):
                nodes = self.dependencies.new_nodes(tensor.shape[dim], f"input {number}")
                self.dependencies.fix(nodes, f"input {number} of the module")
                axes.append(nodes)
            self.set_axes(tensor, axes[: tensor.dim()])
            self.input_axes.append(axes[: tensor.dim()])
        self.from_inputs = self.dependencies.count
        with self._hooked(), _scripts_inlined(), self:
            output = self.root(*inputs)
        for one in tensors_in(output):
            self.output_axes.append(self.axes(one))
            for nodes in self.axes(one):
                self.dependencies.fix(nodes, "output of the module")
                self._release(nodes)
        return output

    def _release(self, nodes: Nodes | None) -> None:
        """A state that goes in and comes out is the caller's, who makes it in the layer's size."""
        for state in self.given_states:
            if nodes is not None and np.array_equal(state, nodes):
                self.dependencies.release(state)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        for path, layer in self.root.named_modules():
            handles.append(layer.register_forward_pre_hook(self._push, prepend=True))
            handles.append(layer.register_forward_hook(self._pop))
            if self._is_leaf(path, layer):
                handles.append(layer.register_forward_pre_hook(self._enter, prepend=True))
                leave = partial(self._leave, path)
                handles.append(layer.register_forward_hook(leave, with_kwargs=True))
        for path, reason in self.tapped.items():
            tap = partial(self._tap, reason)
            handles.append(self.root.get_submodule(path).register_forward_hook(tap))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _push(self, layer: nn.Module, _args: Any) -> None:
        self.stack.append(layer)

    def _pop(self, _layer: nn.Module, _args: Any, _out: Any) -> None:
        self.stack.pop()

    def has_heads(self, count: int) -> bool:
        """Whether a module that is running, or a part of the innermost, says it has so many."""
        around = [*self.stack, *self.stack[-1].modules()]
        return count > 1 and any(count in heads_of(one).values() for one in around)

    def _enter(self, _layer: nn.Module, _args: Any) -> None:
        self._inside += 1

    def _leave(self, path: str, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self._inside == 1:  # rules look at weights, which parametrizations compute
            self._layer(path, layer, (*args, *kwargs.values()), out)
        self._inside -= 1

    def _tap(self, reason: str, _layer: nn.Module, _args: Any, out: Any) -> None:
        for one in tensors_in(out):
            for nodes in self.axes(one):
                self.dependencies.fix(nodes, reason)

    def _is_leaf(self, path: str, layer: nn.Module) -> bool:
        return self._class_of(layer) is not None or self.layers(self, path, layer, (), None)

    def _class_of(self, layer: nn.Module) -> type | None:
        """The class in `channelwise` that a layer is of."""
        classes = (one for one in self.channelwise if isinstance(one, type))
        return next((one for one in classes if isinstance(layer, one)), None)

    def _layer(self, path: str, layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if (named := self._class_of(layer)) is not None:
            self.functions(self, named, args, {}, out)
        else:
            self.layers(self, path, layer, args, out)

    def axes(self, tensor: Tensor) -> Axes:
        """Nodes of each axis; None for an axis of which no entry can be removed."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        path = self._own.get(id(tensor))
        if path is None or isinstance(tensor, nn.UninitializedParameter):
            return [None] * tensor.dim()
        axes: Axes = []
        for dim, size in enumerate(tensor.shape):
            nodes = self.dependencies.new_nodes(size, path) if size > 1 else None
            if nodes is not None:
                self.dependencies.use(path, dim, nodes, "through")
                self._weights[int(nodes[0])] = path, dim
            axes.append(nodes)
        self.set_axes(tensor, axes)
        return axes

    def set_axes(self, tensor: Tensor, axes: Axes) -> None:
        """Set the nodes of a tensor's axes."""
        self._known[id(tensor)] = tensor, axes  # the tensor is kept, so that its id stays its own

    def set_tag(self, tensor: Tensor, tag: tuple[int, float]) -> None:
        """Set that a tensor without channels changes by a power of an event's ratio."""
        self._sums[id(tensor)] = tensor, tag

    def tag_of(self, tensor: Tensor) -> tuple[int, float] | None:
        """The event and the power by which a tensor without channels changes."""
        known = self._sums.get(id(tensor))
        return None if known is None else known[1]

    def weight_of(self, nodes: Nodes) -> tuple[str, int] | None:
        """The parameter, and its axis, whose entries nodes are."""
        where = self._weights.get(int(nodes[0]))
        same = where is not None and np.array_equal(self.dependencies.uses[where].nodes, nodes)
        return where if same else None

    def clear_axes(self, tensor: Tensor) -> None:
        """Set that no entry of a tensor can be removed."""
        self.set_axes(tensor, [None] * tensor.dim())

    def path_of(self, tensor: Tensor | None) -> str | None:
        """The path of a parameter or buffer of the module; the first one, if it has several."""
        return None if tensor is None else self._own.get(id(tensor))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function and set the nodes of its output."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._inside:
            with torch._C.DisableTorchFunction():
                self.functions(self, func, args, kwargs, out)
        return out

    def unknown(self, name: str, args: Any) -> None:
        """Keep all channels that something unknown reads."""
        for one in tensors_in(args):
            for nodes in self.axes(one):
                self.dependencies.fix(nodes, f"read by {name}, whose channels are not known")

    def reads(self, path: str | None, dim: int, nodes: Nodes | None, copies: int = 1) -> None:
        """Record that a weight reads nodes, each `copies` times in a row."""
        if path is not None and nodes is not None:
            self.dependencies.use(path, dim, np.repeat(nodes, copies), "in")

    def makes(self, path: str | None, dim: int, size: int, where: str) -> Nodes:
        """New nodes for the output channels of a weight."""
        nodes = self.dependencies.new_nodes(size, where)
        if path is not None:
            self.dependencies.use(path, dim, nodes, "out")
        return nodes


@contextmanager
def _scripts_inlined() -> Iterator[None]:
    """Run functions of `torch.jit.script` as the Python that they were made of."""
    kind: Any = torch.jit.ScriptFunction
    scripted = kind.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        plain = getattr(function, "_torchdynamo_inline", None)
        run = partial(scripted, function) if plain is None else plain
        return run(*args, **kwargs)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = scripted


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a nested structure, mappings and dataclasses of any class among them."""
    leaves, _ = flatten(_plain(tree))
    return [one for leaf in leaves for one in pytree.tree_leaves(leaf) if isinstance(one, Tensor)]


def _plain(tree: Any) -> Any:
    return tuple(tree) if isinstance(tree, nn.utils.rnn.PackedSequence) else tree
