"""Storage of weights and biases as initializers of an ONNX file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_compress.conversion.conv_rewrites import channels_last_moves
from lightning_compress.conversion.integer_weights import (
    INT4,
    CodebookWeight,
    IntegerWeight,
    StoredWeight,
    Summed,
)
from lightning_compress.conversion.nodes import WeightedNode, modules_of
from lightning_compress.conversion.qdq import grid_key, initializer
from lightning_compress.conversion.session import FOLD_WEIGHTS
from lightning_compress.conversion.versions import RuntimeTarget
from lightning_compress.errors import require
from lightning_compress.grids import AffineGrid
from lightning_compress.quantization.fake_quantize import fake_quantized
from lightning_compress.state import activation_grids

__all__ = [
    "finished_models",
    "is_cut_off",
    "place_bias",
    "place_weight",
    "rewrite_storage",
    "seen_inputs",
]
LARGEST = 32_767
CAUTION = 0.9  # inputs to come may be a little larger than those seen
KEPT_ROWS = 8192
MARK = "lightning_compress.weight"
LARGEST_INT32 = 2**31 - 1
LONG = 1024
FEW = 24  # numbers that take no more room than an operator that repeats one
HIGH = 64
RECURRENT = ("Slice", "Unsqueeze", "Concat", "GRU", "LSTM", "RNN")


@torch.no_grad()
def seen_inputs(
    module: nn.Module, paths: Iterable[str], batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, NDArray[np.int32]]:
    """What layers read, as the uint8 of the file: path -> (rows, channels).

    Args:
        module: its layers carry activation grids.
        paths: of layers with an input grid.
        batches: inputs of the module.
    """
    found: dict[str, list[NDArray[np.int32]]] = {path: [] for path in paths}
    with fake_quantized(module):
        handles = [
            module.get_submodule(path).register_forward_pre_hook(partial(_keep, rows))
            for path, rows in found.items()
        ]
        for batch in batches:
            module(*batch)
    for handle in handles:
        handle.remove()
    return {path: np.concatenate(rows) for path, rows in found.items() if rows}


def _keep(rows: list[NDArray[np.int32]], layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    grids = activation_grids(layer)
    assert grids is not None
    assert isinstance(grids.input, AffineGrid)
    scale, zero = (
        float(grids.input.scale.reshape(-1)[0]),
        int(grids.input.zero_point.reshape(-1)[0]),
    )
    values = ((inputs[0] / scale).round().int() + zero) * 2 ** (8 - grids.input.bits)
    linear = isinstance(layer, nn.Linear)
    flat = values.reshape(-1, values.shape[-1]) if linear else values.movedim(1, -1).flatten(0, -2)
    rows.append(flat[:: -(-len(flat) // KEPT_ROWS)].numpy())


def is_cut_off(weight: IntegerWeight, op: str, seen: Mapping[str, Any], path: str) -> bool:
    """Whether the inputs seen come near a cut-off sum.

    Args:
        weight: laid out as its product reads it.
        op: Conv, Gemm or MatMul.
        seen: what `seen_inputs` gave.
        path: of the layer.
    """
    if not weight.may_be_cut_off(op):
        return False
    rows = weight.symbols.T if op == "MatMul" else weight.symbols
    rows = np.moveaxis(rows, 1, -1).reshape(-1, rows.shape[1])
    values = seen.get(path)
    if values is None or values.shape[1] != rows.shape[1] or rows.shape[1] % 2:
        return True  # never seen, or grouped, or neighbours of different taps: be careful
    return any(
        _pair_is_cut_off(values[:, at : at + 2], rows[:, at : at + 2])
        for at in range(0, rows.shape[1], 2)
    )


def _pair_is_cut_off(values: NDArray[np.int32], weights: NDArray[np.int32]) -> bool:
    limit = CAUTION * LARGEST
    # Inputs are never below 0: of a pair with both signs, one may stand alone.
    most = np.maximum(weights.clip(min=0).sum(1), -weights.clip(max=0).sum(1))
    strong = np.unique(weights[most * 255 > limit], axis=0)
    large = np.unique(values[values.sum(1) * 127 > limit], axis=0)
    if not len(strong) or not len(large):
        return False
    sums = large.astype(np.float32) @ strong.T.astype(np.float32)
    return bool(np.abs(sums).max() > limit)


def place_weight(graph: Any, name: str, weight: StoredWeight) -> Any:
    """A DequantizeLinear in front of everything that gives a weight; returns its value.

    The optimizer that runs next never evaluates a DequantizeLinear: the weight stays integers.
    """
    ir = require("onnx_ir", extra="onnx")
    if isinstance(weight, CodebookWeight):
        stored, scale, zero, axis = (
            weight.index.astype(np.uint8),
            np.ones(1, np.float32),
            None,
            None,
        )
    else:
        _, stored, zero = weight.encoded()
        scale, axis = weight.scale, weight.axis
    inputs = [
        initializer(graph, f"{name}.quantized", stored),
        initializer(graph, f"{name}.scale", _vector(scale, axis)),
    ]
    if zero is not None:
        point = np.broadcast_to(zero, scale.shape).astype(stored.dtype)
        inputs.append(initializer(graph, f"{name}.zero_point", _vector(point, axis)))
    attributes = {} if axis is None else {"axis": axis}
    node = ir.node("DequantizeLinear", inputs, attributes, metadata_props={MARK: name})
    node.outputs[0].name = f"{name}.dequantized"
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _vector(values: NDArray, axis: int | None) -> NDArray:
    return values.reshape(()) if axis is None else values.reshape(-1)


def place_bias(graph: Any, weighted: WeightedNode) -> None:
    """Give a product its bias: int32 in steps of input times weight, or as floats."""
    if weighted.bias is None:
        return
    if weighted.node.op_type == "MatMul":
        _add_bias(graph, weighted)
        return
    value = _bias_value(graph, weighted)
    if len(weighted.node.inputs) < 3:
        weighted.node.resize_inputs(3)
    weighted.node.replace_input_with(2, value)


def _bias_value(graph: Any, weighted: WeightedNode) -> Any:
    ir = require("onnx_ir", extra="onnx")
    assert weighted.bias is not None
    name = f"{weighted.path or 'module'}.{weighted.node.op_type}.bias"
    if (
        (weighted.node.op_type == "Gemm" and weighted.rounded)
        or weighted.bias.size >= LONG  # the steps would take as much again: ONNX Runtime finds them
        or not weighted.whole
        or weighted.input_grid is None
        or not isinstance(weighted.weight, IntegerWeight)
    ):
        return initializer(graph, name, weighted.bias.astype(np.float32))
    step, _, bits = grid_key(weighted.input_grid)
    step /= 2 ** (8 - bits)  # see `_pair`
    scale = (np.float32(step) * weighted.weight.scale.reshape(-1)).astype(np.float32)
    scale = np.broadcast_to(scale, weighted.bias.shape).copy()
    whole = np.rint(weighted.bias / scale.astype(np.float64))
    if np.abs(whole).max(initial=0) > LARGEST_INT32:
        return initializer(graph, name, weighted.bias.astype(np.float32))
    inputs = [
        initializer(graph, f"{name}.quantized", whole.astype(np.int32)),
        initializer(graph, f"{name}.scale", scale),
    ]
    node = ir.node("DequantizeLinear", inputs, {"axis": 0})
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _add_bias(graph: Any, weighted: WeightedNode) -> None:
    name = f"{weighted.path or 'module'}.bias.added"
    add = weighted.output.producer()
    assert weighted.bias is not None
    if add.op_type == "Add" and add.inputs[0] is weighted.node.outputs[0]:
        add.replace_input_with(1, initializer(graph, name, weighted.bias.astype(np.float32)))


def repeated(graph: Any, before: Any, name: str, vector: NDArray) -> Any:
    """A long vector whose entries come in runs of equal length, stored once a run.

    A Linear layer that feeds images has one step and bias a pixel, equal within a channel.
    """
    run = _run_length(vector)
    if vector.size < LONG or run == 1:
        return initializer(graph, name, vector)
    ir = require("onnx_ir", extra="onnx")
    short = initializer(graph, f"{name}.runs", vector[::run].reshape(-1, 1).copy())
    shape = initializer(graph, f"{name}.shape", np.asarray([vector.size // run, run], np.int64))
    flat = initializer(graph, "flat", np.asarray([-1], np.int64))
    spread = ir.node("Expand", [short, shape])
    result = ir.node("Reshape", [spread.outputs[0], flat])
    graph.insert_before(before, [spread, result])
    return result.outputs[0]


def _run_length(vector: NDArray) -> int:
    changes = np.flatnonzero(vector[1:] != vector[:-1]) + 1 if vector.ndim else np.arange(0)
    return int(np.gcd.reduce(np.append(changes, vector.size)))


def rewrite_storage(
    graph: Any,
    weights: Mapping[str, StoredWeight],
    *,
    whole: Mapping[str, bool],
    four_bits: bool = True,
) -> None:
    """Give weights the form that runs: the optimizer is through and can evaluate nothing of it.

    Weights of 2 to 4 bits are packed into int4, codebooks looked up. Beside products of whole
    numbers, weights that multiply as floats stand behind casts and products of constants: these
    are evaluated when a session starts, a DequantizeLinear is not.

    Args:
        graph: holds the nodes that `place_weight` made.
        weights: by the name they were placed under.
        whole: those that multiply as integers -> whether as uint8 around 128.
        four_bits: whether there are 4-bit numbers to store in; else a byte holds each.
    """
    for node in list(graph):
        _shorten_bias(graph, node)
        _multiply_bias_steps(graph, node)
        _give_bias_zeros(graph, node)
        name = node.metadata_props.get(MARK)
        if name is None:
            continue
        weight = weights[name]
        if isinstance(weight, CodebookWeight):
            _look_up(graph, node, name, weight, four_bits=four_bits)
            continue
        around_128 = whole.get(name, False)
        if _add_up(graph, node, name, weight, around_128=around_128, four_bits=four_bits):
            continue
        if four_bits:
            _pack(graph, node, name, weight)
        if name in whole:
            _give_zero_point(graph, node, name, weight, around_128=whole[name])
        elif whole and not _is_between_roundings(node):
            _multiply_out(graph, node, name, weight)


def _is_between_roundings(node: Any) -> bool:
    """Whether a weight's product reads rounded numbers.

    ONNX Runtime quantizes the float weight of such a product anew, over its own range
    (`WeightBiasQuantization`), unless the weight comes from a DequantizeLinear.
    """
    for use in node.outputs[0].uses():
        given = use.node.inputs[0].producer()
        if use.idx == 1 and given is not None and given.op_type == "DequantizeLinear":
            return True
    return False


def _shorten_bias(graph: Any, node: Any) -> None:
    if (
        node.op_type in ("Conv", "Gemm")
        and len(node.inputs) > 2
        and node.inputs[2].is_initializer()
    ):
        old = node.inputs[2]
        _drop_input(
            graph, node, 2, repeated(graph, node, f"{old.name}.short", old.const_value.numpy())
        )


def _give_bias_zeros(graph: Any, node: Any) -> None:
    """Zero points of 0 for a bias: without them ONNX Runtime cannot write its own format."""
    whole = node.inputs[0].const_value if node.op_type == "DequantizeLinear" else None
    if whole is None or len(node.inputs) > 2 or whole.dtype.name != "INT32":
        return
    size = whole.shape[0]
    if "axis" not in node.attributes:
        value = initializer(graph, "zero", np.zeros((), np.int32))
    elif size <= FEW:
        value = initializer(graph, f"zeros_{size}", np.zeros(size, np.int32))
    else:
        ir = require("onnx_ir", extra="onnx")
        value = initializer(graph, "zeros_1", np.zeros(1, np.int32))
        shape = initializer(graph, f"shape_{size}", np.asarray([size], np.int64))
        expand = ir.node("Expand", [value, shape])
        graph.insert_before(node, expand)
        value = expand.outputs[0]
    node.resize_inputs(3)
    node.replace_input_with(2, value)


def _multiply_bias_steps(graph: Any, node: Any) -> None:
    """The steps of a long bias as a product of constants, input times weight, in place of them."""
    given = node.inputs[1] if node.op_type == "DequantizeLinear" else None
    if given is None or given.const_value is None or given.const_value.size <= FEW:
        return
    for use in node.outputs[0].uses():
        factors = [one and _steps(one.producer()) for one in use.node.inputs[:2]]
        if use.idx != 2 or len(factors) < 2 or None in factors:
            continue
        values = [one.const_value.numpy() for one in factors]
        if np.array_equal(np.broadcast_to(values[0] * values[1], given.shape), given.const_value):
            ir = require("onnx_ir", extra="onnx")
            product = ir.node("Mul", [factors[1], factors[0]])
            graph.insert_before(node, product)
            _drop_input(graph, node, 1, product.outputs[0])
            if values[1].ndim == 0:
                del node.attributes["axis"]
            return


def _steps(node: Any) -> Any:
    """The constant steps of a DequantizeLinear."""
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[1].const_value is None:
        return None
    return node.inputs[1]


def _give_zero_point(
    graph: Any, node: Any, name: str, weight: IntegerWeight, *, around_128: bool
) -> None:
    """A zero point of the weight's own: ONNX Runtime fails where two weights share one."""
    if len(node.inputs) > 2:
        return
    if around_128:
        stored = initializer(graph, f"{name}.around_128", (weight.symbols + 128).astype(np.uint8))
        _drop_input(graph, node, 0, stored)
    _put_zero_point(graph, node, name, weight, around_128=around_128)


