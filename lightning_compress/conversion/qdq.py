"""QuantizeLinear and DequantizeLinear pairs on the activations of an exported graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.conversion.integer_weights import IntegerWeight
from lightning_compress.conversion.nodes import (
    SHUFFLE,
    WeightedNode,
    attribute,
    constant,
    is_move,
    modules_of,
    only_use,
    readers,
)
from lightning_compress.errors import require
from lightning_compress.grids import AffineGrid
from lightning_compress.state import ActivationGrids

__all__ = [
    "fold_batch_norm",
    "grid_key",
    "initializer",
    "is_rounded",
    "lift_elementwise",
    "norm_behind",
    "norm_factors",
    "output_points",
    "round_inputs",
    "round_output",
    "set_apart",
]
ELEMENTWISE = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh")
Uses = list[tuple[Any, int]]


def norm_behind(weighted: WeightedNode) -> tuple[Any, int] | None:
    """The BatchNormalization that alone reads a product, and how many outputs share a channel.

    Between them may stand the steps that a rewritten transposed convolution ends with, or a
    reshape of (N, channels * size) to (N, channels, ...): then `size` weights share a channel.
    """
    if weighted.output_grid is not None:
        return None
    value = weighted.output
    node = only_use(value)
    while is_move(node) and (
        node.op_type in ("DepthToSpace", "Slice", "Reshape") or SHUFFLE in node.metadata_props
    ):
        value = node.outputs[0]
        node = only_use(value)
    if node is None or node.op_type != "BatchNormalization":
        return None
    gamma, outputs = constant(node.inputs[1]), weighted.weight.values.shape[weighted.channel_axis]
    if weighted.node.op_type == "ConvTranspose":
        outputs *= attribute(weighted.node, "group", 1)
    if gamma is None or outputs % gamma.size:
        return None
    if weighted.node.op_type == "MatMul" and value is not weighted.output:
        return None
    return node, outputs // gamma.size


def fold_batch_norm(graph: Any, weighted: WeightedNode) -> Any:
    """Fold the BatchNormalization behind a product into its steps and bias.

    `gamma / sigma` multiplies the steps of a channel; where gamma is negative the integers
    change their sign. Returns the value that now holds what the norm gave, None without a norm.
    """
    found = norm_behind(weighted)
    if found is None or not isinstance(weighted.weight, IntegerWeight):
        return None
    if weighted.node.op_type == "ConvTranspose" and attribute(weighted.node, "group", 1) > 1:
        return None  # its steps run along the channels of a group, a norm's factors along all
    norm, repeats = found
    factor, shift = norm_factors(norm)
    spread = np.tile if _offsets_first(weighted) else np.repeat
    factor, shift = spread(factor, repeats), spread(shift, repeats)
    shape = [1] * weighted.weight.symbols.ndim
    shape[weighted.channel_axis] = -1
    weighted.weight = weighted.weight.scaled(factor.astype(np.float32).reshape(shape))
    bias = 0.0 if weighted.bias is None else weighted.bias
    weighted.bias = (bias * factor + shift).astype(np.float32)
    old, new = norm.outputs[0], norm.inputs[0]
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    return new


def norm_factors(norm: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Factor and offset of each channel of a BatchNormalization."""
    gamma, beta, mean, variance = (_numbers(value) for value in norm.inputs[1:5])
    factor = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    return factor, beta - mean * factor


def _offsets_first(weighted: WeightedNode) -> bool:
    """Whether a rewritten transposed convolution's channels are `(i, j, out)`."""
    node = only_use(weighted.output)
    if node is None:
        return False
    shuffle = attribute(node, "mode", "DCR") if node.op_type == "DepthToSpace" else None
    return node.metadata_props.get(SHUFFLE, shuffle) == "DCR"


def _numbers(value: Any) -> NDArray[np.float64]:
    found = constant(value)
    assert found is not None
    return found.astype(np.float64)


