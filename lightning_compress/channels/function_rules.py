"""Dependency rules of tensor functions: channels stay in place, are coupled, or must be kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.channels.contractions import CONTRACTIONS, contraction
from lightning_compress.channels.scaled import (
    absorb,
    carry,
    keeps_zero,
    normalized,
    refuse,
    summed,
)
from lightning_compress.channels.trace import Axes, ChannelDependencies, Nodes, Trace, tensors_in

__all__ = [
    "ALONG",
    "JOINING",
    "MERGING",
    "MOVES",
    "POINTWISE",
    "POOL",
    "REDUCE",
    "SILENT",
    "SPATIAL",
    "function_rule",
    "move",
    "name_of",
]
MOVES = frozenset(
    """
    H T __getitem__ broadcast_to cat channel_shuffle chunk concat concatenate dstack expand
    expand_as flatten flip gather hstack index_select mH mT moveaxis movedim narrow permute
    pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll select
    split split_with_sizes squeeze stack swapaxes swapdims t take_along_dim tensor_split tile
    transpose unbind unflatten unsqueeze view view_as vstack
    """.split()  # noqa: SIM905
)
JOINING = frozenset(
    """
    cat concat concatenate dstack hstack stack vstack
    """.split()  # noqa: SIM905
)
MERGING = frozenset(
    """
    flatten pixel_shuffle ravel reshape reshape_as unflatten view view_as
    """.split()  # noqa: SIM905
)
POINTWISE = frozenset(
    """
    __abs__ __add__ __and__ __div__ __eq__ __ge__ __gt__ __iadd__ __idiv__ __imul__ __invert__
    __isub__ __itruediv__ __le__ __lt__ __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rdiv__
    __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__ __truediv__ abs absolute add addcdiv addcmul
    alpha_dropout atan2 bernoulli bfloat16 bool ceil celu clamp clamp_max clamp_min clip clone
    contiguous cos cpu cuda data detach div divide double dropout dropout1d dropout2d dropout3d
    elu empty_like eq erf exp expm1 fake_quantize_per_tensor_affine feature_alpha_dropout
    feature_dropout float floor floor_divide fmax fmin fmod full_like ge gelu gt half hardshrink
    hardsigmoid hardswish hardtanh int isfinite isnan le leaky_relu lerp log log1p log2
    logaddexp logical_and logical_not logical_or logical_xor logsigmoid long lt masked_fill
    maximum minimum mish mul multiply nan_to_num ne neg negative ones_like pow rand_like
    randn_like reciprocal relu relu6 remainder requires_grad requires_grad_ round rrelu rsqrt
    rsub selu sigmoid sign silu sin softplus softshrink softsign sqrt square sub subtract tan
    tanh tanhshrink threshold to true_divide type type_as where zeros_like
    """.split()  # noqa: SIM905
)
ALONG = frozenset(
    """
    cumprod cumsum layer_norm log_softmax normalize rms_norm softmax softmin
    """.split()  # noqa: SIM905
)
REDUCE = frozenset(
    """
    all amax amin any argmax argmin count_nonzero logsumexp max mean median min nanmean nansum
    linalg_norm linalg_vector_norm norm prod std std_mean sum var var_mean vector_norm
    """.split()  # noqa: SIM905
)
SILENT = frozenset(
    """
    __len__ device dim dtype element_size get_device has_names is_complex is_contiguous is_cpu
    is_cuda is_floating_point is_meta is_quantized is_sparse is_tensor item layout ndim ndimension
    nelement numel requires_grad shape size storage_offset stride tolist
    """.split()  # noqa: SIM905
)
SPATIAL = frozenset({"interpolate", "upsample", "pad", "grid_sample", "instance_norm"})
POOL = re.compile(r"(?:adaptive_)?(?:avg|max|lp)_pool([123])d(?:_with_indices)?")


def name_of(func: Any) -> str:
    """The name of a function, or of the attribute that a getter reads.

    >>> import torch
    >>> name_of(torch.relu), name_of(torch.Tensor.shape.__get__)
    ('relu', 'shape')
    """
    name = getattr(func, "__name__", str(func))
    return func.__self__.__name__ if name == "__get__" else name


def move(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Move nodes the way that the function moves values."""
    name, joined = name_of(func), name_of(func) in JOINING
    sources = [one for one in tensors_in((args, kwargs)) if joined or one is args[0]]
    if joined:
        _fill(trace, sources)
    axes: list[Axes] = [[None] * one.dim() for one in tensors_in(out)]
    for dim in range(sources[0].dim()):
        nodes = [trace.axes(one)[dim] for one in sources]
        if all(one is None for one in nodes):
            continue
        if joined and dim != _joined_axis(name, sources[0].dim(), args, kwargs):
            for one in nodes[1:]:
                trace.dependencies.connect(nodes[0], one)  # type: ignore[arg-type]
            nodes = [nodes[0]] * len(nodes)
        stand_in = {
            id(one): _spread(one, dim, own) for one, own in zip(sources, nodes, strict=True)
        }
        moved_args, moved_kwargs = pytree.tree_map(
            lambda one: stand_in.get(id(one), one),  # noqa: B023
            (args, kwargs),
        )
        found = tensors_in(func(*moved_args, **moved_kwargs))
        target = _target_axis(name, dim, sources[0].dim(), moved_args, moved_kwargs)
        carried = [_carry(trace, one, target) for one in found]
        _check_whole(trace.dependencies, name, nodes, carried)
        for index, (axis, own) in enumerate(carried):
            if axis is not None and axes[index][axis] is not None:
                trace.dependencies.fix(own, f"{name} merges two axes")
                trace.dependencies.fix(axes[index][axis], f"{name} merges two axes")
            elif axis is not None:
                axes[index][axis] = own
        _equal_pieces(trace.dependencies, name, [own for _, own in carried])
    _set_moved(trace, sources, axes, out, joined=joined)


