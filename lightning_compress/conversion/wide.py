"""A Linear layer with many outputs in an exported graph, as the convolution that is faster in int8.

ONNX Runtime's int8 Gemm with a step for each output rounds its outputs slowly, its convolutions do
not: where a latent vector becomes a picture, that is most of the layer's time. The other way round
its Gemm of one row is the faster one where there is much to add up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_compress.conversion.integers import IntegerWeight
from lightning_compress.conversion.rounding import initializer
from lightning_compress.conversion.sites import Site
from lightning_compress.errors import require

__all__ = ["rewrite_wide"]

MANY_OUTPUTS, FEW_INPUTS = 1024, 128  # from where on it is the faster one at batch 1 and 16


def rewrite_wide(graph: Any, site: Site) -> Any:
    """Let a Gemm of many outputs and few inputs run as a 1 x 1 convolution, exactly.

    The batch becomes the rows of one picture, so that the product stays one of two matrices; with
    channels last, the moves around it cost nothing. Returns the value that now holds what the Gemm
    gave, None where it stays.
    """
    weight, node = site.weight, site.node
    if node.op_type != "Gemm" or not isinstance(weight, IntegerWeight) or weight.axis != 0:
        return None
    outputs, inputs = weight.symbols.shape
    if outputs < MANY_OUTPUTS or inputs > FEW_INPUTS:
        return None
    ir = require("onnx_ir", extra="onnx")
    scopes = dict(node.metadata_props)

    def add(kind: str, values: list[Any], **attributes: Any) -> Any:
        made = ir.node(kind, values, attributes, metadata_props=scopes)
        graph.insert_before(node, made)
        return made.outputs[0]

    def shaped(value: Any, shape: list[int]) -> Any:
        name = "shape_" + "_".join(map(str, shape))
        return add("Reshape", [value, initializer(graph, name, np.asarray(shape, np.int64))])

    rows = add("Transpose", [shaped(node.inputs[0], [1, -1, 1, inputs])], perm=[0, 3, 1, 2])
    site.output = add("Conv", [rows, node.inputs[1]], kernel_shape=[1, 1])
    new = shaped(add("Transpose", [site.output], perm=[0, 2, 3, 1]), [-1, outputs])
    old = node.outputs[0]
    new.shape, new.type = old.shape, old.type
    new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    site.node = site.output.producer()
    site.weight = weight.moved(lambda part: part[:, :, None, None])
    return new
