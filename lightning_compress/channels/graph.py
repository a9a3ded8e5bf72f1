"""Channel dependency graph of a module: which entries of its tensors are removed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.channels.function_rules import function_rule
from lightning_compress.channels.layer_rules import layer_rule
from lightning_compress.channels.scaled import refuse
from lightning_compress.channels.trace import ChannelDependencies, Nodes, Scale, Trace
from lightning_compress.errors import TargetError
from lightning_compress.modes import bare, evaluating
from lightning_compress.targets import split_path

__all__ = [
    "ChannelGraph",
    "ChannelGroup",
    "Factors",
    "Kept",
    "ScaledKept",
    "channel_graph",
    "combine",
    "free_reshapes",
    "read_graph",
]

Kept = dict[str, dict[int, Tensor]]  # path -> axis -> entries that stay
Factors = dict[str, dict[int, Tensor]]  # path -> axis -> what its entries are multiplied with
Flags = NDArray[np.bool_]


class ScaledKept(Kept):
    """Entries that stay, by path and axis, and factors of the tensors before any goes.

    Args:
        kept: entries that stay.
        factors: by path and axis, one for each entry that there is.
    """

    def __init__(self, kept: Kept, factors: Factors) -> None:
        super().__init__(kept)
        self.factors = factors

    def moved(self, path: Callable[[str], str | None]) -> ScaledKept:
        """The same of a copy: by the paths that a function gives, without those that it lacks."""
        sides = [
            {new: dims for old, dims in side.items() if (new := path(old))}
            for side in (self, self.factors)
        ]
        return ScaledKept(*sides)


Protect = Callable[[str, str], str]  # (path of a tensor, role) to why it keeps its channels, or ""


@dataclass
class ChannelGroup:
    """Channel group: units that are chosen among each other.

    Args:
        name: the layer that makes them; the first, if several do.
        layers: all layers that make them.
        units: their numbers in the graph.
        free: of those, the units that may be removed.
        reasons: why the others are kept.
        width: channels of each unit: of a group of a GroupNorm, say, or of an attention head.
    """

    name: str
    layers: tuple[str, ...]
    units: Nodes
    free: Nodes
    reasons: tuple[str, ...] = ()
    width: int = 1  # channels of a unit: those of a group of a GroupNorm, of an attention head

    def __len__(self) -> int:
        return len(self.units)


@dataclass
class ChannelGraph:
    """Channel dependency graph: where each unit lies in a module's parameters and buffers.

    Args:
        groups: all groups that weights make; units of inputs are in none.
        axes: the unit of each entry along an axis, by (path, axis).
        roles: "out", "in" or "through", by the same key.
        work: multiply-accumulates for each weight of a tensor, for one example.
        shapes: of all parameters.
        sized: units of layers that know a size, but hold no tensors.
        inputs: the unit of each entry along (input, axis), where callers give what has channels.
        outputs: the same of outputs.
        count: of units.
        events: the units of each sum over channels that something makes up for.
        scales: what makes up for it.
    """

    groups: list[ChannelGroup]
    axes: dict[tuple[str, int], Nodes]
    roles: dict[tuple[str, int], str]
    work: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    sized: dict[str, Nodes] = field(default_factory=dict)
    inputs: dict[tuple[int, int], Nodes] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Nodes] = field(default_factory=dict)
    count: int = 0
    events: list[Nodes] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)

    def factors(self, gone: Flags) -> Factors:
        """Factors of weights that make up for means over fewer channels.

        Args:
            gone: a flag for each unit.
        """
        found: Factors = {}
        for one in self.scales:
            units = self.events[one.event]
            left = int((~gone[units]).sum())
            if not one.power or left in (0, len(units)):
                continue
            size = self.shapes[one.path][one.dim]
            values = found.setdefault(one.path, {}).setdefault(
                one.dim, torch.ones(size, dtype=torch.float64)
            )
            values[torch.from_numpy(one.places)] *= (len(units) / left) ** -one.power
        return found

    def kept(self, gone: Flags) -> ScaledKept:
        """Entries of each tensor that stay when some units go; tensors that lose none are left out.

        Args:
            gone: a flag for each unit.
        """
        found: Kept = {}
        for (path, dim), units in self.axes.items():
            stays = ~gone[units]
            if not stays.all():
                found.setdefault(path, {})[dim] = torch.from_numpy(np.flatnonzero(stays))
        return ScaledKept(found, self.factors(gone))

    def channels_of(self, layer: str) -> int:
        """Channels that a layer makes: the fewest entries along an axis that counts them.

        The rows of a recurrent weight are several for each channel, its columns one.
        """
        own = {key: units for key, units in self.axes.items() if split_path(key[0])[0] == layer}
        made = [units for key, units in own.items() if self.roles[key] == "out"]
        sizes = [
            len(units) for units in own.values()
            for one in made if set(units.tolist()) == set(one.tolist())
        ]  # fmt: skip
        return min(sizes, default=0)

    def flags(self, units: Nodes) -> Flags:
        """A flag for each unit, set for those that are given."""
        gone = np.zeros(self.count, dtype=bool)
        gone[units] = True
        return gone

    def inputs_of(self, inputs: Sequence[Any], gone: Flags) -> tuple[Any, ...]:
        """Inputs in the sizes of a smaller module: its recurrent states have fewer entries."""
        flat, spec = pytree.tree_flatten(tuple(inputs))
        number = -1
        for index, one in enumerate(flat):
            if not isinstance(one, Tensor):
                continue
            number += 1
            for dim in range(one.dim()):
                units = self.inputs.get((number, dim))
                if units is not None and gone[units].any():
                    stays = torch.from_numpy(np.flatnonzero(~gone[units])).to(one.device)
                    flat[index] = flat[index].index_select(dim, stays)
        return pytree.tree_unflatten(flat, spec)

    def group_of(self) -> Nodes:
        """The group of each unit, -1 for those of inputs."""
        found = np.full(self.count, -1, dtype=np.int64)
        for index, group in enumerate(self.groups):
            found[group.units] = index
        return found


def _unprotected(_path: str, _role: str) -> str:
    return ""


def channel_graph(
    module: nn.Module,
    inputs: Sequence[Any],
    *,
    protect: Protect = _unprotected,
    channelwise: Sequence[Any] = (),
    tapped: Mapping[str, str] | None = None,
) -> ChannelGraph:
    """Find the channels of a module by one run on sample inputs, in eval mode.

    Args:
        module: any; inputs and outputs keep their sizes, so latent size, image channels and heads
            are kept.
        inputs: positional, of two or more examples.
        protect: says of a tensor, by its path and its role ("out" where it makes channels, "in"
            where it reads them, else "through"), why these channels stay; "" if they may go.
        channelwise: functions and layer classes that treat each channel by itself.
        tapped: modules, by path, whose outputs keep their sizes, and why.

    Raises:
        TargetError: when the module does not run on the inputs.

    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> graph = channel_graph(net, (torch.zeros(2, 2),))
    >>> [(group.name, len(group.free)) for group in graph.groups]
    [('0', 8), ('2', 0)]
    """
    free_reshapes(module)
    trace = Trace(module, layer_rule, function_rule, channelwise, tapped)
    try:
        with evaluating(module), bare(module), torch.random.fork_rng(devices=[]):
            refuse(trace, trace.run(inputs))
    except Exception as error:
        raise TargetError(
            f"{type(module).__name__} does not run on its sample inputs, so its channels are not "
            f"known ({type(error).__name__}: {error})"
        ) from error
    return read_graph(trace, protect)


def free_reshapes(module: nn.Module) -> None:
    """Let each `nn.Unflatten` take its channels from what it is given: the same for any input.

    >>> net = nn.Sequential(nn.Unflatten(1, (8, 2, 2)))
    >>> free_reshapes(net)
    >>> net[0].unflattened_size
    (-1, 2, 2)
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Unflatten):
            continue
        sizes: Any = layer.unflattened_size
        if all(isinstance(one, int) for one in sizes) and -1 not in sizes:
            layer.unflattened_size = (-1, *tuple(sizes)[1:])  # type: ignore[assignment]


