"""Dependency rules of layers: which axes of their weights make channels, and which read them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_compress.channels.attention import attention_rule
from lightning_compress.channels.run_time_scale import size_power
from lightning_compress.channels.scaled import absorb, normalized, refuse
from lightning_compress.channels.trace import Nodes, Trace
from lightning_compress.targets import older_norm

__all__ = [
    "CELLS",
    "NORM_TENSORS",
    "cell_rule",
    "layer_rule",
    "recurrent_rule",
]
_GATES = {"GRU": 3, "LSTM": 4, "RNN_TANH": 1, "RNN_RELU": 1}
_CELL_GATES = {nn.GRUCell: 3, nn.LSTMCell: 4, nn.RNNCell: 1}
CELLS = tuple(_CELL_GATES)
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_PLAIN = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_CONVS = nn.modules.conv._ConvNd


def recurrent_rule(trace: Trace, path: str, layer: nn.RNNBase, args: Any, out: Any) -> None:
    """Rule of a recurrent layer: its weights, its output and its last states."""
    output, states = out
    packed = not isinstance(output, Tensor)
    x = args[0].data if not isinstance(args[0], Tensor) else args[0]
    data = output.data if packed else output
    dependencies, gates = trace.dependencies, _GATES[layer.mode]
    # One size serves all layers and directions of a torch layer: equal places go together, unless
    # the caller keeps equally many of each layer anyway.
    hidden, shown = _hidden(trace, path, layer)
    steps = x.numel() / x.shape[-1] / trace.batch
    read = trace.axes(x)[-1]
    for level in range(layer.num_layers):
        if level and trace.units_per_level:
            hidden, shown = _hidden(trace, path, layer)
        for end in ("", "_reverse") if layer.bidirectional else ("",):
            own = f"_l{level}{end}"
            paths = {
                kind: trace.path_of(getattr(layer, f"{kind}{own}", None))
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            }
            _gated(trace, paths, (read, hidden, shown), gates, steps)
            if layer.proj_size and (projection := paths["weight_hr"]) is not None:
                dependencies.use(projection, 0, shown, "out")
                dependencies.use(projection, 1, hidden, "in")
                dependencies.add_work(projection, steps)
        read = np.concatenate([shown, shown]) if layer.bidirectional else shown
    given = [one for one in args[1:] if one is not None]
    _states(trace, given[0] if given else None, states, (hidden, shown))
    axes = list(trace.axes(x))
    axes[-1] = read
    trace.set_axes(data, axes)


def _hidden(trace: Trace, path: str, layer: nn.RNNBase) -> tuple[Nodes, Nodes]:
    """Nodes of a level's hidden units, and of its output."""
    hidden = trace.dependencies.new_nodes(layer.hidden_size, path)
    return hidden, trace.dependencies.new_nodes(
        layer.proj_size, path
    ) if layer.proj_size else hidden


def _gated(
    trace: Trace,
    paths: dict[str, str | None],
    nodes: tuple[Nodes | None, Nodes, Nodes],
    gates: int,
    steps: float,
) -> None:
    read, hidden, shown = nodes
    stacked = np.tile(hidden, gates)
    trace.reads(paths["weight_ih"], 1, read)
    trace.reads(paths["weight_hh"], 1, shown)
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        if (name := paths[kind]) is not None:
            trace.dependencies.use(
                name, 0, stacked, "out" if kind.startswith("weight") else "through"
            )
            if kind.startswith("weight"):
                trace.dependencies.add_work(name, steps)


def _states(trace: Trace, given: Any, states: Any, nodes: tuple[Nodes, Nodes]) -> None:
    """Initial states are cut with the units; a state that goes in and comes out is the caller's."""
    before = _pair(given)
    after = _pair(states)
    for index, state in enumerate(after):
        own = nodes[0] if index == 1 or (len(after) == 1 and nodes[0] is nodes[1]) else nodes[1]
        trace.set_axes(state, [*[None] * (state.dim() - 1), own])
        if index < len(before):
            known = trace.axes(before[index])[-1]
            if known is None:
                continue
            trace.dependencies.connect(known, own)
            if known.max() < trace.from_inputs:
                trace.given_states.append(own)


def _pair(states: Any) -> tuple[Tensor, ...]:
    if states is None:
        return ()
    return (states,) if isinstance(states, Tensor) else tuple(states)