def _put_zero_point(
    graph: Any, node: Any, name: str, weight: IntegerWeight, *, around_128: bool
) -> None:
    kind, point = (np.uint8, 128) if around_128 else (np.int8, 0)
    points = np.full(weight.scale.size, point, kind)
    node.resize_inputs(3)
    value = repeated(graph, node, f"{name}.zero_point", _vector(points, weight.axis))
    node.replace_input_with(2, value)


def _drop_input(graph: Any, node: Any, index: int, new: Any) -> None:
    old = node.inputs[index]
    node.replace_input_with(index, new)
    if old.is_initializer() and not list(old.uses()):
        del graph.initializers[old.name]


def _int4(graph: Any, name: str, array: NDArray, kind: str) -> Any:
    types = require("ml_dtypes", extra="onnx")
    return initializer(graph, name, array.astype(getattr(types, kind)))


def _cast(graph: Any, before: Any, value: Any, kind: str) -> Any:
    ir = require("onnx_ir", extra="onnx")
    node = ir.node("Cast", [value], {"to": int(ir.DataType[kind])})
    graph.insert_before(before, node)
    return node.outputs[0]


def _pack(graph: Any, node: Any, name: str, weight: IntegerWeight) -> None:
    """Store 2 to 4 bits in half a byte, and have them spread over a byte when a session starts."""
    packed = weight.nibbles()
    if packed is None:
        return
    ir = require("onnx_ir", extra="onnx")
    kind, small, zero = packed
    value = _int4(graph, f"{name}.{kind}", small, kind)
    steps = []
    if zero is not None:
        steps.append(("Sub", initializer(graph, f"{name}.{kind}_zero", zero.astype(np.int32))))
    if weight.stretch > 1:
        factor = np.asarray(weight.stretch, np.int32)
        steps.append(("Mul", initializer(graph, f"stretch_{weight.stretch}", factor)))
    if steps:
        value = _cast(graph, node, value, "INT32")
    for op, other in steps:
        step = ir.node(op, [value, other])
        graph.insert_before(node, step)
        value = step.outputs[0]
    _drop_input(graph, node, 0, _cast(graph, node, value, "INT8"))


