"""An ONNX model on integers: QuantizeLinear and DequantizeLinear around exact rewrites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_compress.conversion.activation_grids import (
    calibrate_weighted_nodes,
    find_float_layers,
    round_weighted_biases,
)
from lightning_compress.conversion.axes import Axes
from lightning_compress.conversion.conv_rewrites import (
    rewrite_linear_as_conv,
    rewrite_narrow,
    rewrite_transposed,
)
from lightning_compress.conversion.dynamic import mark_dynamic, multiply_dynamically
from lightning_compress.conversion.integer_weights import CodebookWeight, put_on_grids, weight_grids
from lightning_compress.conversion.nodes import (
    WeightedNode,
    find_weighted_nodes,
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
from lightning_compress.conversion.session import ExecutedOps
from lightning_compress.conversion.sums import round_sums
from lightning_compress.conversion.upsampled_conv import let_sums_fit, rewrite_enlarged
from lightning_compress.conversion.versions import RuntimeTarget
from lightning_compress.conversion.weight_storage import finished_models, seen_inputs
from lightning_compress.grids import AffineGrid
from lightning_compress.quantization.bias_rounding import round_biases_in
from lightning_compress.state import ActivationGrids, compression_state

__all__ = ["RUNTIMES", "Int8Model", "int8_model"]

OLDEST = 18  # that the exporter makes by itself
RUNTIMES = ("onnxruntime", "openvino")
FUSED = ("Elu", "HardSigmoid", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus")
FUSED += ("Softsign", "Tanh", "ThresholdedRelu")
NO_GRID = "its input has no grid: weights alone are integers (give calibration inputs)"

Calibration = Iterable[Tensor | tuple[Tensor, ...]]


@dataclass
class Int8Model:
    """Int8 model to be written, with the reference that it must agree with.

    Args:
        models: the `onnx_ir` model, and a more careful one if there is one.
        plain: the module with its weights and activations on their grids.
        steps: the step of each output; None where nothing behind it is rounded.
        weights: parameter name -> what grid it is stored on.
        reasons: layer, parameter or operator -> why it stays float.
        rounds: whether any activation is rounded.
        products: how many products are to multiply integers.
        parameters: the weights of these, and the layers that read them.
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
    parameters: dict[str, str] = field(default_factory=dict)
    roundings: int = 0
    coarsest: int = 1
    axes: Axes | None = None
    warning: str = ""

    def explain(self, executed: ExecutedOps) -> None:
        """Add a reason for each product that was to multiply integers and runs as float."""
        weights = [
            name
            for name in self.parameters
            if any(one == name or one.startswith(f"{name}.") for one in executed.float_weights)
        ]
        found = (
            f"{len(weights)} of {self.products} products on grids run as float in ONNX Runtime, "
            "which fuses this one with no grid behind it: no grid reaches what it gives (give "
            "calibration inputs), or one that does not rest at 0 stands behind a ReLU"
        )
        for name in weights:
            self.reasons.setdefault(self.parameters[name], found)


