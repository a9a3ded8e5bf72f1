"""How stored weights and biases stand in an ONNX file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.conversion.integers import CodebookWeight, IntegerWeight, StoredWeight
from lightning_compress.conversion.rounding import grid_key, initializer
from lightning_compress.conversion.sites import Site
from lightning_compress.errors import require

__all__ = ["place_bias", "place_weight", "rewrite_storage"]

MARK = "lightning_compress.weight"
LARGEST_INT32 = 2**31 - 1


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
    point = np.zeros(scale.size, stored.dtype) if zero is None else zero.astype(stored.dtype)
    inputs = [
        initializer(graph, f"{name}.quantized", stored),
        initializer(graph, f"{name}.scale", _vector(scale, axis)),
        initializer(graph, f"{name}.zero_point", _vector(point, axis)),
    ]
    attributes = {} if axis is None else {"axis": axis}
    node = ir.node("DequantizeLinear", inputs, attributes, metadata_props={MARK: name})
    node.outputs[0].name = f"{name}.dequantized"
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _vector(values: NDArray, axis: int | None) -> NDArray:
    return values.reshape(()) if axis is None else values.reshape(-1)


def place_bias(graph: Any, site: Site) -> None:
    """Give a product its bias: int32 in steps of input times weight where those exist, else float."""
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
    if not site.whole or site.input_grid is None or not isinstance(site.weight, IntegerWeight):
        return initializer(graph, name, site.bias.astype(np.float32))
    step = grid_key(site.input_grid)[0]
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


def rewrite_storage(
    graph: Any, weights: Mapping[str, StoredWeight], *, foldable: Iterable[str]
) -> None:
    """Pack 2 to 4 bits into int4, look codebooks up, and keep `foldable` weights from running.

    Casts and products of constants are evaluated when a session starts; a DequantizeLinear is not
    (unless `session.disable_quant_qdq` is set), since int8 kernels are made of them.
    """
    foldable = set(foldable)
    for node in list(graph):
        name = node.metadata_props.get(MARK)
        if name is None:
            continue
        weight = weights[name]
        if isinstance(weight, CodebookWeight):
            _look_up(graph, node, name, weight)
            continue
        if weight.encoded()[0] == "int4":
            _pack(graph, node, name, weight)
        if name in foldable:
            _multiply_out(graph, node, name, weight)


def _int4(graph: Any, name: str, array: NDArray, kind: str) -> Any:
    import ml_dtypes  # noqa: PLC0415

    return initializer(graph, name, array.astype(getattr(ml_dtypes, kind)))


def _cast(graph: Any, before: Any, value: Any, kind: str) -> Any:
    ir = require("onnx_ir", extra="onnx")
    node = ir.node("Cast", [value], {"to": int(ir.DataType[kind])})
    graph.insert_before(before, node)
    return node.outputs[0]


def _pack(graph: Any, node: Any, name: str, weight: IntegerWeight) -> None:
    packed = _int4(graph, f"{name}.int4", weight.symbols, "int4")
    old = node.inputs[0]
    node.replace_input_with(0, _cast(graph, node, packed, "INT8"))
    if not list(old.uses()):
        del graph.initializers[old.name]


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