def _set_moved(
    trace: Trace, sources: Sequence[Tensor], axes: Sequence[Axes], out: Any, *, joined: bool
) -> None:
    """Nodes of what was moved; a sum over channels is one wherever it is moved to."""
    tag = None if joined else trace.tag_of(sources[0])
    if joined and any(trace.tag_of(one) is not None for one in sources):
        refuse(trace, sources)
    for result, one in zip(tensors_in(out), axes, strict=True):
        trace.set_axes(result, one)
        if tag is not None:
            trace.set_tag(result, tag)


def _fill(trace: Trace, sources: Sequence[Tensor]) -> None:
    """A tensor of fixed size that is joined with channels gets nodes of its own, which are kept."""
    for dim in range(sources[0].dim()):
        axes = [trace.axes(one)[dim] for one in sources]
        if all(one is None for one in axes):
            continue
        for one, nodes in zip(sources, axes, strict=True):
            if nodes is None:
                known = list(trace.axes(one))
                known[dim] = trace.dependencies.new_nodes(one.shape[dim], "a tensor of fixed size")
                trace.dependencies.fix(known[dim], "joined as a tensor of fixed size")
                trace.set_axes(one, known)


def _carry(trace: Trace, moved: Tensor, target: int | None) -> tuple[int | None, Nodes]:
    """The axis that nodes lie along after a move, and the nodes; others are connected.

    Where channels are split into heads, whole heads stay together.
    """
    values, dependencies = moved.numpy(), trace.dependencies
    along = [dim for dim in range(values.ndim) if np.ptp(values, axis=dim).any()]
    if not along:
        single = [dim for dim in range(values.ndim) if values.shape[dim] == 1]
        axis = target if target in single else (single[-1] if single else None)
        return axis, np.unique(values)
    axis = target if target in along else along[0]
    if len(along) > 1:
        heads = [dim for dim in along if trace.has_heads(_distinct(values, dim))]
        stacked = len(along) > 2 and values.shape[along[0]] == 3  # queries, keys and values
        if heads:
            axis = along[1] if stacked and along[1] in heads else heads[0]
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    if len(along) > 1:
        dependencies.connect(np.repeat(rows[:, :1], rows.shape[1] - 1, axis=1), rows[:, 1:])
    return axis, np.ascontiguousarray(rows[:, 0])


def _distinct(values: NDArray[np.int64], dim: int) -> int:
    """How many different entries there are along an axis, where all others are at the first."""
    first = [slice(None) if one == dim else 0 for one in range(values.ndim)]
    return len(np.unique(values[tuple(first)]))