def cell_rule(trace: Trace, path: str, layer: Any, args: Any, out: Any) -> None:
    """Rule of a recurrent cell: its weights and the states that it returns."""
    gates = next(count for kind, count in _CELL_GATES.items() if isinstance(layer, kind))
    hidden = trace.dependencies.new_nodes(layer.hidden_size, path)
    paths = {
        kind: trace.path_of(getattr(layer, kind, None))
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    _gated(trace, paths, (trace.axes(args[0])[-1], hidden, hidden), gates, 1.0)
    given = args[1] if len(args) > 1 else None
    _states(trace, given, out, (hidden, hidden))


def layer_rule(trace: Trace, path: str, layer: nn.Module, args: Any, out: Any) -> bool:
    """Apply a layer's rule to its output; False for a layer without a rule.

    Without an output it only returns whether there is a rule.
    """
    for kinds, rule in _RULES:
        if isinstance(layer, kinds):
            if out is not None:
                if rule is not _matmul:  # nothing in it makes up for a mean over fewer channels
                    refuse(trace, args)
                rule(trace, path, layer, args, out)
            return True
    return False


def _weights(
    trace: Trace, layer: nn.Module, name: str = "weight"
) -> tuple[str | None, list[tuple[str | None, str]]]:
    """The path of a weight, or of what it is made of: (path, kind of parametrization)."""
    parametrized = getattr(layer, "parametrizations", None)
    if parametrized is None or name not in parametrized:
        if older_norm(layer, name) is not None:
            return _older(trace, layer, name)
        return trace.path_of(getattr(layer, name, None)), []
    steps = parametrized[name]
    kinds = [type(one).__name__ for one in steps]
    if kinds == ["_SpectralNorm"]:
        extra = [(trace.path_of(getattr(steps[0], one, None)), one) for one in ("_u", "_v")]
        return trace.path_of(steps.original), extra
    if kinds == ["_WeightNorm"]:
        return trace.path_of(steps.original1), [(trace.path_of(steps.original0), "norm")]
    return None, [(None, f"parametrization {kinds}")]


def _older(
    trace: Trace, layer: nn.Module, name: str
) -> tuple[str | None, list[tuple[str | None, str]]]:
    """The same for the hooks of the older `torch.nn.utils.weight_norm` and `spectral_norm`."""
    if f"{name}_g" in layer._parameters:
        norm = trace.path_of(getattr(layer, f"{name}_g"))
        return trace.path_of(getattr(layer, f"{name}_v")), [(norm, "norm")]
    extra = [(trace.path_of(getattr(layer, name + one)), one) for one in ("_u", "_v")]
    return trace.path_of(getattr(layer, f"{name}_orig")), extra


def _why_unknown(extra: list[tuple[str | None, str]]) -> str:
    return extra[0][1] if extra and extra[0][1].startswith("parametrization") else ""


def _matmul(trace: Trace, path: str, layer: Any, args: Any, out: Tensor) -> None:
    transposed = isinstance(layer, _CONVS) and layer.transposed
    inside, outside = (0, 1) if transposed else (1, 0)
    batched = not isinstance(layer, _CONVS) or args[0].dim() == out.dim() == layer.weight.dim()
    channel = -1 if isinstance(layer, nn.Linear) else (1 if batched else 0)
    axes = list(trace.axes(args[0]))
    weight, extra = _weights(trace, layer)
    if weight is None or _why_unknown(extra):
        reason = _why_unknown(extra) or "a weight that is computed"
        trace.dependencies.fix(axes[channel], f"read by {path}, which has {reason}")
        refuse(trace, args[0])
        trace.clear_axes(out)
        return
    groups = getattr(layer, "groups", 1)
    size = out.shape[channel]
    made = trace.dependencies.new_nodes(size, path)
    read = axes[channel]
    if groups > 1 or extra:
        refuse(trace, args[0])
    else:
        absorb(trace, weight, inside, read)
        if read is not None and (power := size_power(layer, inside, args[0], channel)):
            trace.dependencies.own_scale(weight, inside, read, power)
    if groups > 1:
        read = _grouped(trace, layer, weight, read, made)
    else:
        trace.reads(weight, inside, read)
        trace.dependencies.use(weight, outside, made, "out")
    for name, kind in extra:
        _parametrization(trace, layer, name, kind, (read, made), (inside, outside))
    if (bias := trace.path_of(layer.bias)) is not None:
        trace.dependencies.use(bias, 0, made, "through")
    like = args[0] if transposed else out
    positions = like.numel() / like.shape[channel]
    trace.dependencies.add_work(weight, positions / trace.batch)
    spatial: list[Nodes | None] = [None] * out.dim()
    if isinstance(layer, nn.Linear):
        spatial = axes
    else:
        for nodes in axes[channel + 1 :]:
            trace.dependencies.fix(nodes, f"mixed by {path}")
    spatial[channel] = made
    trace.set_axes(out, spatial)


def _grouped(
    trace: Trace, layer: Any, weight: str, read: Nodes | None, made: Nodes
) -> Nodes | None:
    """Groups keep equal sizes: the same place of each goes; of depthwise layers, whole groups."""
    groups, dependencies = layer.groups, trace.dependencies
    if read is None:
        read = dependencies.new_nodes(layer.in_channels, "a tensor of fixed size")
        dependencies.fix(read, "input: a tensor of fixed size")
    rows = made.reshape(groups, -1)
    if layer.in_channels == groups:
        dependencies.connect(np.repeat(read, rows.shape[1]), made)
        if layer.transposed:
            dependencies.use(weight, 0, read, "through")
        else:
            dependencies.use(weight, 0, made, "through")
        return None
    columns = read.reshape(groups, -1)
    for group in range(1, groups):
        dependencies.connect(columns[0], columns[group])
        dependencies.connect(rows[0], rows[group])
    if layer.transposed:
        dependencies.use(weight, 0, read, "in")
        dependencies.use(weight, 1, rows[0], "out")
    else:
        dependencies.use(weight, 0, made, "out")
        dependencies.use(weight, 1, columns[0], "in")
    return None


def _parametrization(
    trace: Trace,
    layer: Any,
    name: str | None,
    kind: str,
    nodes: tuple[Nodes | None, Nodes],
    dims: tuple[int, int],
) -> None:
    read, made = nodes
    if name is None:
        return
    if kind == "norm":  # magnitudes, one for each entry of one axis
        older = older_norm(layer) is not None
        tensor = layer.weight_g if older else layer.parametrizations.weight.original0
        axis = next((dim for dim, size in enumerate(tensor.shape) if size > 1), None)
        if axis is None:
            return
        if axis == dims[1]:
            trace.dependencies.use(name, axis, made, "through")
        elif axis == dims[0] and read is not None:
            trace.dependencies.use(name, axis, read, "through")
        return
    # spectral_norm looks at the weight as a matrix whose rows are the axis `dim`.
    norm = older_norm(layer)
    dim = layer.parametrizations.weight[0].dim if norm is None else norm.dim
    rows, columns = (made, read) if dim == dims[1] else (read, made)
    wanted = rows if kind == "_u" else columns
    if wanted is not None:
        holder = layer.parametrizations.weight[0] if norm is None else layer
        copies = getattr(holder, kind if norm is None else f"weight{kind}").numel() // len(wanted)
        trace.dependencies.use(name, 0, np.repeat(wanted, copies), "through")


def _norm(trace: Trace, path: str, layer: Any, args: Any, out: Tensor) -> None:
    axes = list(trace.axes(args[0]))
    nodes = axes[1]
    if nodes is not None:
        named = [trace.path_of(getattr(layer, one, None)) for one in NORM_TENSORS]
        for name in filter(None, named):
            trace.dependencies.use(name, 0, nodes, "through")
        if not any(named):
            trace.dependencies.sized[path] = nodes
        if layer.weight is None and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            trace.dependencies.nonzero.update(nodes.tolist())  # less a mean of its own
    trace.set_axes(out, axes)


def _group_norm(trace: Trace, path: str, layer: Any, args: Any, out: Tensor) -> None:
    nodes = trace.axes(args[0])[1]
    if nodes is not None:
        rows = nodes.reshape(layer.num_groups, -1)
        if layer.weight is None or layer.num_groups == 1:
            trace.dependencies.fix(nodes, f"{path} takes means over them")
        trace.dependencies.connect(np.repeat(rows[:, 0], rows.shape[1]), nodes)
    _norm(trace, path, layer, args, out)


def _layer_norm(trace: Trace, path: str, layer: Any, args: Any, out: Tensor) -> None:
    axes = trace.axes(args[0])
    for nodes in axes[-len(layer.normalized_shape) :]:
        trace.dependencies.fix(nodes, f"{path} takes means over them")
    trace.set_axes(out, list(axes))


def _rms_norm(trace: Trace, path: str, layer: Any, args: Any, out: Tensor) -> None:
    axes = list(trace.axes(args[0]))
    over = range(len(axes) - len(layer.normalized_shape), len(axes))
    known = [dim for dim in over if axes[dim] is not None]
    nodes = axes[known[0]] if known else None
    if nodes is None or len(known) > 1 or len(over) > 1:
        for dim in known:
            trace.dependencies.fix(axes[dim], f"{path} takes means over them")
    else:
        weight = trace.path_of(layer.weight)
        if layer.weight is not None and weight is None:
            trace.dependencies.fix(nodes, f"read by {path}, which has a weight that is computed")
        axes[known[0]] = normalized(trace, nodes, f"the mean of {path}", weight, -0.5)
    trace.set_axes(out, axes)


def _prelu(trace: Trace, path: str, layer: Any, args: Any, out: Tensor) -> None:  # noqa: ARG001
    axes = list(trace.axes(args[0]))
    if layer.num_parameters > 1 and axes[1] is not None:
        trace.dependencies.use(str(trace.path_of(layer.weight)), 0, axes[1], "through")
    trace.set_axes(out, axes)


def _embedding(trace: Trace, path: str, layer: Any, args: Any, out: Tensor) -> None:
    weight, _ = _weights(trace, layer)
    made = trace.makes(weight, 1, out.shape[-1], path)
    trace.set_axes(out, [*trace.axes(args[0]), made])


def _opaque(trace: Trace, path: str, layer: nn.Module, args: Any, out: Any) -> None:  # noqa: ARG001
    trace.unknown(f"{path} ({type(layer).__name__})", args)


_RULES: list[tuple[Any, Any]] = [
    ((nn.Linear, _CONVS), _matmul),
    (_PLAIN, _norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _rms_norm),
    (nn.PReLU, _prelu),
    (nn.Embedding, _embedding),
    (nn.RNNBase, recurrent_rule),
    (CELLS, cell_rule),
    (nn.MultiheadAttention, attention_rule),
    ((nn.Bilinear, nn.EmbeddingBag), _opaque),
]