def lift_elementwise(graph: Any, weighted: WeightedNode, rounded: Container[Any]) -> None:
    """Bring an activation right behind its product, before reshapes and the like.

    Runtimes fuse a product, its activation and its rounding only where they stand side by side.
    Values that are `rounded` before their activation stay where they are.
    """
    first = last = only_use(weighted.output)
    if not _reorders(first) or weighted.output_grid is not None:
        return
    while _reorders(following := only_use(last.outputs[0])):
        last = following
    if last.outputs[0] in rounded or following is None:
        return
    if following.op_type in ELEMENTWISE:
        _swap(graph, weighted.output, first, last, following)


def _reorders(node: Any) -> bool:
    return is_move(node) and node.op_type not in ("MaxPool", "Resize")


def _swap(graph: Any, value: Any, first: Any, last: Any, activation: Any) -> None:
    """`activation(last(...first(value)))` becomes `last(...first(activation(value)))`."""
    moved, result = last.outputs[0], activation.outputs[0]
    graph.remove(activation)
    result.replace_all_uses_with(moved, replace_graph_outputs=True)
    activation.replace_input_with(0, value)
    graph.insert_before(first, activation)
    first.replace_input_with(0, result)
    moved.name, result.name = result.name, moved.name
    moved.type = result.type
    result.shape = value.shape


def initializer(graph: Any, name: str, array: np.ndarray) -> Any:
    """A new named constant of the graph; an existing one of equal numbers is used again.

    Where the numbers differ, as with the biases of a layer that two norms follow, so does the name.
    """
    while name in graph.initializers:
        known = graph.initializers[name].const_value.numpy()
        if known.dtype == array.dtype and np.array_equal(known, array):
            return graph.initializers[name]
        name = f"{name}_"
    ir = require("onnx_ir", extra="onnx")
    tensor = ir.tensor(array, name=name)
    value = ir.val(name, const_value=tensor, dtype=tensor.dtype, shape=tensor.shape)
    graph.register_initializer(value)
    return value


def grid_key(grid: AffineGrid) -> tuple[float, int, int]:
    """Equal for grids of equal numbers."""
    return float(grid.scale.reshape(-1)[0]), int(grid.zero_point.reshape(-1)[0]), grid.bits


def is_rounded(
    weighted: WeightedNode, weighted_nodes: Sequence[WeightedNode], points: Mapping[Any, AffineGrid]
) -> bool:
    """Whether the output of a product is quantized before anything but moves and a ReLU reads it.

    A LeakyReLU in between needs a rounding of its own in front: int8 kernels have no other way,
    and a rounding that the module does not have would not be the module's result.

    Args:
        weighted: the product.
        weighted_nodes: all products; one that reads the value rounds it first, if it has an
            input grid.
        points: values that are rounded by themselves.
    """
    norm = norm_behind(weighted)
    value = weighted.output if norm is None else norm[0].outputs[0]
    grids = {one.node: one.input_grid for one in weighted_nodes}
    grid = weighted.output_grid
    while grid is None:
        grid = points.get(value) or _common_grid(grids, readers(value), value.is_graph_output())
        node = only_use(value)
        if grid is not None or node is None or not (is_move(node) or node.op_type == "Relu"):
            break
        value = node.outputs[0]
    return grid is not None


def _common_grid(rounded: Mapping[Any, Any], uses: Sequence[Any], is_output: bool) -> Any:
    """The grid on which all readers round a value; None when they do not agree or do not round."""
    found = [rounded.get(use.node) if use.idx == 0 else None for use in uses]
    grids = [grid for grid in found if grid is not None]
    if is_output or not grids or len(grids) < len(found):
        return None
    return grids[0] if len({grid_key(grid) for grid in grids}) == 1 else None


def output_points(
    graph: Any, activations: Mapping[str, ActivationGrids], weighted_nodes: Sequence[WeightedNode]
) -> tuple[dict[Any, AffineGrid], dict[str, str]]:
    """Values that modules without a product of their own round, and why others were not found."""
    own, points, missing = {weighted.path for weighted in weighted_nodes}, {}, {}
    for path, grids in activations.items():
        if path in own:
            continue
        inside = [node for node in graph if path in modules_of(node)]
        given = [
            value
            for node in inside
            for value in node.outputs
            if value.is_graph_output() or any(use.node not in inside for use in value.uses())
        ]
        if grids.output is not None:
            points.update(dict.fromkeys(given, grids.output))  # of each call
        if (grids.output is not None and not given) or grids.input is not None:
            missing[path] = "its activation grids belong to no product or output"
    return points, missing