def int8_model(
    module: nn.Module,
    plain: nn.Module,
    inputs: tuple[Tensor, ...],
    axes: Axes,
    *,
    target: RuntimeTarget,
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
    round_biases_in(plain)
    opset = max(target.opset or OLDEST, OLDEST)  # an older one would lose whose node is whose
    program, axes = onnx_program(plain, inputs, opset, axes, optimize=False)
    model = program.model
    name_modules_once(model.graph, plain)
    weighted_nodes = find_weighted_nodes(model.graph, plain, stored)
    find_float_layers(plain, weighted_nodes)
    if calibration is not None:
        let_sums_fit(module, plain, weighted_nodes, stored, grids)
        calibrate_weighted_nodes(model.graph, plain, weighted_nodes, calibration, percentile)
        round_weighted_biases(plain, weighted_nodes)
    result = Int8Model([model], plain, reasons=left, axes=axes)
    result.weights = {name: weight.source for name, weight in stored.items()}
    points = _give_grids(result, weighted_nodes)
    for_onnxruntime = runtime == RUNTIMES[0]
    _rewrite(result, weighted_nodes, points, for_onnxruntime=for_onnxruntime)
    result.rounds = bool(points) or any(
        weighted.input_grid or weighted.output_grid or weighted.dynamic
        for weighted in weighted_nodes
    )
    result.steps = [_step_behind(value) for value in model.graph.outputs]
    reading = [
        weighted.path for weighted in weighted_nodes if weighted.whole and not weighted.dynamic
    ]
    result.products = sum(weighted.whole for weighted in weighted_nodes)
    result.parameters = {one.parameter: one.path for one in weighted_nodes if one.whole}
    result.roundings = _count_roundings(weighted_nodes, points)
    bits = [
        weighted.input_grid.bits for weighted in weighted_nodes if weighted.input_grid is not None
    ]
    result.coarsest = 2 ** (8 - min(bits, default=8))
    seen = seen_inputs(plain, reading, shown)
    result.models, reasons = finished_models(
        model,
        [weighted for weighted in weighted_nodes if not weighted.dynamic],
        stored,
        seen,
        target,
        channels_last=for_onnxruntime,
    )
    result.reasons = reasons | result.reasons
    result.warning = _warning(result, weighted_nodes, calibrated=calibration is not None)
    return result


def _count_roundings(weighted_nodes: list[WeightedNode], points: dict[Any, AffineGrid]) -> int:
    """Values that are rounded; those that several products read on one grid count once."""
    read = {
        (weighted.path if weighted.whole else id(weighted), grid_key(weighted.input_grid))
        for weighted in weighted_nodes
        if weighted.input_grid is not None
    }
    dynamic = sum(weighted.dynamic for weighted in weighted_nodes)
    return (
        dynamic
        + len(read)
        + len(points)
        + sum(weighted.output_grid is not None for weighted in weighted_nodes)
    )


def _warning(result: Int8Model, weighted_nodes: list[WeightedNode], *, calibrated: bool) -> str:
    """How many products run as floats, where activations are rounded and not all need to."""
    floats = [weighted for weighted in weighted_nodes if not weighted.whole]
    why_float = {weighted.path: result.reasons.get(weighted.path, "") for weighted in floats}
    free = [
        weighted
        for weighted in floats
        if not weighted.why_float and not isinstance(weighted.weight, CodebookWeight)
    ]
    if not result.rounds or not free:
        return ""
    first = free[0].path
    hint = ""
    if not calibrated and any("calibration" in why for why in why_float.values()):
        hint = "; calibration= gives those their grids that lack one"
    return (
        f"{len(floats)} of {len(weighted_nodes)} products run as float, such as "
        f"{first or 'the module'}: "
        f"{why_float[first]}{hint} (all reasons: OnnxInfo.reasons)"
    )


def _give_grids(result: Int8Model, weighted_nodes: list[WeightedNode]) -> dict[Any, AffineGrid]:
    activations = compression_state(result.plain).activations
    for weighted in weighted_nodes:
        found = activations.get(weighted.path, ActivationGrids())
        weighted.input_grid, weighted.output_grid = found.input, found.output
    points, missing = output_points(result.models[0].graph, activations, weighted_nodes)
    result.reasons.update(missing)
    return points


def _rewrite(
    result: Int8Model,
    weighted_nodes: list[WeightedNode],
    points: dict[Any, AffineGrid],
    *,
    for_onnxruntime: bool,
) -> None:
    graph = result.models[0].graph
    for weighted in weighted_nodes:
        why = mark_dynamic(graph, result.plain, weighted)
        weighted.rounded = is_rounded(weighted, weighted_nodes, points)
        weighted.whole = weighted.dynamic or _can_run(result, weighted)
        if why is not None:
            result.reasons[weighted.path] = why
    for weighted in weighted_nodes:
        if weighted.whole and weighted.node.op_type == "ConvTranspose":
            obstacle = rewrite_transposed(graph, weighted)
            if obstacle is not None:
                weighted.whole, result.reasons[weighted.path] = False, obstacle
        elif (
            weighted.whole
            and not weighted.dynamic
            and not rewrite_enlarged(graph, weighted)
            and for_onnxruntime
        ):
            rewrite_narrow(graph, weighted)
    for weighted in weighted_nodes:
        _fold(graph, weighted, points)
        if weighted.whole and weighted.rounded and for_onnxruntime and not weighted.dynamic:
            _widen(graph, weighted, points)
    for weighted in weighted_nodes:
        lift_elementwise(graph, weighted, points)
    _round(graph, weighted_nodes, points)
    round_sums(graph)
    graph.sort()


def _fold(graph: Any, weighted: WeightedNode, points: dict[Any, AffineGrid]) -> None:
    """Fold the norm behind a product; where its output is rounded, the product's is now."""
    norm = norm_behind(weighted)
    old = None if norm is None else norm[0].outputs[0]
    _hand_on(points, old, fold_batch_norm(graph, weighted))


def _widen(graph: Any, weighted: WeightedNode, points: dict[Any, AffineGrid]) -> None:
    old = weighted.output
    _hand_on(points, old, rewrite_linear_as_conv(graph, weighted))


def _hand_on(points: dict[Any, AffineGrid], old: Any, new: Any) -> None:
    """Round the value that stands for another one now, if there is one, as that was to be."""
    if new is not None and old in points:
        points[new] = points.pop(old)


def _round(graph: Any, weighted_nodes: list[WeightedNode], points: dict[Any, AffineGrid]) -> None:
    for weighted in weighted_nodes:
        if weighted.output_grid is not None:
            round_output(graph, weighted.output, weighted.output_grid)
    for value, grid in points.items():
        round_output(graph, value, grid)
    round_inputs(graph, weighted_nodes)
    for weighted in weighted_nodes:
        if weighted.dynamic:
            multiply_dynamically(graph, weighted)
        if isinstance(weighted.weight, CodebookWeight) and weighted.input_grid is not None:
            set_apart(graph, weighted.node.outputs[0])


def _can_run(result: Int8Model, weighted: WeightedNode) -> bool:
    reason = None
    if isinstance(weighted.weight, CodebookWeight):
        reason = "its weights are centres of a codebook, not multiples of a step"
    elif weighted.input_grid is None:
        reason = weighted.why_float or NO_GRID
    elif not weighted.rounded and not _gives_floats(weighted):
        reason = "its output is not rounded before it is used (give calibration inputs)"
    if reason is not None:
        result.reasons[weighted.path] = reason
    return reason is None


def _gives_floats(weighted: WeightedNode) -> bool:
    """Whether there are int8 kernels whose output is float.

    ONNX Runtime fuses a Gemm with an activation behind it before it sees the integers.
    """
    following = only_use(weighted.output)
    fused = following is not None and following.op_type in FUSED
    return weighted.node.op_type == "MatMul" or (weighted.node.op_type == "Gemm" and not fused)


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
