"""Dynamic quantization: products that quantize their inputs by each call's range."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_compress.conversion.conv_rewrites import put_in_place_of, rewrite_transposed
from lightning_compress.conversion.integer_weights import IntegerWeight
from lightning_compress.conversion.nodes import WeightedNode
from lightning_compress.conversion.qdq import initializer
from lightning_compress.errors import require
from lightning_compress.state import rounds_dynamically

__all__ = ["mark_dynamic", "multiply_dynamically"]


def mark_dynamic(graph: Any, plain: nn.Module, weighted: WeightedNode) -> str | None:
    """Note that a product rounds as it runs, where its layer does; returns why not, if it cannot.

    A transposed convolution becomes a convolution first: its integers have no operator.
    """
    if (
        not rounds_dynamically(plain.get_submodule(weighted.path))
        or weighted.input_grid is not None
    ):
        return None
    if not isinstance(weighted.weight, IntegerWeight) or weighted.weight.encoded()[0] != "int8":
        return "its weights are no multiples of a step around 0: quantize with symmetric grids"
    if weighted.why_float:
        return None
    if weighted.node.op_type == "ConvTranspose":
        obstacle = rewrite_transposed(graph, weighted)
        if obstacle is not None:
            return obstacle
    weighted.dynamic = True
    return None


def multiply_dynamically(graph: Any, weighted: WeightedNode) -> None:
    """Replace a product by DynamicQuantizeLinear, integers, and a factor, as their definition is.

    Weights stand around 128, as uint8: sums of these are exact on every CPU.
    """
    ir = require("onnx_ir", extra="onnx")
    weight, node, name = weighted.weight, weighted.node, weighted.parameter
    assert isinstance(weight, IntegerWeight)
    is_conv = node.op_type == "Conv"
    symbols, scale = weight.symbols, weight.scale
    if node.op_type == "Gemm":
        symbols, scale = symbols.T, scale.T
    stored = initializer(graph, f"{name}.around_128", (symbols + 128).astype(np.uint8))
    middle = initializer(graph, "middle", np.asarray(128, np.uint8))
    given = ir.node("DynamicQuantizeLinear", [node.inputs[0]], num_outputs=3)
    whole, step, zero = given.outputs
    kind = "ConvInteger" if is_conv else "MatMulInteger"
    attributes = node.attributes.values() if is_conv else ()
    product = ir.Node("", kind, [whole, stored, zero, middle], attributes=attributes)
    float_type = {"to": int(ir.DataType.FLOAT)}
    cast = ir.node("Cast", [product.outputs[0]], float_type)
    axes = symbols.ndim - 2 if is_conv else 0
    steps = initializer(graph, f"{name}.steps", _over_outputs(scale, axes, is_conv=is_conv))
    factor = ir.node("Mul", [step, steps])
    times = ir.node("Mul", [cast.outputs[0], factor.outputs[0]])
    nodes = [given, product, cast, factor, times]
    if weighted.bias is not None and node.op_type != "MatMul":
        bias = _over_outputs(weighted.bias.astype(np.float32), axes, is_conv=is_conv)
        value = initializer(graph, f"{weighted.path or 'module'}.bias.added", bias)
        nodes.append(ir.node("Add", [times.outputs[0], value]))
    put_in_place_of(graph, node, nodes)
    if weighted.bias is not None and node.op_type == "MatMul":
        add = weighted.output.producer()
        value = initializer(graph, f"{weighted.path or 'module'}.bias.added", weighted.bias)
        add.replace_input_with(1, value)


def _over_outputs(values: NDArray, axes: int, *, is_conv: bool) -> NDArray[np.float32]:
    """One number an output channel, as it meets the product: (out, 1, 1) or (out,)."""
    flat = values.reshape(-1)
    if flat.size == 1:
        return flat.reshape(())
    return flat.reshape(-1, *[1] * axes) if is_conv else flat