def read_graph(trace: Trace, protect: Protect = _unprotected) -> ChannelGraph:
    """The graph of a trace that has run, arguments as `channel_graph`."""
    dependencies = trace.dependencies
    for (path, _), use in dependencies.uses.items():
        if reason := protect(path, use.role):
            dependencies.fix(use.nodes, reason)
    components = dependencies.components()
    held = dependencies.kept_reasons(components)
    made = {key: use for key, use in dependencies.uses.items() if use.role == "out"}
    axes = {key: components[use.nodes] for key, use in dependencies.uses.items()}
    count = int(components.max()) + 1 if len(components) else 0
    return ChannelGraph(
        _groups(dependencies, components, (axes, {key: axes[key] for key in made}), held),
        axes,
        {key: use.role for key, use in dependencies.uses.items()},
        dependencies.work,
        {name: tuple(one.shape) for name, one in trace.root.named_parameters()},
        {path: components[nodes] for path, nodes in dependencies.sized.items()},
        _ends(trace.input_axes, components),
        _ends(trace.output_axes, components),
        count,
        [components[one.nodes] for one in dependencies.events],
        dependencies.scales,
    )


def _groups(
    dependencies: ChannelDependencies,
    components: Nodes,
    sides: tuple[Mapping[tuple[str, int], Nodes], Mapping[tuple[str, int], Nodes]],
    held: Mapping[int, str],
) -> list[ChannelGroup]:
    axes, made = sides
    linked = ChannelDependencies()
    linked.count = int(components.max()) + 1 if len(components) else 0
    for space in dependencies.ranges:
        units = components[space.nodes]
        linked.connect(np.full(len(units) - 1, units[0]), units[1:])
    together = linked.components()
    groups: dict[int, ChannelGroup] = {}
    for (path, _), units in made.items():
        number = int(together[units[0]])
        if number not in groups:
            members = np.flatnonzero(together == number)
            free = np.array([one for one in members.tolist() if one not in held], dtype=np.int64)
            reasons = dict.fromkeys(held[one] for one in members.tolist() if one in held)
            groups[number] = ChannelGroup(split_path(path)[0], (), members, free, tuple(reasons))
        layers = (*groups[number].layers, split_path(path)[0])
        groups[number].layers = tuple(dict.fromkeys(layers))
    widths = _widths(axes, linked.count)
    for group in groups.values():
        group.width = int(widths[group.units].min())
    return list(groups.values())


