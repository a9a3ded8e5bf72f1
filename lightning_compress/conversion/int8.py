"""An ONNX model on whole numbers: QuantizeLinear and DequantizeLinear around exact rewrites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_compress.conversion.activation_grids import calibrate_sites, find_float_layers
from lightning_compress.conversion.axes import Axes
from lightning_compress.conversion.conv_rewrites import (
    rewrite_narrow,
    rewrite_transposed,
    rewrite_wide,
)
from lightning_compress.conversion.dynamic import mark_dynamic, multiply_dynamically
from lightning_compress.conversion.integer_weights import CodebookWeight, put_on_grids, weight_grids
from lightning_compress.conversion.nodes import (
    Site,
    find_sites,
    is_move,
    name_modules_once,
    only_use,
)
from lightning_compress.conversion.program import onnx_program
from lightning_compress.conversion.qdq import (
    fold_batch_norm,
    grid_key,
    is_rounded,
    lift_elementwise,
    norm_behind,
    norm_factors,
    output_points,
    round_inputs,
    round_output,
    set_apart,
)
from lightning_compress.conversion.upsampled_conv import let_sums_fit, rewrite_enlarged
from lightning_compress.conversion.versions import Target
from lightning_compress.conversion.weight_storage import finished_models, seen_inputs
from lightning_compress.grids import AffineGrid
from lightning_compress.state import ActivationGrids, compression_state

__all__ = ["RUNTIMES", "Int8Model", "int8_model"]

OLDEST = 18  # that the exporter makes by itself
RUNTIMES = ("onnxruntime", "openvino")
FUSED = ("Elu", "HardSigmoid", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus")
FUSED += ("Softsign", "Tanh", "ThresholdedRelu")
NO_GRID = "its input has no grid: weights alone are whole numbers (give calibration inputs)"

Calibration = Iterable[Tensor | tuple[Tensor, ...]]


@dataclass
class Int8Model:
    """What is to be written, and what it must agree with.

    Args:
        models: the `onnx_ir` model, and a more careful one if there is one.
        plain: the module with its weights and activations on their grids.
        steps: the step of each output; None where nothing behind it is rounded.
        weights: parameter name -> what grid it is stored on.
        reasons: layer, parameter or operator -> why it stays float.
        rounds: whether any activation is rounded.
        products: how many products multiply whole numbers.
        roundings: how many values are rounded on the way.
        coarsest: a step of 8 bits goes into one of the coarsest activation this often.
        axes: of the inputs.
        warning: how many products run as floats that need not; empty when none does.
    """

    models: list[Any]
    plain: nn.Module
    steps: list[float | None] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    rounds: bool = False
    products: int = 0
    roundings: int = 0
    coarsest: int = 1
    axes: Axes | None = None
    warning: str = ""


def int8_model(
    module: nn.Module,
    plain: nn.Module,
    inputs: tuple[Tensor, ...],
    axes: Axes,
    *,
    target: Target,
    calibration: Calibration | None,
    percentile: float,
    shown: Sequence[tuple[Tensor, ...]],
    runtime: str = RUNTIMES[0],
) -> Int8Model:
    """Build the model of a plain copy; the arguments are those of `export_onnx`.

    `shown` are the inputs on which sums may not be cut off, see `saturation`.
    """
    grids = weight_grids(module, plain)
    stored, left = put_on_grids(plain, grids, everything=not grids or calibration is not None)
    opset = max(target.opset or OLDEST, OLDEST)  # an older one would lose whose node is whose
    program, axes = onnx_program(plain, inputs, opset, axes, optimize=False)
    model = program.model
    name_modules_once(model.graph, plain)
    sites = find_sites(model.graph, plain, stored)
    find_float_layers(plain, sites)
    if calibration is not None:
        let_sums_fit(module, plain, sites, stored, grids)
        calibrate_sites(model.graph, plain, sites, calibration, percentile)
    result = Int8Model([model], plain, reasons=left, axes=axes)
    result.weights = {name: weight.source for name, weight in stored.items()}
    points = _give_grids(result, sites)
    for_onnxruntime = runtime == RUNTIMES[0]
    _rewrite(result, sites, points, for_onnxruntime=for_onnxruntime)
    result.rounds = bool(points) or any(
        site.input_grid or site.output_grid or site.dynamic for site in sites
    )
    result.steps = [_step_behind(value) for value in model.graph.outputs]
    reading = [site.path for site in sites if site.whole and not site.dynamic]
    result.products = sum(site.whole for site in sites)
    result.roundings = _count_roundings(sites, points)
    bits = [site.input_grid.bits for site in sites if site.input_grid is not None]
    result.coarsest = 2 ** (8 - min(bits, default=8))
    seen = seen_inputs(plain, reading, shown)
    result.models, reasons = finished_models(
        model,
        [site for site in sites if not site.dynamic],
        stored,
        seen,
        target,
        channels_last=for_onnxruntime,
    )
    result.reasons = reasons | result.reasons
    result.warning = _warning(result, sites, calibrated=calibration is not None)
    return result


def _count_roundings(sites: list[Site], points: dict[Any, AffineGrid]) -> int:
    """Values that are rounded; those that several products read on one grid count once."""
    read = {
        (site.path if site.whole else id(site), grid_key(site.input_grid))
        for site in sites
        if site.input_grid is not None
    }
    dynamic = sum(site.dynamic for site in sites)
    return dynamic + len(read) + len(points) + sum(site.output_grid is not None for site in sites)


def _warning(result: Int8Model, sites: list[Site], *, calibrated: bool) -> str:
    """How many products run as floats, where activations are rounded and not all need to."""
    floats = [site for site in sites if not site.whole]
    told = {site.path: result.reasons.get(site.path, "") for site in floats}
    free = [
        site
        for site in floats
        if not site.why_float and not isinstance(site.weight, CodebookWeight)
    ]
    if not result.rounds or not free:
        return ""
    first = free[0].path
    hint = ""
    if not calibrated and any("calibration" in why for why in told.values()):
        hint = "; calibration= gives those their grids that lack one"
    return (
        f"{len(floats)} of {len(sites)} products run as float, such as {first or 'the module'}: "
        f"{told[first]}{hint} (all reasons: OnnxInfo.reasons)"
    )


def _give_grids(result: Int8Model, sites: list[Site]) -> dict[Any, AffineGrid]:
    activations = compression_state(result.plain).activations
    for site in sites:
        found = activations.get(site.path, ActivationGrids())
        site.input_grid, site.output_grid = found.input, found.output
    points, missing = output_points(result.models[0].graph, activations, sites)
    result.reasons.update(missing)
    return points


def _rewrite(
    result: Int8Model, sites: list[Site], points: dict[Any, AffineGrid], *, for_onnxruntime: bool
) -> None:
    graph = result.models[0].graph
    for site in sites:
        why = mark_dynamic(graph, result.plain, site)
        site.whole = site.dynamic or _can_run(result, site, is_rounded(site, sites, points))
        if why is not None:
            result.reasons[site.path] = why
    for site in sites:
        if site.whole and site.node.op_type == "ConvTranspose":
            obstacle = rewrite_transposed(graph, site)
            if obstacle is not None:
                site.whole, result.reasons[site.path] = False, obstacle
        elif (
            site.whole
            and not site.dynamic
            and not rewrite_enlarged(graph, site)
            and for_onnxruntime
        ):
            rewrite_narrow(graph, site)
    for site in sites:
        _fold(graph, site, points)
        if site.whole and for_onnxruntime and not site.dynamic:
            _widen(graph, site, points)
    for site in sites:
        lift_elementwise(graph, site, points)
    _round(graph, sites, points)
    graph.sort()


def _fold(graph: Any, site: Site, points: dict[Any, AffineGrid]) -> None:
    """Fold the norm behind a product; where its output is rounded, the product's is now."""
    norm = norm_behind(site)
    old = None if norm is None else norm[0].outputs[0]
    _hand_on(points, old, fold_batch_norm(graph, site))


