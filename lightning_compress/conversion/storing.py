"""How stored weights and biases stand in an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.conversion.integers import (
    INT4,
    CodebookWeight,
    IntegerWeight,
    StoredWeight,
)
from lightning_compress.conversion.rounding import grid_key, initializer
from lightning_compress.conversion.sites import Site
from lightning_compress.conversion.summed import Summed
from lightning_compress.errors import require

__all__ = ["place_bias", "place_weight", "rewrite_storage"]

MARK = "lightning_compress.weight"
LARGEST_INT32 = 2**31 - 1
LONG = 1024


def place_weight(graph: Any, name: str, weight: StoredWeight) -> Any:
    """A DequantizeLinear in front of everything that gives a weight; returns its value.

    The optimizer that runs next never evaluates a DequantizeLinear: the weight stays whole numbers.
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


def place_bias(graph: Any, site: Site) -> None:
    """Give a product its bias: int32 in steps of input times weight, or as floats."""
    if site.bias is None:
        return
    if site.node.op_type == "MatMul":
        _add_bias(graph, site)
        return
    value = _bias_value(graph, site)
    if len(site.node.inputs) < 3:
        site.node.resize_inputs(3)
    site.node.replace_input_with(2, value)


def _bias_value(graph: Any, site: Site) -> Any:
    ir = require("onnx_ir", extra="onnx")
    assert site.bias is not None
    name = f"{site.path or 'module'}.{site.node.op_type}.bias"
    if (
        site.node.op_type == "Gemm"
        or site.bias.size >= LONG  # the steps would take as much again: ONNX Runtime finds them
        or not site.whole
        or site.input_grid is None
        or not isinstance(site.weight, IntegerWeight)
    ):
        return initializer(graph, name, site.bias.astype(np.float32))
    step, _, bits = grid_key(site.input_grid)
    step /= 2 ** (8 - bits)  # see `_pair`
    scale = (np.float32(step) * site.weight.scale.reshape(-1)).astype(np.float32)
    scale = np.broadcast_to(scale, site.bias.shape).copy()
    whole = np.rint(site.bias / scale.astype(np.float64))
    if np.abs(whole).max(initial=0) > LARGEST_INT32:
        return initializer(graph, name, site.bias.astype(np.float32))
    inputs = [
        initializer(graph, f"{name}.quantized", whole.astype(np.int32)),
        initializer(graph, f"{name}.scale", scale),
    ]
    node = ir.node("DequantizeLinear", inputs, {"axis": 0})
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _add_bias(graph: Any, site: Site) -> None:
    name = f"{site.path or 'module'}.bias.added"
    add = site.output.producer()
    assert site.bias is not None
    if add.op_type == "Add" and add.inputs[0] is site.node.outputs[0]:
        add.replace_input_with(1, initializer(graph, name, site.bias.astype(np.float32)))


def repeated(graph: Any, before: Any, name: str, vector: NDArray) -> Any:
    """A long vector whose entries come in runs of equal length, stored once a run.

    A Linear layer that feeds pictures has one step and bias a pixel, equal within a channel.
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
    graph: Any, weights: Mapping[str, StoredWeight], *, whole: Mapping[str, bool]
) -> None:
    """Give weights the form that runs: the optimizer is through and can evaluate nothing of it.

    Weights of 2 to 4 bits are packed into int4, codebooks looked up. Beside products of whole
    numbers, weights that multiply as floats stand behind casts and products of constants: these
    are evaluated when a session starts, a DequantizeLinear is not.

    Args:
        graph: holds the nodes that `place_weight` made.
        weights: by the name they were placed under.
        whole: those that multiply as whole numbers -> whether as uint8 around 128.
    """
    for node in list(graph):
        _shorten_bias(graph, node)
        name = node.metadata_props.get(MARK)
        if name is None:
            continue
        weight = weights[name]
        if isinstance(weight, CodebookWeight):
            _look_up(graph, node, name, weight)
            continue
        if _add_up(graph, node, name, weight, around_128=whole.get(name, False)):
            continue
        _pack(graph, node, name, weight)
        if name in whole:
            _give_zero_point(graph, node, name, weight, around_128=whole[name])
        elif whole:
            _multiply_out(graph, node, name, weight)


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


def _add_up(graph: Any, node: Any, name: str, weight: IntegerWeight, *, around_128: bool) -> bool:
    """Store the fewer numbers that a kernel is made of, and have them added up at session start."""
    small = None
    if weight.summed is not None:
        small = weight.summed.weights(weight.symbols // weight.stretch)
    if small is None or weight.summed is None or len(node.inputs) > 2:
        return False
    ir = require("onnx_ir", extra="onnx")
    if INT4[0] <= small.min(initial=0) and small.max(initial=0) <= INT4[1]:
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


def _look_up(graph: Any, node: Any, name: str, weight: CodebookWeight) -> None:
    ir = require("onnx_ir", extra="onnx")
    index = node.inputs[0]
    if weight.centres.size <= 16:
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
