"""Moves between whole-number products, as ONNX Runtime is fastest with them.

Its int8 convolutions want channels last. Its DepthToSpace and its nearest Resize move one number at
a time there; a Transpose that keeps runs of channels together, and a Concat, copy whole runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_compress.conversion.rounding import initializer
from lightning_compress.conversion.sites import attribute, enlargement, only_use
from lightning_compress.errors import require

__all__ = ["TO_FIRST", "TO_LAST", "Chain", "channels_last_moves"]

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def channels_last_moves(model: Any) -> None:
    """Rewrite DepthToSpace and nearest Resize between DequantizeLinear and QuantizeLinear, exactly.

    Nodes whose pictures have sizes that the graph does not know stay as they are.

    Args:
        model: an `onnx_ir` model whose moves are rounded before and after on one grid.
    """
    require("onnx_ir.passes.common", extra="onnx").ShapeInferencePass()(model)
    makers = {"DepthToSpace": _shuffled, "Resize": _enlarged}
    for node in list(model.graph):
        if node.op_type not in makers:
            continue
        before, after = node.inputs[0].producer(), only_use(node.outputs[0])
        sizes = _sizes(node.inputs[0])
        if before is None or after is None or sizes is None or not _on_one_grid(before, after):
            continue
        if nodes := makers[node.op_type](model.graph, node, before.inputs[0], sizes):
            _put_in_place(model.graph, node, after, nodes)


def _on_one_grid(before: Any, after: Any) -> bool:
    """Whether a DequantizeLinear gives and a QuantizeLinear of the same numbers takes a value."""
    if (before.op_type, after.op_type) != ("DequantizeLinear", "QuantizeLinear"):
        return False
    pairs = zip(before.inputs[1:], after.inputs[1:], strict=True)
    return all(one is other for one, other in pairs)


def _sizes(value: Any) -> tuple[int, int, int] | None:
    """Channels, height and width of pictures, where they are known."""
    if value.shape is None or len(value.shape) != 4:
        return None
    sizes = tuple(value.shape[axis] for axis in (1, 2, 3))
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _shuffled(graph: Any, node: Any, value: Any, sizes: tuple[int, int, int]) -> list[Any]:
    """Depth to space with whole runs of channels; only where those come last ("DCR")."""
    if attribute(node, "mode", "DCR") != "DCR":
        return []
    block, (depth, height, width) = attribute(node, "blocksize", 1), sizes
    channels = depth // block**2
    chain = Chain(graph, value)
    chain.transpose(TO_LAST)
    chain.reshape([0, height, width, block, block, channels])
    chain.transpose([0, 1, 3, 2, 4, 5])
    chain.reshape([0, height * block, width * block, channels])
    chain.transpose(TO_FIRST)
    return chain.nodes


def _enlarged(graph: Any, node: Any, value: Any, sizes: tuple[int, int, int]) -> list[Any]:
    """Each pixel and each row several times; only for whole factors, counted from the corner."""
    factors = enlargement(node)
    if factors is None:
        return []
    (down, along), (channels, height, width) = factors, sizes
    chain = Chain(graph, value)
    chain.transpose(TO_LAST)
    chain.repeat(along, axis=3)
    chain.reshape([0, height, 1, width * along * channels])
    chain.repeat(down, axis=2)
    chain.reshape([0, height * down, width * along, channels])
    chain.transpose(TO_FIRST)
    return chain.nodes


class Chain:
    """Nodes that hand a value on to each other.

    Args:
        graph: that they will stand in.
        value: that the first one reads.
    """

    def __init__(self, graph: Any, value: Any) -> None:
        self.graph, self.value, self.nodes = graph, value, []
        self._ir = require("onnx_ir", extra="onnx")

    def transpose(self, order: Sequence[int]) -> None:
        """With the axes in another order."""
        self._add("Transpose", [self.value], {"perm": list(order)})

    def reshape(self, shape: Sequence[int]) -> None:
        """As another shape, 0 standing for the batch."""
        name = "shape_" + "_".join(map(str, shape))
        wanted = initializer(self.graph, name, np.asarray(shape, np.int64))
        self._add("Reshape", [self.value, wanted], {})

    def repeat(self, times: int, *, axis: int) -> None:
        """The whole value several times along an axis."""
        if times > 1:
            self._add("Concat", [self.value] * times, {"axis": axis})

    def _add(self, kind: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
        self.nodes.append(self._ir.node(kind, inputs, attributes))
        self.value = self.nodes[-1].outputs[0]


def _put_in_place(graph: Any, node: Any, after: Any, nodes: list[Any]) -> None:
    """Whole numbers go through `nodes` in place of rounding, `node` and rounding again."""
    graph.insert_before(node, nodes)
    old, new = after.outputs[0], nodes[-1].outputs[0]
    new.dtype, new.shape = old.dtype, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([after, node], safe=True)
