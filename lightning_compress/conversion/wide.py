"""A Linear layer with many outputs in an exported graph, as the convolution that is faster in int8.

ONNX Runtime's int8 Gemm with a step for each output rounds its outputs slowly, its convolutions do
not: where a latent vector becomes a picture, that is most of the layer's time. The other way round
its Gemm of one row is the faster one where there is much to add up.
"""

from __future__ import annotations

from typing import Any

from lightning_compress.conversion.blocks import put_in_place_of
from lightning_compress.conversion.channels_last import TO_FIRST, TO_LAST, Chain
from lightning_compress.conversion.integers import IntegerWeight
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
    before = Chain(graph, node.inputs[0])
    before.reshape([1, -1, 1, inputs])
    before.transpose(TO_FIRST)
    conv = ir.node("Conv", [before.value, node.inputs[1]], {"kernel_shape": [1, 1]})
    after = Chain(graph, conv.outputs[0])
    after.transpose(TO_LAST)
    after.reshape([-1, outputs])
    site.node, site.output = conv, conv.outputs[0]
    site.weight = weight.moved(lambda part: part[:, :, None, None])
    return put_in_place_of(graph, node, [*before.nodes, conv, *after.nodes])