def _widen(graph: Any, site: Site, points: dict[Any, AffineGrid]) -> None:
    old = site.output
    _hand_on(points, old, rewrite_wide(graph, site))


def _hand_on(points: dict[Any, AffineGrid], old: Any, new: Any) -> None:
    """Round the value that stands for another one now, if there is one, as that was to be."""
    if new is not None and old in points:
        points[new] = points.pop(old)


def _round(graph: Any, sites: list[Site], points: dict[Any, AffineGrid]) -> None:
    for site in sites:
        if site.output_grid is not None:
            round_output(graph, site.output, site.output_grid)
    for value, grid in points.items():
        round_output(graph, value, grid)
    round_inputs(graph, sites)
    for site in sites:
        if site.dynamic:
            multiply_dynamically(graph, site)
        if isinstance(site.weight, CodebookWeight) and site.input_grid is not None:
            set_apart(graph, site.node.outputs[0])


def _can_run(result: Int8Model, site: Site, rounded: bool) -> bool:
    reason = None
    if isinstance(site.weight, CodebookWeight):
        reason = "its weights are centres of a codebook, not multiples of a step"
    elif site.input_grid is None:
        reason = site.why_float or NO_GRID
    elif not rounded and not _gives_floats(site):
        reason = "its output is not rounded before it is used (give calibration inputs)"
    if reason is not None:
        result.reasons[site.path] = reason
    return reason is None


def _gives_floats(site: Site) -> bool:
    """Whether there are int8 kernels whose output is float.

    ONNX Runtime fuses a Gemm with an activation behind it before it sees the whole numbers.
    """
    following = only_use(site.output)
    fused = following is not None and following.op_type in FUSED
    return site.node.op_type == "MatMul" or (site.node.op_type == "Gemm" and not fused)


def _step_behind(value: Any) -> float | None:
    """The step of the rounding that an output comes from, through activations, moves and norms."""
    node, slope = value.producer(), 1.0
    passed = ("Tanh", "Sigmoid", "Relu", "BatchNormalization")
    while node is not None and (is_move(node) or node.op_type in passed):
        if node.op_type == "BatchNormalization":
            slope *= float(np.abs(norm_factors(node)[0]).max())
        node = node.inputs[0].producer()
    while node is not None and node.op_type in ("DequantizeLinear", "BitShift", "Min"):
        node = node.inputs[0].producer()
    if node is None or node.op_type != "QuantizeLinear":
        return None
    return slope * float(node.inputs[1].const_value.numpy())
