"""What functions between layers do with channels: leave them in place, join them, keep them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lightning_compress.pruning.channel_moves import move
from lightning_compress.pruning.channel_names import (
    ALONG,
    MOVES,
    POINTWISE,
    POOL,
    REDUCE,
    SILENT,
    SPATIAL,
    name_of,
)
from lightning_compress.pruning.channel_trace import Axes, Trace, tensors_in

__all__ = ["label_function"]


def label_function(
    trace: Trace, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Label what a function gives, or a layer class that treats each channel by itself."""
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
    elif name not in SILENT:
        trace.unknown(name, (args, kwargs))


def _pointwise(trace: Trace, name: str, args: Any, kwargs: Any, out: Any) -> None:
    operands = tensors_in((args, kwargs))
    for result in tensors_in(out):
        axes: Axes = [None] * result.dim()
        for back in range(1, result.dim() + 1):
            size = result.shape[-back]
            same = [one for one in operands if one.dim() >= back and one.shape[-back] == size]
            found = [trace.axes(one)[-back] for one in same]
            known = [one for one in found if one is not None]
            for other in known[1:]:
                trace.ledger.join(known[0], other)
            if known and len(known) < len(found) and size > 1:
                trace.ledger.fix(known[0], f"meets a tensor of fixed size in {name}")
            axes[-back] = known[0] if known else None
        trace.label(result, axes)


def _spatial(trace: Trace, name: str, x: Tensor, out: Any, dims: int) -> None:
    for result in tensors_in(out):
        axes = trace.axes(x)
        kept = x.dim() - dims
        for dim in range(kept):
            if result.shape[dim] != x.shape[dim]:
                trace.ledger.fix(axes[dim], f"resized by {name}")
        for labels in axes[kept:]:
            trace.ledger.fix(labels, f"mixed by {name}")
        same = zip(axes[:kept], result.shape, strict=False)
        fitting = [one if one is not None and len(one) == n else None for one, n in same]
        trace.label(result, [*fitting, *[None] * dims])


def _along(trace: Trace, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    axes, mixed = trace.axes(x), kwargs.get("dim", args[1] if len(args) > 1 else -1)
    if name in ("layer_norm", "rms_norm"):
        mixed = list(range(-len(mixed), 0)) if isinstance(mixed, (tuple, list)) else [-1]
    for dim in mixed if isinstance(mixed, (tuple, list)) else [mixed]:
        trace.ledger.fix(axes[1 if dim is None else dim], f"{name} is taken over them")
    trace.label(out, list(axes))


def _reduce(trace: Trace, name: str, args: Any, kwargs: Any, out: Any) -> None:
    operands = tensors_in((args, kwargs))
    if name in ("max", "min") and len(operands) == 2:
        _pointwise(trace, name, args, kwargs, out)
        return
    x = operands[0]
    given = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    dims = given if isinstance(given, (tuple, list)) else [given]
    dims = range(x.dim()) if None in dims or not dims else [dim % x.dim() for dim in dims]
    axes = trace.axes(x)
    for dim in dims:
        trace.ledger.fix(axes[dim], f"{name} is taken over them")
    for result in tensors_in(out):
        flat = [one for dim, one in enumerate(axes) if dim not in dims]
        full = [None if dim in dims else one for dim, one in enumerate(axes)]
        trace.label(result, full if result.dim() == x.dim() else flat[: result.dim()])


def _glu(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    axes = list(trace.axes(args[0]))
    if (labels := axes[dim]) is not None:
        axes[dim], other = np.split(labels, 2)
        trace.ledger.join(axes[dim], other)
    trace.label(out, axes)


def _linear(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    path = trace.path_of(weight)
    if path is None:
        trace.unknown("linear, by a weight that is computed", (args, kwargs))
        return
    trace.reads(path, 1, trace.axes(x)[-1])
    made = trace.makes(path, 0, out.shape[-1], path.rpartition(".")[0])
    if (name := trace.path_of(bias)) is not None:
        trace.ledger.use(name, 0, made, "through")
    trace.ledger.works(path, out.numel() / out.shape[-1] / trace.batch)
    trace.label(out, [*trace.axes(x)[:-1], made])