def round_output(graph: Any, value: Any, grid: AffineGrid) -> None:
    """Round a value for all its readers, at the end of the moves behind it."""
    while is_move(node := only_use(value)):
        value = node.outputs[0]
    uses = [(use.node, use.idx) for use in readers(value)]
    _round(graph, value, uses, grid, is_output=value.is_graph_output())


def round_inputs(graph: Any, weighted_nodes: Sequence[WeightedNode]) -> None:
    """Quantize inputs of products, as early as the same rounding serves all readers."""
    groups: dict[tuple[Any, Any], Uses] = defaultdict(list)
    grids: dict[Any, AffineGrid] = {}
    for weighted in weighted_nodes:
        if weighted.input_grid is not None:
            key = grid_key(weighted.input_grid)
            groups[weighted.node.inputs[0], key].append((weighted.node, 0))
            grids[key] = weighted.input_grid
    for (value, key), uses in groups.items():
        _round(graph, value, uses, grids[key])


def _round(
    graph: Any, value: Any, uses: Uses, grid: AffineGrid, *, is_output: bool = False
) -> None:
    """Put rounding between a value and some readers, and again before the moves it came through.

    Rounding twice on one grid is rounding once: runtimes then run the moves between on integers.
    """
    all_read = len(uses) == len(readers(value)) and (is_output or not value.is_graph_output())
    result = _pair(graph, value, grid)
    for node, index in uses:
        node.replace_input_with(index, result)
    if is_output:
        _become_output(graph, value, result)
    node = value.producer()
    while all_read and is_move(node) and len(readers(node.inputs[0])) == 1:
        source = node.inputs[0]
        if source.is_graph_output() or source.producer() is None:
            break
        node.replace_input_with(0, _pair(graph, source, grid))
        node = source.producer()


def set_apart(graph: Any, value: Any) -> None:
    """Put an operator that changes nothing between a float product and its rounding.

    ONNX Runtime would see the product between two roundings and quantize its float weight, of
    which it knows no grid (`WeightBiasQuantization`).
    """
    if value.is_graph_output():
        return
    ir = require("onnx_ir", extra="onnx")
    least = initializer(graph, "least", np.asarray(-np.inf, np.float32))
    node = ir.node("Max", [value, least])
    value.replace_all_uses_with(node.outputs[0])
    node.replace_input_with(0, value)
    graph.insert_after(value.producer(), node)


def _become_output(graph: Any, old: Any, new: Any) -> None:
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new
    new.name, old.name = old.name, None
    new.type, new.shape = old.type, old.shape


def _pair(graph: Any, value: Any, grid: AffineGrid) -> Any:
    """QuantizeLinear to uint8, at most `2^bits - 1`, and back, right behind the value.

    Fewer bits are shifted to the top of the byte, exactly: the steps of sums, and of the biases
    that are rounded to them, become as fine as those of 8 bits.
    """
    ir = require("onnx_ir", extra="onnx")
    step, zero, bits = grid_key(grid)
    down = ir.node("QuantizeLinear", [value, *_scale_and_zero(graph, step, zero)])
    nodes = [down]
    if bits < 8:
        top = initializer(graph, f"top_{bits}", np.asarray(2**bits - 1, np.uint8))
        places = initializer(graph, f"places_{8 - bits}", np.asarray(8 - bits, np.uint8))
        nodes.append(ir.node("Min", [down.outputs[0], top]))
        left = {"direction": "LEFT"}
        nodes.append(ir.node("BitShift", [nodes[-1].outputs[0], places], left))
    finer = 2 ** (8 - bits)
    back = _scale_and_zero(graph, step / finer, zero * finer)
    nodes.append(ir.node("DequantizeLinear", [nodes[-1].outputs[0], *back]))
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    return nodes[-1].outputs[0]


def _scale_and_zero(graph: Any, step: float, zero: int) -> list[Any]:
    return [
        initializer(graph, f"scale_{np.float32(step)!s}", np.asarray(step, np.float32)),
        initializer(graph, f"zero_{zero}", np.asarray(zero, np.uint8)),
    ]