def _check_whole(
    dependencies: ChannelDependencies,
    name: str,
    nodes: Sequence[Nodes | None],
    carried: Sequence[tuple[int | None, Nodes]],
) -> None:
    kept = [own for axis, own in carried if axis is not None]
    classes = np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)
    for one in nodes:
        lost = one is not None and not (kept and len(np.unique(classes)) >= len(np.unique(one)))
        if lost and name not in MERGING:
            dependencies.fix(one, f"{name} takes a part of them")


def _equal_pieces(dependencies: ChannelDependencies, name: str, pieces: Sequence[Nodes]) -> None:
    """Pieces are cut to equal sizes again when there are fewer channels."""
    if name not in ("chunk", "split", "tensor_split", "unbind", "split_with_sizes"):
        return
    if len({tuple(one) for one in pieces}) > 1:
        for piece in pieces[1:]:
            if len(piece) == len(pieces[0]):
                dependencies.connect(pieces[0], piece)
            else:
                dependencies.fix(piece, f"{name} cuts them into unequal pieces")


def _spread(tensor: Tensor, dim: int, nodes: Nodes | None) -> Tensor:
    if nodes is None or dim >= tensor.dim():
        return torch.full(tensor.shape, -1, dtype=torch.int64)
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return torch.from_numpy(nodes).reshape(shape).expand(tensor.shape).contiguous()


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


