"""Activation grids that products need before they can multiply integers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.conversion.integer_weights import IntegerWeight
from lightning_compress.conversion.nodes import WeightedNode, is_move, modules_of, only_use, readers
from lightning_compress.conversion.qdq import is_rounded, norm_behind, output_points
from lightning_compress.errors import require
from lightning_compress.grids import AffineGrid
from lightning_compress.quantization.bias_rounding import bias_step, round_bias
from lightning_compress.quantization.fake_quantize import fake_quantized, why_float
from lightning_compress.quantization.ranges import RangeObserver, affine_grid, merge_ranges
from lightning_compress.state import (
    ActivationGrids,
    activation_grids,
    compression_state,
    set_activation_grids,
)

__all__ = [
    "calibrate_layers",
    "calibrate_weighted_nodes",
    "find_float_layers",
    "round_weighted_biases",
]
INNER = "weights only: its forward changes what its product reads, or what that gives"


@torch.no_grad()
def calibrate_layers(
    module: nn.Module,
    places: Mapping[str, tuple[bool, bool]],
    calibration: Iterable[Tensor | tuple[Tensor, ...]],
    *,
    percentile: float = 100.0,
) -> None:
    """Give layers the 8-bit grids of what they read and give over example inputs, in place.

    Grids that a layer has already stay. Jacob et al. 2018, arXiv:1712.05877.

    Args:
        module: in eval mode; grids that it has are in force while it runs.
        places: module path -> whether its input and its output get a grid.
        calibration: inputs, each a tensor or a tuple of the module's positional inputs.
        percentile: share of the values, in percent, that the range holds at either end; 100 is
            the minimum and maximum.

    Raises:
        ValueError: for a percentile outside (50, 100], without an input, for values that are not
            finite, or a layer that no input reached.
    """
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile={percentile!r}: valid are numbers above 50 and up to 100")
    ranges: dict[tuple[str, str], RangeObserver] = {}
    inside = 2 * percentile / 100 - 1  # what lies between the two ends
    observer = "minmax" if percentile == 100 else "percentile"
    handles = []
    for path, (reads, gives) in places.items():
        layer = module.get_submodule(path)
        sides = [side for side, wanted in (("input", reads), ("output", gives)) if wanted]
        for side in sides:
            found = ranges[path, side] = RangeObserver(observer, percentile=inside)
            handles.append(_watch(layer, side, partial(_see, found, f"the {side} of {path!r}")))
    try:
        with fake_quantized(module):
            _run(module, calibration)
    finally:
        for handle in handles:
            handle.remove()
    for (path, side), found in ranges.items():
        merge_ranges([found])
        if found.bounds is None:
            raise ValueError(f"no calibration input reached {path!r}: it never ran")
        grid = affine_grid(found.bounds.float(), bits=8, symmetric=False)
        _give(module.get_submodule(path), side, grid)


def _run(module: nn.Module, calibration: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    count = 0
    for batch in calibration:
        inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        for part in inputs:
            if part.is_floating_point() and not part.isfinite().all():
                raise ValueError(f"calibration input {count} holds values that are NaN or infinite")
        module(*(part.detach().cpu() for part in inputs))
        count += 1
    if count == 0:
        raise ValueError("calibration holds no inputs: give at least one batch")


def _watch(layer: nn.Module, side: str, see: Any) -> Any:
    if side == "input":
        return layer.register_forward_pre_hook(lambda _, inputs: see(inputs[0]))
    return layer.register_forward_hook(lambda _, __, output: see(output))


def _see(found: RangeObserver, place: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{place} is NaN or infinite on the calibration inputs")
    found.observe(values)


def _give(layer: nn.Module, side: str, grid: AffineGrid) -> None:
    known = activation_grids(layer) or ActivationGrids()
    sides = {"input": known.input, "output": known.output, side: grid}
    set_activation_grids(layer, ActivationGrids(**sides))


def find_float_layers(plain: nn.Module, weighted_nodes: list[WeightedNode]) -> None:
    """Say at each weighted why its layer gets no grids, which are those of what the layer reads."""
    reasons: dict[str, str] = {}
    for weighted in weighted_nodes:
        layer = plain.get_submodule(weighted.path)
        why = why_float(layer) or ("" if _is_own(weighted, layer) else INNER)
        reasons[weighted.path] = reasons.get(weighted.path) or why
    for weighted in weighted_nodes:
        weighted.why_float = reasons[weighted.path]


def _is_own(weighted: WeightedNode, layer: nn.Module) -> bool:
    """Whether what a layer reads and gives is what its product reads and gives."""
    if layer.forward.__module__.startswith("torch.nn."):
        return True
    node = weighted.node.inputs[0].producer()
    while _is_inside(node, weighted) and (is_move(node) or node.op_type == "Pad"):
        node = node.inputs[0].producer()
    value = weighted.output
    while _is_inside(following := only_use(value), weighted) and _keeps(following):
        value = following.outputs[0]
    changed = any(_is_inside(use.node, weighted) for use in readers(value))
    return not _is_inside(node, weighted) and not changed


def _is_inside(node: Any, weighted: WeightedNode) -> bool:
    return node is not None and weighted.path in modules_of(node)


def _keeps(node: Any) -> bool:
    """Whether a rounding may as well stand behind a node."""
    return is_move(node) or node.op_type == "Relu"


def calibrate_weighted_nodes(
    graph: Any,
    plain: nn.Module,
    weighted_nodes: list[WeightedNode],
    calibration: Iterable[Tensor | tuple[Tensor, ...]],
    percentile: float,
) -> None:
    """Find grids for what products read, and for what they give where nothing rounds it later."""
    known = compression_state(plain).activations
    for weighted in weighted_nodes:
        found = known.get(weighted.path, ActivationGrids())
        weighted.input_grid, weighted.output_grid = found.input, found.output
    points, _ = output_points(graph, known, weighted_nodes)
    planned = _with_planned_inputs(weighted_nodes)
    places: dict[str, tuple[bool, bool]] = {}
    for weighted, plan in zip(weighted_nodes, planned, strict=True):
        if weighted.why_float:
            continue
        gives = not is_rounded(plan, planned, points)
        norm = norm_behind(weighted)
        # A layer that is called twice gives on a grid where one of its calls needs it.
        _, known_to_give = places.get(weighted.path, (False, False))
        places[weighted.path] = (
            weighted.input_grid is None,
            known_to_give or (gives and norm is None),
        )
        if gives and norm is not None:
            path = modules_of(norm[0])[-1]
            if isinstance(plain.get_submodule(path), nn.modules.batchnorm._NormBase):
                places[path] = (False, True)
    calibrate_layers(plain, places, calibration, percentile=percentile)


def _with_planned_inputs(weighted_nodes: list[WeightedNode]) -> list[WeightedNode]:
    """Copies that have an input grid each; a missing one is equal for all readers of a value."""
    copies = [copy.copy(weighted) for weighted in weighted_nodes]
    values = list(dict.fromkeys(weighted.node.inputs[0] for weighted in weighted_nodes))
    for one in copies:
        if one.input_grid is None and not one.why_float:
            number = torch.tensor([1.0 + values.index(one.node.inputs[0])])
            one.input_grid = AffineGrid(number, torch.tensor([0]), 8, False, None)
    return copies


def round_weighted_biases(plain: nn.Module, weighted_nodes: list[WeightedNode]) -> None:
    """Round the biases of a calibrated module as int8 kernels hold them, and those of its graph.

    Where a BatchNorm behind a layer without a bias takes the change, so do the graph's constants.
    """
    calls = Counter(weighted.path for weighted in weighted_nodes)
    biases = Counter(id(one) for one in _biases(plain))
    for weighted in weighted_nodes:
        layer, found = plain.get_submodule(weighted.path), norm_behind(weighted)
        read = (activation_grids(layer) or ActivationGrids()).input
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            own = biases[id(bias)] == 1 and weighted.bias is not None
        else:
            own = bias is None and weighted.bias is None
        if weighted.why_float or read is None or calls[weighted.path] > 1 or not own:
            continue
        if not isinstance(weighted.weight, IntegerWeight):
            continue
        path = "" if found is None else modules_of(found[0])[-1]
        norm = None if found is None else plain.get_submodule(path)
        if norm is not None and not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        step = bias_step(layer, read, torch.from_numpy(weighted.weight.scale.copy()))
        if step is None or round_bias(layer, norm, step):
            continue
        if isinstance(bias, Tensor):
            weighted.bias = bias.detach().numpy().astype(np.float32)
        elif found is not None and norm is not None:
            mean, moved = found[0].inputs[3], norm.running_mean
            assert isinstance(moved, Tensor)
            ir = require("onnx_ir", extra="onnx")
            mean.const_value = ir.tensor(moved.numpy().copy(), name=mean.name)


def _biases(plain: nn.Module) -> Iterator[Tensor]:
    for layer in plain.modules():
        bias = layer._parameters.get("bias")
        if bias is not None:
            yield bias
