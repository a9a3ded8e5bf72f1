"""An ONNX model on whole numbers: QuantizeLinear and DequantizeLinear around exact rewrites."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_compress.conversion.calibration import calibrate
from lightning_compress.conversion.exporter import onnx_program
from lightning_compress.conversion.folding import fold_batch_norm, lift_elementwise, norm_behind
from lightning_compress.conversion.integers import CodebookWeight, IntegerWeight, StoredWeight
from lightning_compress.conversion.quantizable import put_on_grids, weight_grids
from lightning_compress.conversion.rounding import (
    is_rounded,
    output_points,
    round_inputs,
    round_output,
)
from lightning_compress.conversion.runtime import FOLD_WEIGHTS
from lightning_compress.conversion.saturation import is_cut_off, seen_inputs
from lightning_compress.conversion.sites import Site, attribute, find_sites, is_move, modules_of
from lightning_compress.conversion.storing import place_bias, place_weight, rewrite_storage
from lightning_compress.conversion.transposed import rewrite_transposed
from lightning_compress.errors import require
from lightning_compress.quantization.quantizers import AffineGrid
from lightning_compress.state import ActivationGrids, compression_state

__all__ = ["Int8Model", "int8_model"]

OPSET = 21  # the first with 4-bit whole numbers

Calibration = Iterable[Tensor | tuple[Tensor, ...]]


@dataclass
class Int8Model:
    """What is to be written, and what it must agree with.

    Args:
        model: the `onnx_ir` model.
        plain: the module with its weights and activations on their grids.
        steps: the step of each output; None where nothing behind it is rounded.
        weights: parameter name -> what grid it is stored on.
        reasons: layer, parameter or operator -> why it stays float.
        rounds: whether any activation is rounded.
        products: how many products multiply whole numbers.
    """

    model: Any
    plain: nn.Module
    steps: list[float | None] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    rounds: bool = False
    products: int = 0


def int8_model(
    module: nn.Module,
    plain: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    opset: int | None,
    calibration: Calibration | None,
    percentile: float,
    shown: Sequence[tuple[Tensor, ...]],
) -> Int8Model:
    """Build the model of a plain copy; the arguments are those of `export_onnx`.

    `shown` are the inputs on which sums may not be cut off, see `saturation`.
    """
    grids = weight_grids(module, plain)
    stored, left = put_on_grids(plain, grids, everything=not grids or calibration is not None)
    model = onnx_program(plain, inputs, opset or OPSET, optimize=False).model
    sites = find_sites(model.graph, stored)
    if calibration is not None:
        _calibrate(model.graph, plain, sites, calibration, percentile)
    result = Int8Model(model, plain, reasons=left)
    result.weights = {name: weight.source for name, weight in stored.items()}
    points = _give_grids(result, sites)
    result.rounds = bool(points) or any(site.input_grid or site.output_grid for site in sites)
    _rewrite(result, sites, points)
    reading = {site.path for site in sites if site.whole}
    _store(result, sites, stored, seen_inputs(plain, reading, shown))
    return result


def _give_grids(result: Int8Model, sites: list[Site]) -> dict[Any, AffineGrid]:
    activations = compression_state(result.plain).activations
    for site in sites:
        found = activations.get(site.path, ActivationGrids())
        site.input_grid, site.output_grid = found.input, found.output
    points, missing = output_points(result.model.graph, activations, sites)
    result.reasons.update(missing)
    return points


def _calibrate(
    graph: Any, plain: nn.Module, sites: list[Site], calibration: Calibration, percentile: float
) -> None:
    """Find grids for what products read, and for what they give where nothing rounds it later."""
    known = compression_state(plain).activations
    for site in sites:
        found = known.get(site.path, ActivationGrids())
        site.input_grid, site.output_grid = found.input, found.output
    points, _ = output_points(graph, known, sites)
    planned = _with_planned_inputs(sites)
    places: dict[str, tuple[bool, bool]] = {}
    for site, plan in zip(sites, planned, strict=True):
        gives = not is_rounded(plan, planned, points, leaky=False)
        norm = norm_behind(site)
        places[site.path] = (site.input_grid is None, gives and norm is None)
        if gives and norm is not None:
            places[modules_of(norm[0])[-1]] = (False, True)
    calibrate(plain, places, calibration, percentile=percentile)


def _with_planned_inputs(sites: list[Site]) -> list[Site]:
    """Copies that have an input grid each; a missing one is equal for all readers of a value."""
    copies = [copy.copy(site) for site in sites]
    values = list(dict.fromkeys(site.node.inputs[0] for site in sites))
    for one in copies:
        if one.input_grid is None:
            number = torch.tensor([1.0 + values.index(one.node.inputs[0])])
            one.input_grid = AffineGrid(number, torch.tensor([0]), 8, False, None)
    return copies


def _rewrite(result: Int8Model, sites: list[Site], points: dict[Any, AffineGrid]) -> None:
    graph = result.model.graph
    for site in sites:
        site.whole = _can_run(result, site, is_rounded(site, sites, points))
    for site in sites:
        if site.whole and site.node.op_type == "ConvTranspose":
            obstacle = rewrite_transposed(graph, site)
            if obstacle is not None:
                site.whole, result.reasons[site.path] = False, obstacle
    for site in sites:
        norm = norm_behind(site)
        old = None if norm is None else norm[0].outputs[0]
        new = fold_batch_norm(graph, site)
        if new is not None and old in points:
            points[new] = points.pop(old)
    for site in sites:
        lift_elementwise(graph, site, points)
    for site in sites:
        if site.output_grid is not None:
            round_output(graph, site.output, site.output_grid)
    for value, grid in points.items():
        round_output(graph, value, grid)
    round_inputs(graph, sites)
    graph.sort()


def _can_run(result: Int8Model, site: Site, rounded: bool) -> bool:
    reason = None
    if isinstance(site.weight, CodebookWeight):
        reason = "its weights are centres of a codebook, not multiples of a step"
    elif site.input_grid is None:
        reason = "its input has no grid: weights alone are whole numbers (give calibration inputs)"
    elif not rounded and site.node.op_type not in ("Gemm", "MatMul"):
        reason = "its output is not rounded before it is used (give calibration inputs)"
    if reason is not None:
        result.reasons[site.path] = reason
    return reason is None


def _store(
    result: Int8Model,
    sites: list[Site],
    stored: Mapping[str, StoredWeight],
    seen: Mapping[str, NDArray],
) -> None:
    graph = result.model.graph
    result.steps = [_step_behind(value) for value in graph.outputs]
    placed: dict[str, StoredWeight] = {}
    whole: dict[str, bool] = {}
    for number, site in enumerate(sites):
        name = site.parameter if site.parameter not in placed else f"{site.parameter}.{number}"
        placed[name] = site.weight
        site.node.replace_input_with(1, place_weight(graph, name, site.weight))
        place_bias(graph, site)
        if site.whole and isinstance(site.weight, IntegerWeight):
            whole[name] = is_cut_off(site.weight, site.node.op_type, seen, site.path)
    for name, weight in stored.items():
        value = graph.initializers.get(name)
        used = [] if value is None else [use.node for use in value.uses() if _is_alive(use.node)]
        if value is None or not used:
            continue
        key = name if name not in placed else f"{name}.shared"
        placed[key] = weight
        value.replace_all_uses_with(place_weight(graph, key, weight))
        result.reasons.setdefault(name.rpartition(".")[0], _why_alone(used))
    _finish(result, placed, whole)


def _finish(
    result: Int8Model, placed: Mapping[str, StoredWeight], whole: Mapping[str, bool]
) -> None:
    optimizer = require("onnxscript.optimizer", extra="onnx")
    common = require("onnx_ir.passes.common", extra="onnx")
    graph = result.model.graph
    optimizer.optimize(result.model)
    folded = set(placed) - set(whole)
    result.products = len(whole)
    rewrite_storage(graph, placed, whole=whole)
    graph.sort()
    for cleaner in (common.RemoveUnusedNodesPass(), common.ClearMetadataAndDocStringPass()):
        cleaner(result.model)
    _drop_notes(graph)
    if folded and not whole:
        result.model.metadata_props[FOLD_WEIGHTS] = "1"


def _drop_notes(graph: Any) -> None:
    """Names of nodes and shapes of values in between: a tenth of a small model's file."""
    kept = set(graph.outputs)
    for node in graph:
        node.name = None
        for value in node.outputs:
            if value not in kept:
                value.shape = value.type = None


def _is_alive(node: Any) -> bool:
    """Whether a node needs the weight's numbers: not for a shape, nor to turn them for nothing."""
    if node.op_type == "Transpose":
        return any(list(out.uses()) for out in node.outputs)
    return node.op_type != "Shape"


def _why_alone(nodes: list[Any]) -> str:
    if any(node.op_type == "Gather" for node in nodes):
        return "a lookup does not multiply: its weights alone are whole numbers"
    scopes = {part for node in nodes for part in modules_of(node)}
    if any(
        node.op_type in ("Slice", "Unsqueeze", "Concat", "GRU", "LSTM", "RNN") for node in nodes
    ):
        return "recurrent layers have no int8 kernel: their weights alone are whole numbers"
    return f"no product of a layer in {sorted(scopes)}: its weights alone are whole numbers"


def _step_behind(value: Any) -> float | None:
    """The step of the rounding that an output comes from, through activations and moves."""
    node = value.producer()
    while node is not None and (is_move(node) or node.op_type in ("Tanh", "Sigmoid", "Relu")):
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return float(node.inputs[1].const_value.numpy())