def function_rule(
    trace: Trace, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Apply the rule of a function, or of a layer class that treats each channel by itself."""
    name = name_of(func)
    if func in trace.channelwise or name.rstrip("_") in POINTWISE or name in POINTWISE:
        _pointwise(trace, name, args, kwargs, out)
    elif name in MOVES or name.rstrip("_") in MOVES:
        move(trace, func, args, kwargs, out)
    elif (pool := POOL.fullmatch(name)) or name in SPATIAL:
        _spatial(trace, name, args[0], out, int(pool[1]) if pool else args[0].dim() - 2)
    elif name in ALONG:
        _along(trace, name, args, kwargs, out)
    elif name in REDUCE:
        _reduce(trace, name, args, kwargs, out)
    elif name == "glu":
        _glu(trace, args, kwargs, out)
    elif name == "linear":
        _linear(trace, args, kwargs, out)
    elif name in CONTRACTIONS:
        refuse(trace, (args, kwargs))
        contraction(trace, name, args, kwargs, out)
    elif name not in SILENT:
        refuse(trace, (args, kwargs))
        trace.unknown(name, (args, kwargs))


def _pointwise(trace: Trace, name: str, args: Any, kwargs: Any, out: Any) -> None:
    operands = tensors_in((args, kwargs))
    if trace.dependencies.events and carry(trace, name, args, kwargs, out):
        return
    for result in tensors_in(out):
        axes: Axes = [None] * result.dim()
        for back in range(1, result.dim() + 1):
            size = result.shape[-back]
            same = [one for one in operands if one.dim() >= back and one.shape[-back] == size]
            found = [trace.axes(one)[-back] for one in same]
            known = [one for one in found if one is not None]
            for other in known[1:]:
                trace.dependencies.connect(known[0], other)
            if known and len(known) < len(found) and size > 1:
                trace.dependencies.fix(known[0], f"meets a tensor of fixed size in {name}")
            axes[-back] = known[0] if known else None
            if known and not keeps_zero(trace, name, args, kwargs, back):
                axes[-back] = _nonzero(trace, known[0])
        trace.set_axes(result, axes)


def _nonzero(trace: Trace, nodes: Nodes) -> Nodes:
    """Nodes of values that are not 0 where those of other nodes are."""
    dependencies = trace.dependencies
    if dependencies.nonzero.issuperset(nodes.tolist()):
        return nodes
    fresh = dependencies.new_nodes(len(nodes), "a function that is not 0 at 0")
    dependencies.connect(nodes, fresh)
    dependencies.nonzero.update(fresh.tolist())
    if dependencies.tags:
        known = dependencies.tags
        dependencies.tags |= {
            new: known[old]
            for old, new in zip(nodes.tolist(), fresh.tolist(), strict=True)
            if old in known
        }
    return fresh


def _spatial(trace: Trace, name: str, x: Tensor, out: Any, dims: int) -> None:
    if name == "instance_norm" or trace.tag_of(x) is not None:
        refuse(trace, x)
    for result in tensors_in(out):
        axes = trace.axes(x)
        kept = x.dim() - dims
        for dim in range(kept):
            if result.shape[dim] != x.shape[dim]:
                trace.dependencies.fix(axes[dim], f"resized by {name}")
        for nodes in axes[kept:]:
            trace.dependencies.fix(nodes, f"mixed by {name}")
        same = zip(axes[:kept], result.shape, strict=False)
        fitting = [one if one is not None and len(one) == n else None for one, n in same]
        trace.set_axes(result, [*fitting, *[None] * dims])


def _along(trace: Trace, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    axes, mixed = trace.axes(x), kwargs.get("dim", args[1] if len(args) > 1 else -1)
    if name in ("layer_norm", "rms_norm"):
        mixed = list(range(-len(mixed), 0)) if isinstance(mixed, (tuple, list)) else [-1]
    mixed = mixed if isinstance(mixed, (tuple, list)) else [1 if mixed is None else mixed]
    known = [dim for dim in mixed if axes[dim] is not None]
    if name in ("rms_norm", "normalize") and len(known) == 1:
        made = list(axes)
        made[known[0]] = _normalized(trace, name, args, kwargs, axes[known[0]])
        trace.set_axes(out, made)
        return
    refuse(trace, (args, kwargs))
    for dim in mixed:
        trace.dependencies.fix(axes[dim], f"{name} is taken over them")
    trace.set_axes(out, list(axes))


def _normalized(trace: Trace, name: str, args: Any, kwargs: Any, nodes: Any) -> Nodes:
    if name == "normalize":  # a sum of squares does not change
        order = kwargs.get("p", args[1] if len(args) > 1 else 2.0)
        return normalized(trace, nodes, f"normalize(p={order:g})", None, 0.0)
    given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    weight = given.get("weight")
    own = trace.path_of(weight)
    if weight is not None and own is None:
        trace.unknown("rms_norm, by a weight that is computed", weight)
    return normalized(trace, nodes, name, own, -0.5)


def _reduce(trace: Trace, name: str, args: Any, kwargs: Any, out: Any) -> None:
    operands = tensors_in((args, kwargs))
    if name in ("max", "min") and len(operands) == 2:
        _pointwise(trace, name, args, kwargs, out)
        return
    x = operands[0]
    place = 2 if name in ("norm", "linalg_norm", "linalg_vector_norm", "vector_norm") else 1
    given = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
    dims = given if isinstance(given, (tuple, list)) else [given]
    dims = range(x.dim()) if None in dims or not dims else [dim % x.dim() for dim in dims]
    axes = trace.axes(x)
    known = [one for dim in dims if (one := axes[dim]) is not None]
    sums = name in ("sum", "mean") or place == 2
    if not (len(known) == 1 and sums and isinstance(out, Tensor)) or not summed(
        trace, known[0], name, float(name == "mean"), out
    ):
        if known or name not in ("sum", "mean"):
            refuse(trace, x)
        for dim in dims:
            trace.dependencies.fix(axes[dim], f"{name} is taken over them")
    for result in tensors_in(out):
        flat = [one for dim, one in enumerate(axes) if dim not in dims]
        full = [None if dim in dims else one for dim, one in enumerate(axes)]
        trace.set_axes(result, full if result.dim() == x.dim() else flat[: result.dim()])


def _glu(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    axes = list(trace.axes(args[0]))
    if (nodes := axes[dim]) is not None:
        axes[dim], other = np.split(nodes, 2)
        trace.dependencies.connect(axes[dim], other)
    trace.set_axes(out, axes)


def _linear(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    path = trace.path_of(weight)
    if path is None:
        trace.unknown("linear, by a weight that is computed", (args, kwargs))
        return
    trace.reads(path, 1, trace.axes(x)[-1])
    absorb(trace, path, 1, trace.axes(x)[-1])
    made = trace.makes(path, 0, out.shape[-1], path.rpartition(".")[0])
    if (name := trace.path_of(bias)) is not None:
        trace.dependencies.use(name, 0, made, "through")
    trace.dependencies.add_work(path, out.numel() / out.shape[-1] / trace.batch)
    trace.set_axes(out, [*trace.axes(x)[:-1], made])
