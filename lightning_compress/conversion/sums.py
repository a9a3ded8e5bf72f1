"""Sums of two activations in an int8 file: on integers where their grids allow it."""

from __future__ import annotations

from typing import Any

from lightning_compress.conversion.nodes import constant, is_move, readers
from lightning_compress.errors import require

__all__ = ["round_sums"]


def round_sums(graph: Any) -> None:
    """Let runtimes add integers where both terms lie on grids and every reader rounds the sum.

    Their kernels (QLinearAdd) want a DequantizeLinear right in front of each term and a
    QuantizeLinear right behind the sum, with at most a ReLU between. A ReLU leaves a grid's numbers
    on the grid: a second rounding behind it changes nothing. Where the module adds numbers that it
    has not rounded, or reads the sum as a float (a residual network's next sum), integers would not
    give its result.

    Args:
        graph: an `onnx_ir` graph with its roundings.
    """
    for node in list(graph):
        if node.op_type != "Add" or any(constant(value) is not None for value in node.inputs):
            continue
        found = [_dequantization(value) for value in node.inputs]
        if all(found) and _is_rounded(node.outputs[0]):
            for index, value in enumerate(node.inputs):
                if value.producer() is not found[index]:
                    node.replace_input_with(index, _rounded_again(graph, value, found[index]))


def _dequantization(value: Any) -> Any:
    """The DequantizeLinear on whose grid a value lies; None where it lies on none."""
    node = value.producer()
    while node is not None and (node.op_type == "Relu" or is_move(node)):
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _is_rounded(value: Any) -> bool:
    """Whether all that reads a value is one QuantizeLinear, with at most a ReLU in front."""
    uses = readers(value)
    if len(uses) != 1 or value.is_graph_output():
        return False
    node = uses[0].node
    if node.op_type == "Relu":
        return _is_rounded(node.outputs[0])
    return node.op_type == "QuantizeLinear" and uses[0].idx == 0


def _rounded_again(graph: Any, value: Any, grid: Any) -> Any:
    ir = require("onnx_ir", extra="onnx")
    down = ir.node("QuantizeLinear", [value, *grid.inputs[1:]])
    back = ir.node("DequantizeLinear", [down.outputs[0], *grid.inputs[1:]])
    graph.insert_after(value.producer(), [down, back])
    return back.outputs[0]