def _widths(axes: Mapping[tuple[str, int], Nodes], count: int) -> Nodes:
    """Channels of each unit: the fewest of its entries along any axis that has some."""
    found = np.full(count, np.iinfo(np.int64).max)
    for units in axes.values():
        entries = np.bincount(units, minlength=count)
        found = np.where(entries > 0, np.minimum(found, entries), found)
    return np.where(found == np.iinfo(np.int64).max, 1, found)


def combine(parts: Mapping[str, ChannelGraph]) -> ChannelGraph:
    """The graphs of several parts of a module as one, with the paths of the module.

    Args:
        parts: by the path of the part. Units are numbered part after part.
    """
    whole = ChannelGraph([], {}, {}, {}, {})
    for root, one in parts.items():
        prefix, offset = f"{root}." if root else "", whole.count
        for group in one.groups:
            layers = tuple(prefix + name for name in group.layers)
            units, free = group.units + offset, group.free + offset
            whole.groups.append(
                ChannelGroup(prefix + group.name, layers, units, free, group.reasons, group.width)
            )
        whole.axes |= {(prefix + path, dim): u + offset for (path, dim), u in one.axes.items()}
        whole.roles |= {(prefix + path, dim): role for (path, dim), role in one.roles.items()}
        whole.work |= {prefix + path: work for path, work in one.work.items()}
        whole.shapes |= {prefix + path: shape for path, shape in one.shapes.items()}
        whole.sized |= {prefix + path: units + offset for path, units in one.sized.items()}
        first = len(whole.events)
        whole.events += [units + offset for units in one.events]
        whole.scales += [
            replace(each, path=prefix + each.path, event=each.event + first) for each in one.scales
        ]
        whole.count += one.count
    return whole


def _ends(ends: Sequence[Any], components: Nodes) -> dict[tuple[int, int], Nodes]:
    return {
        (number, dim): components[nodes]
        for number, axes in enumerate(ends)
        for dim, nodes in enumerate(axes)
        if nodes is not None
    }