def _add_up(
    graph: Any,
    node: Any,
    name: str,
    weight: IntegerWeight,
    *,
    around_128: bool,
    four_bits: bool,
) -> bool:
    """Store the fewer numbers that a kernel is made of, and have them added up at session start."""
    small = None
    if weight.summed is not None:
        small = weight.summed.weights(weight.symbols // weight.stretch)
    if small is None or weight.summed is None or len(node.inputs) > 2:
        return False
    ir = require("onnx_ir", extra="onnx")
    if four_bits and INT4[0] <= small.min(initial=0) and small.max(initial=0) <= INT4[1]:
        stored = _int4(graph, f"{name}.int4", small, "int4")
    else:
        stored = initializer(graph, f"{name}.taps", small.astype(np.int8))
    value = _cast(graph, node, stored, "FLOAT")
    value = _sums(graph, node, value, weight.summed, (small.shape[0], small.shape[1]))
    steps = [("Mul", weight.stretch)] if weight.stretch > 1 else []
    for op, number in [*steps, *([("Add", 128)] if around_128 else [])]:
        other = initializer(graph, f"number_{number}", np.asarray(number, np.float32))
        step = ir.node(op, [value, other])
        graph.insert_before(node, step)
        value = step.outputs[0]
    _drop_input(graph, node, 0, _cast(graph, node, value, "UINT8" if around_128 else "INT8"))
    _put_zero_point(graph, node, name, weight, around_128=around_128)
    return True


def _sums(graph: Any, before: Any, value: Any, layout: Summed, size: tuple[int, int]) -> Any:
    """Operators that do as `Summed.expand` to a weight, of `size` (out, in / groups), in floats."""
    ir = require("onnx_ir", extra="onnx")
    matrices = [layout.matrix(0), layout.matrix(1).T.copy()]
    rows, columns = (
        initializer(graph, f"sums_{layout.factor}_{layout.kernel[axis]}_{axis}", matrix)
        for axis, matrix in enumerate(matrices)
    )
    shapes = [layout.split(*size), (-1, size[1], *layout.taps)]
    split, final = (
        initializer(graph, "shape_" + "_".join(map(str, shape)), np.asarray(shape, np.int64))
        for shape in shapes
    )
    for op, inputs, attributes in (
        ("MatMul", (rows, None), {}),
        ("MatMul", (None, columns), {}),
        ("Reshape", (None, split), {}),
        ("Transpose", (None,), {"perm": list(layout.order)}),
        ("Reshape", (None, final), {}),
    ):
        node = ir.node(op, [value if one is None else one for one in inputs], attributes)
        graph.insert_before(before, node)
        value = node.outputs[0]
    return value


def _multiply_out(graph: Any, node: Any, name: str, weight: IntegerWeight) -> None:
    """`(q - zero) * scale` in operators that every runtime evaluates beforehand."""
    ir = require("onnx_ir", extra="onnx")
    value = _cast(graph, node, node.inputs[0], "FLOAT")
    zero = weight.encoded()[2]
    if zero is not None:
        shift = initializer(graph, f"{name}.shift", zero.astype(np.float32))
        minus = ir.node("Sub", [value, shift])
        graph.insert_before(node, minus)
        value = minus.outputs[0]
    steps = initializer(graph, f"{name}.steps", weight.scale)
    times = ir.node("Mul", [value, steps])
    _replace(graph, node, times)


def _look_up(graph: Any, node: Any, name: str, weight: CodebookWeight, *, four_bits: bool) -> None:
    ir = require("onnx_ir", extra="onnx")
    index = node.inputs[0]
    if four_bits and weight.centres.size <= 16:
        index = _int4(graph, f"{name}.uint4", weight.index, "uint4")
    centres = initializer(graph, f"{name}.centres", weight.centres)
    _replace(graph, node, ir.node("Gather", [centres, _cast(graph, node, index, "INT32")]))


def _replace(graph: Any, old: Any, new: Any) -> None:
    graph.insert_before(old, new)
    result = new.outputs[0]
    result.type, result.shape = old.outputs[0].type, old.outputs[0].shape
    old.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    inputs = [value for value in old.inputs if value is not None and value.is_initializer()]
    graph.remove(old, safe=True)
    for value in inputs:
        if not list(value.uses()) and value.name in graph.initializers:
            del graph.initializers[value.name]


def finished_models(
    model: Any,
    weighted_nodes: Sequence[WeightedNode],
    stored: Mapping[str, StoredWeight],
    seen: Mapping[str, NDArray],
    target: RuntimeTarget,
    *,
    channels_last: bool = True,
) -> tuple[list[Any], dict[str, str]]:
    """Store the weights; returns the finished models and why some weights multiply as floats.

    The first model is the fastest. A second one, if there is one, cuts off no sum on CPUs without
    VNNI either: more of its weights stand around 128. In both, those do whose inputs rest far from
    0, since sums of such inputs are large all the time; behind a LeakyReLU they do not. The
    optimizer stores equal weights once, so that all products of one parameter have it alike.
    """
    graph = model.graph
    _check_zero_points(weighted_nodes, target)
    placed: dict[str, StoredWeight] = {}
    risky: set[str] = set()
    shifted: set[str] = set()
    for number, weighted in enumerate(weighted_nodes):
        name = (
            weighted.parameter
            if weighted.parameter not in placed
            else f"{weighted.parameter}.{number}"
        )
        if weighted.whole and isinstance(weighted.weight, IntegerWeight):
            weighted.weight = weighted.weight.stretched()
        placed[name] = weighted.weight
        weighted.node.replace_input_with(1, place_weight(graph, name, weighted.weight))
        place_bias(graph, weighted)
        if not weighted.whole or not isinstance(weighted.weight, IntegerWeight):
            continue
        if is_cut_off(weighted.weight, weighted.node.op_type, seen, weighted.path):
            risky.add(weighted.parameter)
        if weighted.input_grid is not None and _rests_high(weighted.input_grid):
            shifted.add(weighted.parameter)
    whole = {weighted.parameter for weighted in weighted_nodes if weighted.whole}
    parameters = {
        name: weighted.parameter for name, weighted in zip(placed, weighted_nodes, strict=True)
    }
    reasons = _place_others(graph, stored, placed)
    parameters |= {f"{name}.shared": name for name in stored if f"{name}.shared" in placed}
    parameters = {name: whose for name, whose in parameters.items() if whose in whole}
    require("onnxscript.optimizer", extra="onnx").optimize(model)
    if channels_last:
        channels_last_moves(model)
    ir = require("onnx_ir", extra="onnx")
    levels = [risky & shifted] + ([risky] if risky - shifted else [])
    copies = [model, *(ir.from_proto(ir.to_proto(model)) for _ in levels[1:])]
    for one, around_128 in zip(copies, levels, strict=True):
        around = {name: whose in around_128 for name, whose in parameters.items()}
        _finish(one, placed, around, target)
    return copies, reasons


def _rests_high(grid: AffineGrid) -> bool:
    """Whether zeros alone, times two large weights, come to half of what 16 bits hold."""
    return int(grid.zero_point.max()) * 2 ** (8 - grid.bits) > HIGH


def _check_zero_points(weighted_nodes: Sequence[WeightedNode], target: RuntimeTarget) -> None:
    """Refuse what an older ONNX Runtime has no kernel for."""
    for weighted in weighted_nodes:
        if target.several_zero_points or not weighted.whole:
            continue
        zero = weighted.weight.encoded()[2] if isinstance(weighted.weight, IntegerWeight) else None
        if zero is not None and (zero != zero.flat[0]).any():
            raise ValueError(
                f"for_onnxruntime={target.name!r}: {weighted.parameter} has a zero point "
                "a channel, "
                'which runs from 1.27 on: quantize with scheme="symmetric" or per_channel=False'
            )


def _place_others(
    graph: Any, stored: Mapping[str, StoredWeight], placed: dict[str, StoredWeight]
) -> dict[str, str]:
    """Weights that something else than a product of a layer reads."""
    reasons = {}
    for name, weight in stored.items():
        value = graph.initializers.get(name)
        used = [] if value is None else [use.node for use in value.uses() if _is_alive(use.node)]
        if value is None or not used:
            continue
        key = name if name not in placed else f"{name}.shared"
        placed[key] = weight
        value.replace_all_uses_with(place_weight(graph, key, weight))
        reasons[name.rpartition(".")[0]] = _why_alone(used)
    return reasons


def _is_alive(node: Any) -> bool:
    """Whether a node needs the weight's numbers: not its shape, nor for what nothing reads."""
    if node.op_type in ("Transpose", "Mul"):
        return any(
            out.is_graph_output() or any(_is_alive(use.node) for use in out.uses())
            for out in node.outputs
        )
    return node.op_type != "Shape"


def _why_alone(nodes: Sequence[Any]) -> str:
    if any(node.op_type == "Gather" for node in nodes):
        return "a lookup does not multiply: its weights alone are integers"
    if any(node.op_type in RECURRENT for node in nodes):
        return "recurrent layers have no int8 kernel: their weights alone are integers"
    scopes = sorted({part for node in nodes for part in modules_of(node)})
    return f"no product of a layer in {scopes}: its weights alone are integers"


def _finish(
    model: Any,
    placed: Mapping[str, StoredWeight],
    whole: Mapping[str, bool],
    target: RuntimeTarget,
) -> None:
    common = require("onnx_ir.passes.common", extra="onnx")
    rewrite_storage(model.graph, placed, whole=whole, four_bits=target.four_bits)
    if not target.several_zero_points:
        _clip_in_place_of_min(model.graph)
    model.graph.sort()
    for cleaner in (common.RemoveUnusedNodesPass(), common.ClearMetadataAndDocStringPass()):
        cleaner(model)
    _drop_notes(model.graph)
    if set(placed) - set(whole) and not whole:
        model.metadata_props[FOLD_WEIGHTS] = "1"


def _clip_in_place_of_min(graph: Any) -> None:
    """The least of two uint8 has a kernel from ONNX Runtime 1.27 on, a clip before that."""
    ir = require("onnx_ir", extra="onnx")
    for node in list(graph):
        if node.op_type == "Min":
            clip = ir.node("Clip", [node.inputs[0], None, node.inputs[1]])
            graph.insert_before(node, clip)
            node.outputs[0].replace_all_uses_with(clip.outputs[0])
            graph.remove(node, safe=True)


def _drop_notes(graph: Any) -> None:
    """Long names of nodes and shapes of values in between: a tenth of a small model's file.

    Tools that show, profile or convert a file need some name for each node.
    """
    kept = set(graph.outputs)
    for number, node in enumerate(graph):
        node.name = f"n{number}"
        for value in node.outputs:
            if value not in kept:
                value.shape = value.type = None
